"""SuperGLUE without training: every possible answer is an example, and the one that the model finds most likely counts.

    superglue_boolq, …               the prompt alone
    superglue_boolq_few_shot, …      after $T5X_SSM_SHOTS (3) solved examples of the training split, drawn for each question
    superglue, superglue_few_shot    the mixtures of all

$T5X_SSM_SUPERGLUE is the published archive, unpacked: BoolQ/train.jsonl, BoolQ/val.jsonl, … To be scored:
`python -m t5x_ssm.infer --mode=score --task=superglue_rte`. The published test sets have no answers, and are not here.
"""

import collections
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.corpora import settings
from tasks.corpora.tasks import vocabulary
from tasks.pairs import prompts, ranking, records
from tasks.pairs.source import STEMS
from tasks.python_source import PythonSource

SHOTS_VARIABLE, DEFAULT_SHOTS = "T5X_SSM_SHOTS", 3
_SEED = 0
_BETWEEN = "\n\n"
_METRICS: dict[str, list[Callable]] = {"cb": [ranking.macro_f1], "multirc": [ranking.answer_f1]}
_NUMBERS = ("question", "choice", "choices", "is_right")


class QuestionSource(PythonSource):
    """The choices of all questions of a split, one after the other: {'inputs', 'targets'} and the numbers `ranking.place` reads."""

    def __init__(self, name: str, *, few_shot: bool):
        super().__init__(splits=("train", "validation"))
        self._name, self._few_shot = name, few_shot
        self._folder, self._template = prompts.TEMPLATES[name]

    def __repr__(self) -> str:
        return f"QuestionSource({self._name}, few_shot={self._few_shot})"

    def questions(self, split: str) -> Iterator[prompts.Question]:
        """The questions of a split, as they stand in its file.

        Raises:
          CorpusError: it is missing, or a record is not as the published ones are.
        """
        for where, record in records.read(self._file(split), collections.Counter()):
            try:
                yield from self._template(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                kind = type(error).__name__
                raise settings.CorpusError(
                    f"{where}: this is no record of {self._folder} ({kind}: {error})."
                ) from error

    def _file(self, split: str) -> pathlib.Path:
        root = settings.location("superglue")
        for folder in (self._folder, self._name):
            if path := records.find_file(root / folder, STEMS[split]):
                return path
        raise settings.CorpusError(f"There is no file of the split {split!r} in {root / self._folder}.")

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        """Every choice of every question."""
        shots = _shots() if self._few_shot else 0
        solved = [q for q in self.questions("train") if q.right] if shots else []
        if shots and len(solved) <= shots:
            raise settings.CorpusError(
                f"${SHOTS_VARIABLE} = {shots}, but the training split of {self._folder} has {len(solved)} questions."
            )
        for number, question in enumerate(self.questions(split)):
            # One more than is needed: a question of the training split is not put before itself.
            drawn = np.random.default_rng([_SEED, number]).permutation(len(solved))[: shots + 1]
            others = [solved[i] for i in drawn if solved[i] != question][:shots]
            before = "".join(f"{q.prompt}{q.choices[q.right[0]]}{_BETWEEN}" for q in others)
            for index, choice in enumerate(question.choices):
                numbers = (number, index, len(question.choices), index in question.right)
                texts = {"inputs": before + question.prompt, "targets": choice}
                yield texts | dict(zip(_NUMBERS, numbers, strict=True))

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        """Always in order: the choices of a question belong together."""
        del shuffle, seed, shard_info
        self._file(split)  # An error here is not buried in TensorFlow's.
        texts = {name: tf.TensorSpec((), tf.string) for name in ("inputs", "targets")}
        signature = texts | {name: tf.TensorSpec((), tf.int32) for name in _NUMBERS}
        return self.generated(lambda: self.examples(split), signature)


def _shots() -> int:
    text = os.environ.get(SHOTS_VARIABLE) or str(DEFAULT_SHOTS)
    if not (text.isdigit() and int(text) > 0):
        raise settings.CorpusError(f"${SHOTS_VARIABLE} = {text!r}; it must be a positive number of examples.")
    return int(text)


for _suffix in ("", "_few_shot"):
    for _name in prompts.TEMPLATES:
        seqio.TaskRegistry.add(
            f"superglue_{_name}{_suffix}",
            source=QuestionSource(_name, few_shot=bool(_suffix)),
            preprocessors=[seqio.preprocessors.tokenize],
            # Neither text ends: the answer goes on from the prompt, and its likelihood is that of its own tokens.
            output_features={text: seqio.Feature(vocabulary(), add_eos=False) for text in ("inputs", "targets")},
            postprocess_fn=ranking.place,
            metric_fns=[ranking.accuracy, *_METRICS.get(_name, [])],
        )
    seqio.MixtureRegistry.add(
        f"superglue{_suffix}", [f"superglue_{_name}{_suffix}" for _name in prompts.TEMPLATES], default_rate=1.0
    )
