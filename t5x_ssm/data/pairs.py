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


class PairsEvaluation(RowsInOrder):
    """Every pair of a split once, in order, a row each; the last batch is padded with rows of loss weight 0."""

    def __init__(
        self,
        task: str,
        vocabulary: dict[str, Any],
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
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
          pairs: (inputs, targets) ids of every example, no longer than `lengths`; in memory.
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
        nothing = np.zeros(0, np.int32)
        inputs, targets = self._pairs[row] if row < len(self._pairs) else (nothing, nothing)
        before = nothing if self._encoder else inputs
        length = self._lengths[TARGETS] + (0 if self._encoder else self._lengths[INPUTS])
        text = _padded(np.concatenate([before, targets]), length)
        example = {
            "decoder_input_tokens": np.concatenate([[0], text[:-1]], dtype=np.int32),
            "decoder_target_tokens": text,
            "decoder_loss_weights": _padded(np.repeat([0, 1], [len(before), len(targets)]), length),
        }
        if self._encoder:
            example["encoder_input_tokens"] = _padded(inputs, self._lengths[INPUTS])
        return example


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    row = np.zeros(length, np.int32)
    row[: len(values)] = values
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
