"""Feeds: what a training loop reads its batches from, and how they are opened from a configuration.

A training feed never ends and knows its position: `state()` belongs to the batch that `next()` would return, however
far the background thread has read ahead, and `restore` continues with exactly that batch. With the token cache
(`source="cache"`) the position is (seed, step), good for any number of processes. With a live seqio pipeline
(`source="seqio"`, see `t5x_ssm.data.live`) it is the pipeline's iterator state, good for the same number.
Evaluation feeds are those of `t5x_ssm.data.evaluation_feeds`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_ssm.data import encoder_decoder, made_cache, sources
from t5x_ssm.data.cached_pairs import CachedPairs, PairsFeed
from t5x_ssm.data.classification import ClassificationEvaluation, ClassificationFeed, LabelledExamples
from t5x_ssm.data.encoder_decoder import EncoderDecoderObjective
from t5x_ssm.data.evaluation_feeds import EncoderDecoderEvaluation, EvaluationFeed
from t5x_ssm.data.indexed import IndexedRows
from t5x_ssm.data.pairs import INPUTS, TARGETS, PairsEvaluation
from t5x_ssm.data.prefetch import PrefetchedFeed
from t5x_ssm.data.reading import for_the_user
from t5x_ssm.data.sources import Batch
from t5x_ssm.errors import DataError

INPUTS_2 = "inputs2"
CLASSIFICATION, SEQUENCE_TO_SEQUENCE = "classification", "sequence_to_sequence"
# Of a decoder; of an encoder-decoder over a stream of text; of one over tasks with inputs and targets; of a classifier.
OBJECTIVES = ("language_model", *encoder_decoder.OBJECTIVES, SEQUENCE_TO_SEQUENCE, CLASSIFICATION)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to read; T5X's names for T5X's settings.

    Attributes:
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: {'targets': tokens per row}; of an encoder-decoder also {'inputs': …}; of a classifier
        {'inputs': …, 'targets': 1}, and of one of pairs {'inputs2': …} as well.
      split: 'train', 'validation', …
      batch_size: rows per step over all processes.
      shuffle: whether training rows are shuffled; evaluation reads in order and insists on False.
      seed: seed of the shuffling; None takes the run's.
      pack: whether documents inside a row are told apart by segment ids and positions. With source='cache', rows are
        always full windows of the concatenated documents, and pack=False makes each one running text; with
        source='seqio', pack=False gives each document (or piece of one) a padded row of its own, as in T5X. Of pairs of
        inputs and targets, pack=True has as many in a row as fit, and pack=False one, from either source.
      use_cached: whether a live pipeline reads seqio's own offline cache; not for source='cache'.
      module: a module to import for its registrations, when seqio is needed at all. Deprecated in T5X, where gin
        files import modules.
      source: 'cache' (the token cache, made if it is missing) or 'seqio' (the live pipeline).
      cache_dir: where token caches lie, a folder or the URL of a store (gs://…); None means `tasks.cache.default_cache_dir()`.
      objective: 'language_model' for decoders. For encoder-decoders 'span_corruption' or 'prefix_lm' over a token cache
        (see `t5x_ssm.data.encoder_decoder`), or 'sequence_to_sequence' for a task with inputs and targets. For
        classifiers 'classification', of a task whose targets are class ids (see `t5x_ssm.data.classification`).
      noise_density, mean_span_length: part of the tokens that span corruption hides, and tokens in a span on average.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool = True
    seed: int | None = None
    pack: bool = True
    use_cached: bool = False
    module: str | None = None
    source: str = "cache"
    cache_dir: str | os.PathLike | None = None
    objective: str = "language_model"
    noise_density: float = 0.15
    mean_span_length: float = 3.0


def open_feed(
    config: DatasetConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    seed: int = 0,
    prefetch: int = 2,
    barrier: Callable[[], None] | None = None,
) -> PrefetchedFeed:
    """Opens a training feed.

    Args:
      config: what to read.
      process_index: this process; it reads the rows [i, i + 1) * batch_size / process_count of every batch.
      process_count: number of processes that share each batch.
      seed: the run's seed, used where `config.seed` is None.
      prefetch: batches to hold ready.
      barrier: makes all processes wait for each other. With it, process 0 makes a missing cache while the others wait;
        a process that still finds none (its machine has its own disk) makes one as well.

    Raises:
      DataError: for settings that cannot be followed, an unknown task or split, or a damaged cache; the message
        names the setting or the file.
    """
    check_config(config, process_count)
    seed = seed if config.seed is None else config.seed
    if config.source == "seqio":
        from t5x_ssm.data.live import LiveFeed

        return LiveFeed(config, process_index=process_index, process_count=process_count, seed=seed, prefetch=prefetch)
    with for_the_user():
        mixture = _open_cache(config, process_index, process_count, barrier)
    place = {"process_index": process_index, "process_count": process_count, "prefetch": prefetch}
    if config.objective == CLASSIFICATION:
        identity = _identity(mixture, config, seed, config.task_feature_lengths[INPUTS])
        identity["objective"] = CLASSIFICATION
        settings = {"seed": seed, "shuffle": config.shuffle, "batch_size": config.batch_size}
        feed: IndexedRows = ClassificationFeed(mixture, identity, **settings, **place)
    elif _of_pairs(config):
        lengths = dict(config.task_feature_lengths)
        identity = _identity(mixture, config, seed, sum(lengths.values()))
        identity |= {"lengths": lengths, "objective": config.objective}
        settings = {"seed": seed, "shuffle": config.shuffle, "batch_size": config.batch_size, "pack": config.pack}
        encoder = config.objective == SEQUENCE_TO_SEQUENCE
        feed = PairsFeed(mixture, identity, encoder=encoder, **settings, **place)
    else:
        feed = IndexedFeed(mixture, config, seed=seed, **place)
    feed.counts, feed.made_from = mixture.counts, mixture.made_from
    return feed


def open_evaluation(
    config: DatasetConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
) -> dict[str, EvaluationFeed | EncoderDecoderEvaluation | ClassificationEvaluation | PairsEvaluation]:
    """Opens a split for evaluation: one feed per task of the mixture, by the task's name.

    The length may be any, also longer than documents: windows run over document ends. Arguments and errors as in
    `open_feed`; `config.shuffle` must be False, and `config.source` 'cache' but for tasks with inputs and targets.
    """
    check_config(config, process_count)
    if config.shuffle:
        raise DataError("Evaluation reads a split once and in order: set DatasetConfig.shuffle=False for it.")
    if _of_pairs(config) and config.pack:
        raise DataError("Evaluation of pairs gives each a row of its own: set DatasetConfig.pack=False for it.")
    if config.source != "cache":
        if not _of_pairs(config):
            raise DataError(
                "Evaluation reads the token cache, which knows exact byte counts: set DatasetConfig.source='cache'."
            )
        from t5x_ssm.data.live import held_out_pairs

        return held_out_pairs(config, process_index=process_index, process_count=process_count)
    with for_the_user():
        mixture = _open_cache(config, process_index, process_count, barrier)
    place = {"process_index": process_index, "process_count": process_count}
    if _of_pairs(config):
        encoder = config.objective == SEQUENCE_TO_SEQUENCE
        return {
            pairs.task: PairsEvaluation(
                *(pairs.task, mixture.vocabulary, pairs, pairs.lengths, config.batch_size), encoder=encoder, **place
            )
            for pairs in mixture.streams
        }
    if config.objective == CLASSIFICATION:
        return {
            examples.task: ClassificationEvaluation(examples, mixture.vocabulary, config.batch_size, **place)
            for examples in mixture.streams
        }
    if objective := _objective(config, mixture.vocabulary):
        return {
            stream.task: EncoderDecoderEvaluation(stream, objective, config.batch_size, **place)
            for stream in mixture.streams
        }
    return {
        stream.task: EvaluationFeed(
            stream,
            length=config.task_feature_lengths[TARGETS],
            batch_size=config.batch_size,
            segments=config.pack,
            vocabulary=mixture.vocabulary,
            **place,
        )
        for stream in mixture.streams
    }


class IndexedFeed(IndexedRows):
    """Batches of a cached mixture's token streams."""

    def __init__(
        self,
        mixture: sources.CachedMixture,
        config: DatasetConfig,
        *,
        process_index: int,
        process_count: int,
        seed: int,
        prefetch: int,
    ):
        self._objective = _objective(config, mixture.vocabulary)
        length = self._objective.window if self._objective else config.task_feature_lengths[TARGETS]
        identity = _identity(mixture, config, seed, length)
        if self._objective:
            names = ("objective", "noise_density", "mean_span_length")
            identity |= {
                "lengths": dict(config.task_feature_lengths),
                **{name: getattr(config, name) for name in names},
            }
        vocabulary = self._objective.vocabulary if self._objective else mixture.vocabulary
        super().__init__(
            vocabulary,
            identity,
            batch_size=config.batch_size,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
        )
        per_token = [stream.num_bytes / max(len(stream), 1) for stream in mixture.streams]
        # Of the text that training reads, at the mixture's rates.
        if not self._objective:  # Else the targets are not the text.
            self.bytes_per_token = float(np.average(per_token, weights=mixture.rates))
        self._seed = seed
        self._rows = sources.training_rows(mixture, length, seed=seed, shuffle=config.shuffle, segments=config.pack)

    def _row(self, row: int) -> Batch:
        example = self._rows[row]
        if self._objective is None:
            return example
        return self._objective.example(example["decoder_target_tokens"], encoder_decoder.generator(self._seed, row))


