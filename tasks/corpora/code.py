"""Source code: JSON lines (plain, .gz, .zst), Parquet files (The Stack's column `content`), or a tree of source files.

Below `train/` and `validation/` if there are such folders; else one document in 200 is held out by its text.
"""

from tasks.corpora import formats
from tasks.corpora.tasks import register

EXTENSIONS = [
    ".c",
    ".cc",
    ".clj",
    ".cpp",
    ".cs",
    ".css",
    ".cu",
    ".dart",
    ".ex",
    ".f90",
    ".go",
    ".h",
    ".hpp",
    ".hs",
    ".html",
    ".java",
    ".jl",
    ".js",
    ".kt",
    ".lua",
    ".m",
    ".ml",
    ".php",
    ".pl",
    ".py",
    ".r",
    ".rb",
    ".rs",
    ".scala",
    ".sh",
    ".sql",
    ".swift",
    ".tex",
    ".ts",
    ".vue",
]
PACKED = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.json.gz", "*.parquet")

_FILES = [*PACKED, *(f"*{extension}" for extension in EXTENSIONS)]

register(
    "code",
    formats.by_name("content", "text", "code"),
    {
        "train": [*_FILES, "!validation/*"],
        "validation": [f"validation/{pattern}" for pattern in _FILES],
    },
    held_out=True,
)
