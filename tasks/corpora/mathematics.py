"""Mathematics: a folder of LaTeX files (arXiv), or JSON lines (Proof-Pile: .jsonl, .gz, .zst).

Below `train/` and `validation/` if there are such folders, or in files with these words in their names; else one
document in 200 is held out by its text.
"""

from tasks.corpora import formats
from tasks.corpora.tasks import register

_ENDINGS = (".tex", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

register(
    "mathematics",
    formats.by_name("text", "content"),
    {
        "train": [*(f"*{e}" for e in _ENDINGS), "!validation/*", "!*validation.jsonl*", "!test/*", "!*test.jsonl*"],
        "validation": [*(f"validation/*{e}" for e in _ENDINGS), "*validation.jsonl*"],
    },
    held_out=True,
)
