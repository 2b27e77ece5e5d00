"""The single examples of a seqio task, in order: what batch inference reads.

Training and evaluation read the token cache instead, where documents are one stream.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_ssm.data.live import leave_accelerators_to_jax
from t5x_ssm.errors import DataError
from tasks import cache, vocabularies


class Example(NamedTuple):
    """One example of a task.

    Attributes:
      inputs: int [n], the text to be continued; empty where the task has none.
      targets: int [m].
      inputs_text, targets_text: as text; the task's own, before it was tokenised, where it kept that.
    """

    inputs: np.ndarray
    targets: np.ndarray
    inputs_text: str
    targets_text: str


class TaskExamples:
    """The examples of one split of a task; iterate as often as you like.

    Attributes:
      name: the task's name.
      has_inputs: whether the task separates inputs from targets.
      vocabulary: seqio's, of the targets.
      description: what identifies it, see `tasks.vocabularies.describe`.
    """

    def __init__(self, task: Any, split: str, lengths: Mapping[str, int] | None):
        features = task.output_features
        if not {"targets"} <= set(features) <= {"inputs", "targets"}:
            raise DataError(
                f"Task {task.name!r} has the features {sorted(features)}; a decoder reads 'targets', or 'inputs' and "
                "'targets'."
            )
        if split not in task.splits:
            raise DataError(f"{task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}.")
        self.name = task.name
        self.has_inputs = "inputs" in features
        self.vocabulary = features["targets"].vocabulary
        self.description = vocabularies.describe(self.vocabulary)
        if self.has_inputs and vocabularies.describe(features["inputs"].vocabulary) != self.description:
            raise DataError(f"The inputs and targets of {task.name!r} have two vocabularies; a decoder has one.")
        self._task, self._split, self._lengths = task, split, lengths

    def __iter__(self) -> Iterator[Example]:
        dataset = self._task.get_dataset(
            sequence_length=None if self._lengths is None else dict(self._lengths),
            split=self._split,
            shuffle=False,
            trim_output_features=self._lengths is not None,
            try_in_mem_cache=False,
        )
        for example in dataset.as_numpy_iterator():
            inputs = np.asarray(example.get("inputs", ()), np.int32)
            targets = np.asarray(example["targets"], np.int32)
            yield Example(
                inputs, targets, self._text(example, "inputs", inputs), self._text(example, "targets", targets)
            )

    def cut(self, example: Example, length: int) -> Example:
        """The example with its first `length` target tokens as inputs, and the rest as targets."""
        inputs, targets = example.targets[:length], example.targets[length:]
        decode = lambda ids: self.vocabulary.decode([int(i) for i in ids])
        return Example(inputs, targets, decode(inputs), decode(targets))

    def _text(self, example: Mapping[str, Any], feature: str, ids: np.ndarray) -> str:
        text = example.get(f"{feature}_pretokenized")
        if isinstance(text, bytes):
            return text.decode("utf-8", errors="replace")
        return self.vocabulary.decode([int(i) for i in ids])


def open_examples(
    name: str, split: str, lengths: Mapping[str, int] | None = None, module: str | None = None
) -> list[TaskExamples]:
    """The tasks of a mixture, or a task alone.

    Args:
      name: a registered seqio task or mixture.
      split: 'validation', …
      lengths: T5X's task_feature_lengths, to which examples are cut; None takes them whole.
      module: a module to import for its registrations.

    Raises:
      DataError: unknown name or split, or features that a decoder cannot read.
    """
    leave_accelerators_to_jax()
    try:
        provider = cache.registered(name, ["tasks", module] if module else ["tasks"])
    except cache.CacheError as error:
        raise DataError(str(error)) from error
    return [TaskExamples(task, split, lengths) for task in getattr(provider, "tasks", [provider])]
