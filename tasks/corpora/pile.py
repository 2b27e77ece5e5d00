"""The Pile (Gao et al. 2020, arXiv:2101.00027): train/00.jsonl.zst, …, val.jsonl.zst, test.jsonl.zst.

`pile` is all of it, whose files already mix the sets in the published weights. `pile_arxiv` and its like are the documents
of one set; reading one set passes over the whole files.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tasks.corpora import formats
from tasks.corpora.tasks import register

# Table 1 of the paper: the weight of each set in percent, under the names that its records carry.
WEIGHTS = {
    "Pile-CC": 18.11,
    "PubMed Central": 14.40,
    "Books3": 12.07,
    "OpenWebText2": 10.01,
    "ArXiv": 8.96,
    "Github": 7.59,
    "FreeLaw": 6.12,
    "StackExchange": 5.13,
    "USPTO Backgrounds": 3.65,
    "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17,
    "OpenSubtitles": 1.55,
    "Wikipedia (en)": 1.53,
    "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88,
    "BookCorpus2": 0.75,
    "EuroParl": 0.73,
    "HackerNews": 0.62,
    "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38,
    "NIH ExPorter": 0.30,
    "Enron Emails": 0.14,
}
PATTERNS = {
    "train": ["*train/*.jsonl.zst", "*train/*.jsonl"],
    "validation": ["*val.jsonl.zst", "*val.jsonl"],
    "test": ["*test.jsonl.zst", "*test.jsonl"],
}


def task_name(set_name: str) -> str:
    """'DM Mathematics' is the task pile_dm_mathematics."""
    words = "".join(c if c.isalnum() else " " for c in set_name.lower()).split()
    return "_".join(["pile", *words])


def _of(set_name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: (record.get("meta") or {}).get("pile_set_name") == set_name


register("pile", formats.json_lines("text"), PATTERNS)
for _name in WEIGHTS:
    register(task_name(_name), formats.json_lines("text", wanted=_of(_name)), PATTERNS, corpus="pile")