def _identity(mixture: sources.CachedMixture, config: DatasetConfig, seed: int, length: int) -> dict[str, Any]:
    """What every row of a cached mixture is a function of."""
    return {
        "kind": "indexed",
        "name": mixture.name,
        "split": config.split,
        "data": mixture.checksum,
        "seed": seed,
        "length": length,
        "batch_size": config.batch_size,
        "shuffle": config.shuffle,
        "pack": config.pack,
    }


def _objective(config: DatasetConfig, vocabulary: Mapping[str, Any]) -> EncoderDecoderObjective | None:
    if config.objective == "language_model":
        return None
    return encoder_decoder.make_objective(
        config.objective,
        config.task_feature_lengths,
        vocabulary,
        noise_density=config.noise_density,
        mean_span_length=config.mean_span_length,
    )


def check_config(config: DatasetConfig, process_count: int) -> None:
    """Raises DataError, naming the setting, where a configuration cannot be followed."""
    if not isinstance(config.task_feature_lengths, Mapping):
        raise DataError(
            f"TASK_FEATURE_LENGTHS must be written {{'{TARGETS}': 512}}, but it is {config.task_feature_lengths!r}."
        )
    lengths = dict(config.task_feature_lengths)
    if TARGETS not in lengths:
        raise DataError(f"TASK_FEATURE_LENGTHS must have a length for {TARGETS!r}, but it is {lengths}.")
    for feature, length in lengths.items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise DataError(f"TASK_FEATURE_LENGTHS[{feature!r}] must be a positive integer, but it is {length!r}.")
    if config.batch_size < 1 or config.batch_size % process_count:
        raise DataError(
            f"BATCH_SIZE must be a positive multiple of the number of processes ({process_count}), but it is "
            f"{config.batch_size}."
        )
    if config.source not in ("cache", "seqio"):
        raise DataError(f"DatasetConfig.source must be 'cache' or 'seqio', but it is {config.source!r}.")
    if config.objective not in OBJECTIVES:
        raise DataError(
            f"DatasetConfig.objective must be one of {', '.join(OBJECTIVES)}, but it is {config.objective!r}."
        )
    if config.objective != "language_model":
        if config.source != "cache" and config.objective != SEQUENCE_TO_SEQUENCE:
            raise DataError(f"DatasetConfig.objective={config.objective!r} needs DatasetConfig.source='cache'.")
        if config.objective == CLASSIFICATION:
            _check_classified(lengths)
        elif set(lengths) != {INPUTS, TARGETS}:
            raise DataError(
                f"TASK_FEATURE_LENGTHS must have lengths for {INPUTS!r} and {TARGETS!r} with DatasetConfig.objective="
                f"{config.objective!r}, but it is {lengths}."
            )
        if config.pack and config.objective != SEQUENCE_TO_SEQUENCE:
            raise DataError(
                f"DatasetConfig.objective={config.objective!r} makes one example of a window: set DatasetConfig.pack=False."
            )
    elif config.source == "cache" and not {TARGETS} <= set(lengths) <= {INPUTS, TARGETS}:
        raise DataError(
            f"The token cache has the feature {TARGETS!r}, or {INPUTS!r} and {TARGETS!r}, but TASK_FEATURE_LENGTHS is {lengths}. "
            "Leave out the others, or set DatasetConfig.source='seqio'."
        )
    if config.source == "cache" and config.use_cached:
        raise DataError(
            "USE_CACHED_TASKS (DatasetConfig.use_cached) means seqio's offline cache, which only source='seqio' reads. "
            "Set it to False: the token cache is used, and made when it is missing."
        )


