"""Summarisation as text to text: 'summarize: DOCUMENT' to its summary, in T5's format (Raffel et al. 2020, appendix D).

    $T5X_SSM_SUMMARIZATION   a folder with train.jsonl, validation.jsonl, test.jsonl: {"document": …, "summary": …} a line
    $T5X_SSM_CNN_DAILYMAIL   the same, or tfds:cnn_dailymail:3.4.0
    $T5X_SSM_XSUM            the same, or tfds:xsum:1.1.0

or `summarization/corpora.location.path` and so on in gin.
"""

import tensorflow as tf

from tasks.pairs.metrics import rouge
from tasks.pairs.registration import Fields, register
from tasks.pairs.source import RecordSource

PREFIX = "summarize: "
FIELDS = {"document": ("document", "article", "text"), "summary": ("summary", "highlights", "abstract")}


def _pair(record: Fields) -> Fields:
    return {"inputs": tf.strings.join([PREFIX, record["document"]]), "targets": record["summary"]}


for _name in ("summarization", "cnn_dailymail", "xsum"):
    register(_name, RecordSource(_name, FIELDS), _pair, [rouge])
