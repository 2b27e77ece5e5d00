"""The single examples of a seqio task, in order: what batch inference reads.

Training and evaluation read the token cache instead, where documents are one stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_ssm.data.live import leave_accelerators_to_jax, tasks_of
from t5x_ssm.data.reading import for_the_user
from t5x_ssm.errors import DataError
from tasks import cache, vocabularies


class Example(NamedTuple):
    """One example of a task.

    Attributes:
      inputs: int [n], the text to be continued; empty where the task has none.
      targets: int [m].
      inputs_text, targets_text: as text; the task's own, before it was tokenised, where it kept that.
      fields: everything that the task gives of it, as seqio's postprocess functions take it.
    """

    inputs: np.ndarray
    targets: np.ndarray
    inputs_text: str
    targets_text: str
    fields: Mapping[str, Any]


class TaskExamples:
    """The examples of one split of a task; iterate as often as you like.

    Attributes:
      name: the task's name.
      has_inputs: whether the task separates inputs from targets.
      vocabulary: seqio's, of the targets.
      description: what identifies it, see `tasks.vocabularies.describe`.
    """

    def __init__(self, task: Any, split: str, lengths: Mapping[str, int | None]):
        features = task.output_features
        if not {"targets"} <= set(features) <= {"inputs", "targets"}:
            raise DataError(
                f"Task {task.name!r} has the features {sorted(features)}; a model of texts reads 'targets', or 'inputs' "
                "and 'targets'."
            )
        if split not in task.splits:
            raise DataError(f"{task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}.")
        self.name = task.name
        self.has_inputs = "inputs" in features
        self.vocabulary = features["targets"].vocabulary
        self.description = vocabularies.describe(self.vocabulary)
        if self.has_inputs and vocabularies.describe(features["inputs"].vocabulary) != self.description:
            raise DataError(f"The inputs and targets of {task.name!r} have two vocabularies; a model has one.")
        self._task, self._split, self._lengths = task, split, lengths

    def __iter__(self) -> Iterator[Example]:
        with for_the_user([self._task]):
            dataset = self._task.get_dataset(
                sequence_length=None,
                split=self._split,
                shuffle=False,
                trim_output_features=False,
                try_in_mem_cache=False,
            )
        iterator = dataset.as_numpy_iterator()
        while True:
            with for_the_user([self._task]):
                example = next(iterator, None)
            if example is None:
                return
            inputs = np.asarray(example.get("inputs", ()), np.int32)[: self._lengths.get("inputs")]
            targets = np.asarray(example["targets"], np.int32)[: self._lengths.get("targets")]
            texts = self._text(example, "inputs", inputs), self._text(example, "targets", targets)
            yield Example(inputs, targets, *texts, example)

    def cut(self, example: Example, length: int) -> Example:
        """The example with its first `length` target tokens as inputs, and the rest as targets."""
        inputs, targets = example.targets[:length], example.targets[length:]
        decode = lambda ids: self.vocabulary.decode([int(i) for i in ids])
        return Example(inputs, targets, decode(inputs), decode(targets), example.fields)

    def has_metrics(self, mode: str) -> bool:
        """Whether the task has metrics of a mode, see `metrics`."""
        return bool(self._metric_fns(mode))

    def metrics(self, examples: Sequence[Example], results: Sequence[Any], mode: str) -> dict[str, float]:
        """The task's own metrics.

        Args:
          examples: what was read.
          results: for each, the text that a model wrote (mode 'predict') or its score (mode 'score').
          mode: which of the metrics are meant.

        Returns:
          Their figures by name.

        Raises:
          DataError: a package that they need is not installed.
        """
        postprocess = self._task.postprocess_fn
        targets = [postprocess(e.targets_text, example=e.fields, is_target=True) for e in examples]
        if mode == "predict":
            pairs = zip(results, examples, strict=True)
            results = [postprocess(text, example=e.fields, is_target=False) for text, e in pairs]
        found: dict[str, float] = {}
        for function in self._metric_fns(mode):
            try:
                found |= function(targets, results)
            except ImportError as error:
                raise DataError(f"The metrics of {self.name!r}: {error}") from error
        return {name: float(value) for name, value in found.items()}

    def _metric_fns(self, mode: str) -> Sequence[Callable[..., dict[str, float]]]:
        return self._task.predict_metric_fns if mode == "predict" else self._task.score_metric_fns

    def _text(self, example: Mapping[str, Any], feature: str, ids: np.ndarray) -> str:
        text = example.get(f"{feature}_pretokenized")
        if isinstance(text, bytes):
            return text.decode("utf-8", errors="replace")
        return self.vocabulary.decode([int(i) for i in ids])


def open_examples(
    name: str, split: str, lengths: Mapping[str, int | None] | None = None, module: str | None = None
) -> list[TaskExamples]:
    """The tasks of a mixture, or a task alone.

    Args:
      name: a registered seqio task or mixture.
      split: 'validation', …
      lengths: tokens that the features are cut to; None takes one, or all, whole.
      module: a module to import for its registrations.

    Raises:
      DataError: unknown name or split, or features that a model of texts cannot read.
    """
    leave_accelerators_to_jax()
    with for_the_user():
        provider = cache.registered(name, ["tasks", module] if module else ["tasks"])
    return [TaskExamples(task, split, lengths or {}) for task in tasks_of(provider)]
