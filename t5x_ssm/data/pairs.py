"""Pairs of an input and a target text: a held-out split of them once, in order, and how many texts of a batch were cut.

What the rows of an encoder-decoder and of a decoder look like is said by seqio's feature converters, whose names these arrays
have. A decoder reads the inputs as the beginning of its text and has loss on the targets alone (prefix language modelling,
causal).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_ssm.data.evaluation_feeds import RowsInOrder
from t5x_ssm.data.token_stream import Batch
from t5x_ssm.errors import DataError

INPUTS, TARGETS = "inputs", "targets"
# Ids of an input and of a target, int [n] and [m].
Pair = tuple[np.ndarray, np.ndarray]


class PairsEvaluation(RowsInOrder):
    """Every pair of a split once, in order, a row each; the last batch is padded with rows of loss weight 0."""

    def __init__(
        self,
        task: str,
        vocabulary: dict[str, Any],
        pairs: Sequence[Pair],
        lengths: Mapping[str, int],
        batch_size: int,
        *,
        encoder: bool,
        **place: int,
    ):
        """
        Args:
          task: its name.
          vocabulary: description of the vocabulary.
          pairs: every example, no longer than `lengths`.
          lengths: of `inputs` and `targets`.
          batch_size: rows over all processes.
          encoder: whether inputs are an encoder's, or the beginning of the decoder's text.
          **place: process_index and process_count.

        Raises:
          DataError: there are no pairs.
        """
        if not pairs:
            raise DataError(f"{task!r} has no examples in this split; there is nothing to evaluate.")
        super().__init__(task, vocabulary, len(pairs), batch_size, **place)
        self._pairs, self._lengths, self._encoder = pairs, dict(lengths), encoder

    def _row(self, row: int) -> Batch:
        taken = [self._pairs[row]] if row < len(self._pairs) else []
        return pair_row(taken, self._lengths, encoder=self._encoder, packed=False)


def pair_row(pairs: Sequence[Pair], lengths: Mapping[str, int], *, encoder: bool, packed: bool) -> Batch:
    """Pairs, one after the other, as a row.

    Args:
      pairs: they fit together.
      lengths: of `inputs` and `targets`; a decoder's row is as long as both.
      encoder: whether inputs are an encoder's, or the beginning of the decoder's text.
      packed: whether segment ids, counted from 1, and positions tell the pairs apart.

    Returns:
      int32 arrays under the names of seqio's encoder-decoder or prefix-LM feature converter, [inputs] of the encoder and
      [targets] of the decoder, or [inputs + targets]; padded with zeros.
    """
    before = [np.zeros(0, np.int32) if encoder else inputs for inputs, _ in pairs]
    texts = [np.concatenate([own, targets]) for own, (_, targets) in zip(before, pairs, strict=True)]
    length = lengths[TARGETS] + (0 if encoder else lengths[INPUTS])
    row = _joined(texts, length)
    shifted = np.concatenate([[0], row[:-1]], dtype=np.int32)
    if packed:  # As seqio has it: 0 before each text, and after the last one no token of it.
        shifted = _joined([np.concatenate([[0], text])[: len(text)] for text in texts], length)
    weights = [np.arange(len(text)) >= len(own) for own, text in zip(before, texts, strict=True)]
    example = {
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": row,
        "decoder_loss_weights": _joined(weights, length),
    }
    if packed:
        example |= _places(texts, length, "decoder")
    if encoder:
        read = [inputs for inputs, _ in pairs]
        example["encoder_input_tokens"] = _joined(read, lengths[INPUTS])
        if packed:
            example |= _places(read, lengths[INPUTS], "encoder")
    return example


def _places(texts: Sequence[np.ndarray], length: int, side: str) -> Batch:
    segments = [np.full(len(text), number) for number, text in enumerate(texts, 1)]
    positions = [np.arange(len(text)) for text in texts]
    return {f"{side}_segment_ids": _joined(segments, length), f"{side}_positions": _joined(positions, length)}


def _joined(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The parts one after the other, padded with zeros: int32 [length]."""
    row, at = np.zeros(length, np.int32), 0
    for part in parts:
        row[at : at + len(part)] = part
        at += len(part)
    return row


def cut_texts(batch: Batch, eos_ids: Mapping[str, int | None]) -> dict[str, int]:
    """How many inputs and targets of a batch of pairs do not end with the end of text: they were cut to their length.

    Args:
      batch: of seqio's encoder-decoder or prefix-LM feature converter, packed or not.
      eos_ids: the end of `inputs` and of `targets`; None where the task's texts have none, which are not counted.

    Returns:
      `cut_inputs` and `cut_targets`.
    """
    weights, tokens = batch["decoder_loss_weights"] > 0, batch["decoder_target_tokens"]
    segments = batch.get("decoder_segment_ids", np.ones_like(tokens))
    ends = {TARGETS: (tokens, weights & ~_continues(weights, segments))}
    if "encoder_input_tokens" in batch:
        read = batch["encoder_input_tokens"]
        real = read > 0
        ends[INPUTS] = (read, real & ~_continues(real, batch.get("encoder_segment_ids", np.ones_like(read))))
    else:
        # The last token without loss before one with loss.
        ends[INPUTS] = (tokens, ~weights & _continues(weights, segments))
    return {
        f"cut_{name}": int(np.sum(is_end & (ids != eos_ids[name])))
        for name, (ids, is_end) in sorted(ends.items())
        if eos_ids.get(name) is not None
    }


def _continues(real: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Whether the next position is real and of the same segment, bool [B, L]."""
    following = np.zeros_like(real)
    following[:, :-1] = real[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    return following
