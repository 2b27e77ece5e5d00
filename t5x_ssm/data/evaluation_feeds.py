"""Feeds that end: a split for evaluation, once and in order.

That of a decoder holds each token once and knows how many bytes of text they stand for, so that bits per byte = nats / ln 2
/ bytes; and, where the corpus is one whose words were published, how many words, so that perplexity per word =
exp(nats / words).
"""

import abc
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_ssm.data import encoder_decoder, sources
from t5x_ssm.data.encoder_decoder import EncoderDecoderObjective
from t5x_ssm.data.token_stream import Batch, TokenStream
from t5x_ssm.errors import DataError


class RowsInOrder(abc.ABC):
    """Each row of a split once, in order, as batches of batch_size / process_count rows; iterate it as often as you like.

    Every process sees the same number of batches.

    Attributes:
      task: the task's name.
      num_batches: number of batches.
      vocabulary: description of the vocabulary.
    """

    def __init__(
        self,
        task: str,
        vocabulary: dict[str, Any],
        num_rows: int,
        batch_size: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.task, self.vocabulary = task, vocabulary
        self._batch_size = batch_size
        local = batch_size // process_count
        self._local_rows = range(process_index * local, (process_index + 1) * local)
        self.num_batches = -(-num_rows // batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.num_batches):
            yield sources.stack([self._row(step * self._batch_size + row) for row in self._local_rows])

    @abc.abstractmethod
    def _row(self, row: int) -> Batch:
        """Row `row` of the split; beyond its end one of loss weight 0."""


class EvaluationFeed(RowsInOrder):
    """Each token of a stream once, in windows of one length.

    The last window and the last batch are padded; padding has loss weight 0.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        length: int,
        batch_size: int,
        segments: bool,
        vocabulary: dict[str, Any],
        **place: int,
    ):
        if len(stream) == 0:
            raise DataError(f"{stream.task!r} has no tokens in this split; there is nothing to evaluate.")
        super().__init__(stream.task, vocabulary, -(-len(stream) // length), batch_size, **place)
        self._stream, self._length, self._segments = stream, length, segments

    def num_tokens(self, batches: int | None = None) -> int:
        """Tokens (the sum of the loss weights over all processes) of the first `batches` batches, of all if None."""
        batches = self.num_batches if batches is None else batches
        return min(batches * self._batch_size * self._length, len(self._stream))

    @property
    def num_words(self) -> int | None:
        """Words of the split as its publishers count them; None where they are not known."""
        return self._stream.num_words

    def num_bytes(self, batches: int | None = None) -> int:
        """Bytes of text that those tokens stand for; exact for the whole split, and otherwise to the document that
        the last batch ends in, whose bytes are shared out evenly over its tokens."""
        return int(self._stream.bytes_before([self.num_tokens(batches)])[0])

    def _row(self, row: int) -> Batch:
        end = len(self._stream)
        start, stop = min(row * self._length, end), min((row + 1) * self._length, end)
        return self._stream.window(start, stop, self._length, segments=self._segments)


class EncoderDecoderEvaluation(RowsInOrder):
    """The whole windows of a stream as examples of an encoder-decoder, in order, the same ones every time.

    The last tokens, fewer than a window, are left out; the last batch is padded with rows of loss weight 0.
    """

    def __init__(self, stream: TokenStream, objective: EncoderDecoderObjective, batch_size: int, **place: int):
        self._windows = sources.WindowSource(stream, objective.window, segments=False)
        self._objective = objective
        super().__init__(stream.task, objective.vocabulary, len(self._windows), batch_size, **place)

    def _row(self, row: int) -> Batch:
        beyond = row >= len(self._windows)
        tokens = self._windows[0 if beyond else row]["decoder_target_tokens"]
        example = self._objective.example(tokens, encoder_decoder.generator(0, row))
        return {name: np.zeros_like(value) for name, value in example.items()} if beyond else example
