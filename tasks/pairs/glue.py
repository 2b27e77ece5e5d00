"""GLUE (Wang et al. 2018, arXiv:1804.07461) as text to text, in T5's format (Raffel et al. 2020, appendix D).

An input is the task's name and its named sentences ('mnli hypothesis: … premise: …'), a target the label's name; of STS-B,
whose label is a number from 0 to 5, that number to the nearest fifth, as '3.8'.
$T5X_SSM_GLUE is GLUE's unpacked folder (SST-2/train.tsv, …), one with JSON lines in its place (sst2/train.jsonl), or
tfds:glue:2.0.0.
The published test sets have no labels, and are not here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from tasks.pairs.metrics import Metric, accuracy, correlations, f1_of, matthews_of
from tasks.pairs.registration import Fields, register
from tasks.pairs.source import LABEL, STEMS, RecordSource


class Part(NamedTuple):
    """One of GLUE's tasks.

    Attributes:
      folder: its name in GLUE's own folder.
      fields: names of its sentences in T5's format, each with those in GLUE's tables; in T5's order.
      labels: T5's names, by index; none of a task whose label is a score.
      label_fields: names of the label.
      metrics: beside the accuracy, or of scores.
      columns: of tables without names.
    """

    folder: str
    fields: Mapping[str, Sequence[str]]
    labels: Sequence[str]
    label_fields: Sequence[str] = (LABEL,)
    metrics: Sequence[Metric] = ()
    columns: Sequence[str] | None = None


_TWO = {name: (name,) for name in ("sentence1", "sentence2")}
_ENTAILMENT = ("entailment", "not_entailment")
PARTS = {
    "cola": Part(
        "CoLA",
        {"sentence": ("sentence",)},
        ("unacceptable", "acceptable"),
        metrics=[matthews_of("acceptable")],
        columns=("source", LABEL, "note", "sentence"),
    ),
    "sst2": Part("SST-2", {"sentence": ("sentence",)}, ("negative", "positive")),
    "mrpc": Part(
        "MRPC",
        {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")},
        ("not_equivalent", "equivalent"),
        (LABEL, "Quality", "\ufeffQuality"),
        metrics=[f1_of("equivalent")],
    ),
    "qqp": Part(
        "QQP",
        {name: (name,) for name in ("question1", "question2")},
        ("not_duplicate", "duplicate"),
        (LABEL, "is_duplicate"),
        metrics=[f1_of("duplicate")],
    ),
    "mnli": Part(
        "MNLI",
        {"hypothesis": ("hypothesis", "sentence2"), "premise": ("premise", "sentence1")},
        ("entailment", "neutral", "contradiction"),
        (LABEL, "gold_label"),
    ),
    "qnli": Part("QNLI", {name: (name,) for name in ("question", "sentence")}, _ENTAILMENT),
    "rte": Part("RTE", _TWO, _ENTAILMENT),
    "wnli": Part("WNLI", _TWO, ("not_entailment", "entailment")),
    "stsb": Part("STS-B", _TWO, (), ("score", LABEL), metrics=[correlations]),
}
_SCORES = (0.0, 5.0)
# The genres of MNLI's validation are those of its training, or others.
_MNLI_STEMS = {
    "train": ("train",),
    "validation": ("validation_matched", "dev_matched", "validation"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
}


def _pair(record: Fields, *, name: str, part: Part) -> Fields:
    words = [name]
    for field in part.fields:
        words += [f"{field}:", record[field]]
    if part.labels:
        target = tf.gather(tf.constant(part.labels), record[LABEL])
    else:
        target = tf.strings.as_string(tf.round(record[LABEL] * 5) / 5, precision=1)
    return {"inputs": tf.strings.join(words, separator=" "), "targets": target}


for _name, _part in PARTS.items():
    _source = RecordSource(
        "glue",
        _part.fields,
        stems=_MNLI_STEMS if _name == "mnli" else {split: STEMS[split] for split in ("train", "validation")},
        folders=(_part.folder, _name),
        labels=_part.labels,
        scores=None if _part.labels else _SCORES,
        label_fields=_part.label_fields,
        columns=_part.columns,
        tfds_subset=_name,
        tfds_splits={"validation": "validation_matched"} if _name == "mnli" else None,
    )
    _metrics = [accuracy, *_part.metrics] if _part.labels else _part.metrics
    register(f"glue_{_name}", _source, functools.partial(_pair, name=_name, part=_part), _metrics)
