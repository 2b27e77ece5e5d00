"""Web text: C4 and OpenWebText, and any folder of texts of one's own.

C4 (Raffel et al. 2020) is its c4-train.00000-of-01024.json.gz, … or tfds:c4/en:3.1.0; OpenWebText the archives urlsf_subset*_data.xz, or JSON
lines, or Parquet. `texts` reads text files, JSON lines and Parquet, below train/ and validation/ if there are such
folders, and any TFDS data set with a `text`; OpenWebText and `texts` otherwise hold one document in 200 out by its text.
"""

from tasks.corpora import formats
from tasks.corpora.tasks import register

_ENDINGS = (".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

register(
    "c4",
    formats.json_lines("text"),
    {"train": ["*c4-train.*.json.gz"], "validation": ["*c4-validation.*.json.gz"]},
    tfds_fields=["text"],
)
register(
    "openwebtext",
    formats.by_name("text"),
    {
        "train": ["*_data.xz", "*.tar.xz", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "!validation/*"],
        "validation": ["validation/*"],
    },
    held_out=True,
)
register(
    "texts",
    formats.by_name("text", "content"),
    {
        "train": [*(f"*{e}" for e in _ENDINGS), "!validation/*"],
        "validation": [f"validation/*{e}" for e in _ENDINGS],
    },
    held_out=True,
    tfds_fields=["text", "content"],
)
