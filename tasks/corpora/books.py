"""Books: PG-19 (Rae et al. 2020, arXiv:1911.05507), as its folder of text files train/, validation/, test/, or as
tfds:pg19:0.1.1.

A book is a document. The published word counts turn a loss into perplexity per word, whatever the vocabulary.
"""

from tasks.corpora import formats
from tasks.corpora.tasks import SPLITS, register

# Table 1 of the paper.
PUBLISHED = {
    "train": {"documents": 28_602, "words": 1_973_136_207},
    "validation": {"documents": 50, "words": 3_007_061},
    "test": {"documents": 100, "words": 6_966_499},
}

register(
    "books",
    formats.text,
    {split: [f"{split}/*.txt"] for split in SPLITS},
    published=PUBLISHED,
    tfds_fields=["book_text", "text"],
)
