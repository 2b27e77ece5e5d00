"""Corpora of published language-model results: the One Billion Word benchmark, WikiText-103 and Wiki-40B.

LM1B (Chelba et al. 2013, arXiv:1312.3005) is its archive's two folders of files with a sentence a line, or tfds:lm1b:1.1.0; a
sentence is a document. Wiki-40B (Guo et al. 2020) is tfds:wiki40b/en:1.3.0, or JSON lines or Parquet with its splits' names; the
marks of titles and paragraphs in its articles (_START_ARTICLE_, …) are left as they are. WikiText-103 (Merity et al. 2016, arXiv:1609.07843) is wiki.{train,valid,test}.tokens (or .raw); an article is a
document, its lines as they are.
"""

import pathlib
import re
from collections.abc import Iterator

from tasks.corpora import formats
from tasks.corpora.tasks import SPLITS, register

# " = Title = " at the level of an article; sections have more signs.
_TITLE = re.compile(rb"^ = [^=].*[^=] = ?\n?$")

# Articles and tokens of the paper's Table 1; line ends count as words there.
WIKITEXT_PUBLISHED = {
    "train": {"documents": 28_475, "words": 103_227_021},
    "validation": {"documents": 60, "words": 217_646},
    "test": {"documents": 60, "words": 245_569},
}


def articles(path: pathlib.Path, counts: formats.Counts) -> Iterator[bytes]:
    """The articles of a WikiText file. A title is a line with one = on either side, between empty lines."""
    del counts
    article: list[bytes] = []
    with formats.open_binary(path) as file:
        held: bytes | None = None
        for line in file:
            # Lines such as " = 5 = " also occur in texts: a title has an empty line after it, and one before.
            if held is not None:
                if not line.strip() and any(part.strip() for part in article):
                    yield b"".join(article)
                    article = []
                article.append(held)
                held = None
            if _TITLE.match(line) and (not article or not article[-1].strip()):
                held = line
            else:
                article.append(line)
        if held is not None:
            article.append(held)
    yield b"".join(article)


register(
    "lm1b",
    formats.lines,
    {
        "train": ["*training-monolingual.tokenized.shuffled/news.en-*"],
        "validation": ["*heldout-monolingual.tokenized.shuffled/news.en.heldout-*"],
    },
    tfds_fields=["text"],
    tfds_splits={"validation": "test"},
)
register(
    "wiki40b",
    formats.by_name("text"),
    {split: [f"*{split}*{ending}" for ending in (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")] for split in SPLITS},
    tfds_fields=["text"],
)
register(
    "wikitext103",
    articles,
    {
        split: [f"*wiki.{word}.tokens", f"*wiki.{word}.raw"]
        for split, word in {"train": "train", "validation": "valid", "test": "test"}.items()
    },
    published=WIKITEXT_PUBLISHED,
)
