"""Objectives of encoder-decoders over a token stream: span corruption and prefix language modelling.

A window of the stream becomes an example of an encoder-decoder, by a random generator of its own: what row r holds is a
function of the seed and r, as everything in this folder.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_ssm.data.token_stream import Batch
from t5x_ssm.errors import DataError

OBJECTIVES = ("span_corruption", "prefix_lm")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderObjective:
    """How a window of the stream becomes an example.

    Attributes:
      name: 'span_corruption' (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): spans of the window are replaced by
        sentinels in the encoder's input, and the decoder predicts sentinels and spans; both end with end-of-text.
        'prefix_lm': the encoder reads the beginning, the decoder predicts the rest.
      inputs_length, targets_length: lengths of the arrays.
      window: tokens of the stream in an example.
      vocabulary: description of the vocabulary, sentinels included.
      noise_density, mean_span_length: of span corruption.
    """

    name: str
    inputs_length: int
    targets_length: int
    window: int
    vocabulary: Mapping[str, Any]
    noise_density: float
    mean_span_length: float

    def example(self, tokens: np.ndarray, rng: np.random.Generator) -> Batch:
        """An example of a window.

        Args:
          tokens: int [window].
          rng: where the spans are comes from it.

        Returns:
          int32 arrays under the names of seqio's encoder-decoder feature converter, unpacked: encoder_input_tokens
          [inputs_length], decoder_input_tokens, decoder_target_tokens and decoder_loss_weights [targets_length].
        """
        if self.name == "prefix_lm":
            inputs, targets = tokens[: self.inputs_length], tokens[self.inputs_length :]
        else:
            inputs, targets = self._corrupt(tokens, rng)
        encoder = np.zeros(self.inputs_length, np.int32)
        encoder[: len(inputs)] = inputs
        decoder = np.zeros((3, self.targets_length), np.int32)
        decoder[0, 1 : len(targets)] = targets[:-1]
        decoder[1, : len(targets)] = targets
        decoder[2, : len(targets)] = 1
        return {
            "encoder_input_tokens": encoder,
            "decoder_input_tokens": decoder[0],
            "decoder_target_tokens": decoder[1],
            "decoder_loss_weights": decoder[2],
        }

    def _corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        noise, spans = noise_tokens_and_spans(self.window, self.noise_density, self.mean_span_length)
        kept = np.cumsum(_random_parts(self.window - noise, spans, rng))
        hidden = np.cumsum(_random_parts(noise, spans, rng))
        inputs, targets = [], []
        begin = 0
        for span in range(spans):
            sentinel = self.vocabulary["size"] - 1 - span
            start = int(kept[span]) + (int(hidden[span - 1]) if span else 0)
            end = int(kept[span] + hidden[span])
            inputs += [*tokens[begin:start], sentinel]
            targets += [sentinel, *tokens[start:end]]
            begin = end
        end_of_text = self.vocabulary["eos_id"]
        return [*inputs, end_of_text], [*targets, end_of_text]


def make_objective(
    name: str,
    lengths: Mapping[str, int],
    vocabulary: Mapping[str, Any],
    *,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> EncoderDecoderObjective:
    """The objective for arrays of these lengths.

    Span corruption takes the longest window whose inputs fit, so that inputs of 512 tokens read 568 and have 114 targets
    at the published density. Its sentinels are the last ids of the vocabulary; one without extra ids gets as many on top as
    are needed, which the model's vocabulary has to have room for.

    Raises:
      DataError: naming the setting: lengths, density or span length that cannot be, too few sentinels, a vocabulary
        without padding or end-of-text.
    """
    if vocabulary["pad_id"] is None or vocabulary["eos_id"] is None:
        raise DataError(
            f"DatasetConfig.objective={name!r} needs a vocabulary with padding and an end of text; {vocabulary['name']} "
            "has not both."
        )
    inputs, targets = lengths["inputs"], lengths["targets"]
    if name == "prefix_lm":
        settings = (noise_density, mean_span_length)
        return EncoderDecoderObjective(name, inputs, targets, inputs + targets, vocabulary, *settings)
    if not 0 < noise_density < 1 or not mean_span_length >= 1:
        raise DataError(
            f"DatasetConfig.noise_density must lie between 0 and 1 and mean_span_length be at least 1, but they are "
            f"{noise_density} and {mean_span_length}."
        )
    window = 0
    for longer in itertools.count(2):
        noise, spans = noise_tokens_and_spans(longer, noise_density, mean_span_length)
        if longer - noise + spans + 1 > inputs:
            break
        window, needed, sentinels = longer, noise + spans + 1, spans
    if not window:
        raise DataError(f"TASK_FEATURE_LENGTHS['inputs'] = {inputs} is too short for span corruption.")
    if targets < needed:
        raise DataError(
            f"TASK_FEATURE_LENGTHS['targets'] = {targets} is too short: span corruption of {inputs} inputs has {needed} "
            "targets."
        )
    extra = vocabulary["extra_ids"]
    if extra and extra < sentinels:
        raise DataError(
            f"The vocabulary {vocabulary['name']} has {extra} extra ids, fewer than the {sentinels} spans of "
            f"TASK_FEATURE_LENGTHS['inputs'] = {inputs}; raise DatasetConfig.mean_span_length, or use shorter inputs."
        )
    if not extra:
        vocabulary = {**vocabulary, "size": vocabulary["size"] + sentinels}
    return EncoderDecoderObjective(name, inputs, targets, window, vocabulary, noise_density, mean_span_length)


def generator(seed: int, row: int) -> np.random.Generator:
    """The random generator of row r of a run."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, row]))


def noise_tokens_and_spans(length: int, density: float, mean_span_length: float) -> tuple[int, int]:
    """How many of `length` ≥ 2 tokens are hidden, and in how many spans; both at least 1, a token stays between spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span_length), 1), noise, length - noise)


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """int [parts], positive, adding up to `total`; all such are equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
