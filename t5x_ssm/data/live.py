"""Training on a live seqio pipeline, which resumes from the saved state of its tf.data iterator.

For small data and for preprocessing that differs in every epoch. Seqio shuffles in a buffer and packs as it goes, so
its position is not a number but the iterator's whole state, buffers included: some megabytes, of this process's share
of the data alone. A run goes on with the same batches, on the same number of processes and the same versions of
TensorFlow and seqio; the token cache has neither limit.
"""

import base64
import collections
import contextlib
import pathlib
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5x_ssm.data.pairs import INPUTS, TARGETS, PairsEvaluation, cut_texts
from t5x_ssm.data.prefetch import PrefetchedFeed, Prefetcher
from t5x_ssm.data.reading import for_the_user
from t5x_ssm.errors import DataError
from tasks import cache, vocabularies
from tasks.cache_files import digest

if TYPE_CHECKING:
    from t5x_ssm.data.feed import DatasetConfig

# Saving takes tenths of a second and happens in the background thread, between batches.
SNAPSHOT_PERIOD = 100


class LiveFeed(PrefetchedFeed):
    """Batches of `seqio.get_dataset` with the decoder feature converter, repeated without end.

    The iterator is saved before every `SNAPSHOT_PERIOD`-th batch, as it runs ahead; a position is the last of these
    before the consumer's batch, and the number of batches to skip from there.
    """

    def __init__(self, config: "DatasetConfig", *, process_index: int, process_count: int, seed: int, prefetch: int):
        import seqio
        import tensorflow as tf

        provider = open_provider(config)
        name, lengths = config.mixture_or_task_name, dict(config.task_feature_lengths)
        self._config, self._lengths = config, lengths
        self._tasks = tasks_of(provider)
        # Of pairs: a language model's long documents come in pieces, of which nothing is lost.
        self._eos_ids = eos_ids(provider) if INPUTS in lengths else None
        self._shard, self._seed = seqio.ShardInfo(process_index, process_count), seed
        identity = {
            "kind": "seqio",
            "name": name,
            "split": config.split,
            "seed": seed,
            "lengths": lengths,
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
            "pack": config.pack,
            "use_cached": config.use_cached,
            "process_count": process_count,
            "process_index": process_index,
            "tensorflow": tf.__version__,
            "seqio": seqio.__version__,
        }
        vocabulary = vocabularies.describe(provider.output_features[cache.FEATURE].vocabulary)
        if config.objective != "language_model":
            identity["objective"] = config.objective
        if vocabulary["pad_id"] is None:
            raise DataError(
                f"The vocabulary {vocabulary['name']} of {name!r} has no padding, and seqio pads with the id 0, which is a "
                "token there. Train from the token cache (DatasetConfig.source='cache')."
            )
        identity["data"], made_from = describe_data(self._tasks)
        super().__init__(vocabulary, identity, prefetch=prefetch)
        self.made_from = made_from
        self._step = 0
        # The newest saved iterator that the consumer has reached: the step it belongs to, and its contents.
        self._snapshot: tuple[int, dict[str, str] | None] = (0, None)

    def next(self) -> dict[str, np.ndarray]:
        with for_the_user(self._tasks):
            if self._prefetcher is None:
                self._prefetcher = self._start()
                self.counts |= self._left_out()
            batch, snapshot = self._prefetcher.next()
        if snapshot is not None:
            self._snapshot = (self._step, snapshot)
        self._step += 1
        if self._eos_ids is not None:
            cut = cut_texts(batch, self._eos_ids)
            self.counts |= {name: self.counts.get(name, 0) + count for name, count in cut.items()}
        return batch

    def state(self) -> dict[str, Any]:
        saved_at, snapshot = self._snapshot
        position = {"step": self._step, "skip": self._step - saved_at, "iterator": snapshot}
        return {**self.identity, **position, "made_from": self.made_from, "counts": dict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        saved, now = state.get("process_count"), self.identity["process_count"]
        if state.get("kind") == "seqio" and saved != now:
            raise DataError(
                f"A live seqio pipeline goes on only with as many processes as it was saved with ({saved}, now {now}). "
                "Start that many, or train from the token cache (DatasetConfig.source='cache'), which does not mind."
            )
        self._check_identity(state)
        self.close()
        self._step = int(state["step"])
        self._snapshot = (self._step - int(state["skip"]), state["iterator"])
        self.counts = dict(state.get("counts", {}))

    def _start(self) -> Prefetcher:
        """Goes on at `self._step`, from the newest snapshot."""
        saved_at, snapshot = self._snapshot
        iterator = iter(self._dataset())
        if snapshot is not None:
            _load(iterator, snapshot)
        skip = self._step - saved_at

        def produce(index: int) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
            if index == 0:
                for _ in range(skip):
                    next(iterator)
            due = (skip + index) % SNAPSHOT_PERIOD == 0 and skip + index > 0
            taken = _save(iterator) if due else None
            batch = next(iterator)
            if index == 0 and snapshot is None:
                _save(iterator)  # What cannot be saved is better known now than at the first snapshot.
            return {name: value.numpy() for name, value in batch.items()}, taken

        return Prefetcher(produce, depth=self._depth)

    def _left_out(self) -> dict[str, int]:
        """What the sources left out of the split when it was opened, by name; nothing of those that cannot tell."""
        counts: collections.Counter[str] = collections.Counter()
        for task in self._tasks:
            if left_out := getattr(task.source, "left_out", None):
                counts.update(left_out(self._config.split))
        return dict(counts)

    def _dataset(self):
        import seqio
        import tensorflow as tf

        config = self._config
        of_two_texts = config.objective == "sequence_to_sequence"
        converter = seqio.EncDecFeatureConverter if of_two_texts else seqio.DecoderFeatureConverter
        dataset = seqio.get_dataset(
            config.mixture_or_task_name,
            task_feature_lengths=self._lengths,
            feature_converter=converter(pack=config.pack),
            dataset_split=config.split,
            use_cached=config.use_cached,
            shuffle=config.shuffle,
            num_epochs=None,
            shard_info=self._shard,
            seed=self._seed,
            batch_size=config.batch_size // self._shard.num_shards,
            verbose=False,
        )
        options = tf.data.Options()
        options.deterministic = True
        return dataset.with_options(options)


def open_provider(config: "DatasetConfig") -> Any:
    """The registered seqio task or mixture that a configuration names.

    Raises:
      DataError: it is unknown, or has other features than lengths are given for, or no such split.
    """
    leave_accelerators_to_jax()
    name, lengths = config.mixture_or_task_name, config.task_feature_lengths
    with for_the_user():
        provider = cache.registered(name, ["tasks", config.module] if config.module else ["tasks"])
    for feature in sorted(set(lengths) ^ set(provider.output_features)):
        raise DataError(
            f"TASK_FEATURE_LENGTHS has {sorted(lengths)}, but the features of {name!r} are "
            f"{sorted(provider.output_features)}: {feature!r} is in one of them only."
        )
    if config.split not in provider.splits:
        raise DataError(f"{name!r} has no split {config.split!r}; it has {', '.join(sorted(provider.splits))}.")
    return provider


def tasks_of(provider: Any) -> list[Any]:
    """The tasks of a seqio mixture, or the task alone."""
    return list(getattr(provider, "tasks", [provider]))


def describe_data(tasks: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """What identifies the data of tasks, as far as their sources can tell, and under which settings it was found.

    Raises:
      DataError: it cannot be found.
    """
    with for_the_user():
        found = {task.name: cache.describe_source(task.source) for task in tasks}
    made_from = {
        name: value for described in found.values() for name, value in described.pop("environment", {}).items()
    }
    return digest(found), made_from


def eos_ids(provider: Any) -> dict[str, int | None]:
    """What each feature's texts end with; None for one whose texts do not."""
    features = provider.output_features.items()
    return {name: feature.vocabulary.eos_id if feature.add_eos else None for name, feature in features}


def held_out_pairs(config: "DatasetConfig", **place: int) -> dict[str, PairsEvaluation]:
    """The examples of a split of tasks with inputs and targets, for each task of the configured provider, read whole.

    Args:
      config: objective 'sequence_to_sequence' for an encoder-decoder, or 'language_model' for a decoder.
      **place: process_index and process_count.

    Raises:
      DataError: as `open_provider`, or the data cannot be read.
    """
    feeds = {}
    for task in tasks_of(open_provider(config)):
        with for_the_user([task]):
            dataset = task.get_dataset(
                sequence_length=dict(config.task_feature_lengths),
                split=config.split,
                shuffle=False,
                use_cached=config.use_cached,
                try_in_mem_cache=False,
            )
            pairs = [(example[INPUTS], example[TARGETS]) for example in dataset.as_numpy_iterator()]
        feeds[task.name] = PairsEvaluation(
            task.name,
            vocabularies.describe(task.output_features[TARGETS].vocabulary),
            pairs,
            config.task_feature_lengths,
            config.batch_size,
            encoder=config.objective == "sequence_to_sequence",
            **place,
        )
    return feeds


def _save(iterator) -> dict[str, str]:
    """A tf.data iterator's state as JSON-able text, by file of TensorFlow's checkpoint.

    Raises:
      DataError: it has none that can be saved.
    """
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        try:
            tf.train.Checkpoint(iterator=iterator).write(str(pathlib.Path(folder) / "iterator"))
        except tf.errors.FailedPreconditionError as error:
            raise DataError(
                "The data is read by Python code, and TensorFlow cannot save where that stands, so that no run could be resumed: "
                f"train from the token cache (DatasetConfig.source='cache'). TensorFlow says: {error.message}"
            ) from error
        return {
            path.name: base64.b64encode(zlib.compress(path.read_bytes(), level=1)).decode("ascii")
            for path in sorted(pathlib.Path(folder).iterdir())
        }


def _load(iterator, snapshot: Mapping[str, str]) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        for name, text in snapshot.items():
            (pathlib.Path(folder) / name).write_bytes(zlib.decompress(base64.b64decode(text)))
        tf.train.Checkpoint(iterator=iterator).read(str(pathlib.Path(folder) / "iterator")).assert_consumed()


def leave_accelerators_to_jax() -> None:
    """TensorFlow would otherwise reserve the GPUs' memory."""
    import tensorflow as tf

    # It refuses when it already runs with them: then the program has decided so.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