def _check_classified(lengths: Mapping[str, int]) -> None:
    texts = {name: length for name, length in lengths.items() if name != TARGETS}
    if set(texts) not in ({INPUTS}, {INPUTS, INPUTS_2}) or len(set(texts.values())) > 1 or lengths[TARGETS] != 1:
        raise DataError(
            f"TASK_FEATURE_LENGTHS must be {{'{INPUTS}': length, '{TARGETS}': 1}} with DatasetConfig.objective="
            f"{CLASSIFICATION!r}, and for pairs have the same length for {INPUTS_2!r}, but it is {dict(lengths)}."
        )


def check_classes(vocabulary: Mapping[str, Any], num_classes: int | None) -> None:
    """Raises DataError if data of this vocabulary does not fit a classifier of so many classes, or no classifier (None)."""
    found = vocabulary.get("classes")
    if (found is None) != (num_classes is None):
        what = (
            "has no classes, and the model is a classifier" if found is None else "is classified, and the model is not"
        )
        raise DataError(f"The data {what}; DatasetConfig.objective and the model's objective must belong together.")
    if found is not None and found > num_classes:
        raise DataError(f"The data has {found} classes, more than the model's num_classes = {num_classes}.")


def check_vocabulary(
    vocabulary: Mapping[str, Any], *, embedding_size: int | None = None, expected_hash: str | None = None
) -> None:
    """Raises DataError if data of this vocabulary does not fit a model or a checkpoint.

    Args:
      vocabulary: a feed's `vocabulary`.
      embedding_size: rows of the model's embedding table; it may be larger than the vocabulary (padded).
      expected_hash: the vocabulary hash that a checkpoint was trained with.
    """
    what = f"The data's vocabulary ({vocabulary['name']}, {vocabulary['size']} ids)"
    if embedding_size is not None and vocabulary["size"] > embedding_size:
        raise DataError(f"{what} has more ids than the model's vocabulary size {embedding_size}; raise the latter.")
    if expected_hash is not None and vocabulary["hash"] != expected_hash:
        raise DataError(
            f"{what} is not the one that the checkpoint was trained with (hash {vocabulary['hash']}, expected "
            f"{expected_hash}): its token ids would mean other text. Use the task's original vocabulary."
        )


def _open_cache(
    config: DatasetConfig, process_index: int, process_count: int, barrier: Callable[[], None] | None
) -> sources.CachedMixture:
    place = {"process_index": process_index, "process_count": process_count, "barrier": barrier}
    path = made_cache.find_or_make(config.mixture_or_task_name, config.cache_dir, config.module, **place)
    lengths = config.task_feature_lengths
    if _of_pairs(config):
        open_pairs = functools.partial(CachedPairs, lengths=lengths)
        return sources.CachedMixture(path, config.split, open_stream=open_pairs)
    if config.objective != CLASSIFICATION:
        return sources.CachedMixture(path, config.split)
    open_examples = functools.partial(LabelledExamples, length=lengths[INPUTS])
    mixture = sources.CachedMixture(path, config.split, open_stream=open_examples)
    for examples in mixture.streams:
        if examples.pairs != (INPUTS_2 in lengths):
            wanted = "pairs" if examples.pairs else "single sequences"
            raise DataError(
                f"The examples of {examples.task!r} are {wanted}, but TASK_FEATURE_LENGTHS is {dict(lengths)}."
            )
    return mixture


def _of_pairs(config: DatasetConfig) -> bool:
    """Whether the examples are an input and a target text each."""
    of_decoder = config.objective == "language_model" and INPUTS in config.task_feature_lengths
    return of_decoder or config.objective == SEQUENCE_TO_SEQUENCE
