"""How likely a network finds given text: whole batches at once, or documents of any length in bounded memory.

`score_batch` runs the network as training does, on a batch with seqio's feature names. `DocumentScorer` reads documents
in windows of fixed size and carries the state from one to the next, so every token is predicted from everything before
it, and neither memory nor the executable depends on the length (full attention, which holds all of it, excepted).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from t5x_ssm.errors import UserError
from t5x_ssm.inference.decoding import BOS, advance, cache_grows, init_cache
from t5x_ssm.models.objectives import cross_entropy

Array = jax.Array


class Scores(NamedTuple):
    """Of each row, over the tokens that count.

    Attributes:
      log_likelihood: float32 [B], the sum of log p(token | all before), nats.
      tokens: float32 [B], the sum of the tokens' weights.
      greedy: bool [B], whether every token that counts is the most likely one: greedy decoding would write them.
    """

    log_likelihood: Any
    tokens: Any
    greedy: Any


class HasLogits(Protocol):
    """What `score_batch` needs of an objective (`models.objectives.LanguageModel`)."""

    def logits(self, params: Any, batch: dict[str, Array]) -> Array:
        """float32 [B, L, V]."""


def score_batch(objective: HasLogits, params: Any, batch: dict[str, Array]) -> Scores:
    """Log-likelihood of each row's targets where they have loss weight: those after a prompt, if so weighted.

    Args:
      objective: gives the logits.
      params: the parameters.
      batch: `decoder_input_tokens`, `decoder_target_tokens`, `decoder_loss_weights` [B, L], and what else it takes.
    """
    logits = objective.logits(params, batch)
    return _scores(logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"])


def _scores(logits: Array, targets: Array, weights: Array) -> Scores:
    weights = weights.astype(jnp.float32)
    _, nats, _ = cross_entropy(logits, targets)
    likeliest = jnp.argmax(logits, axis=-1) == targets
    return Scores(
        # Where nothing counts the logits may be anything; 0 times infinity would be a NaN.
        -jnp.sum(jnp.where(weights > 0, nats * weights, 0), axis=-1),
        jnp.sum(weights, axis=-1),
        jnp.all(likeliest | (weights <= 0), axis=-1),
    )


class DocumentScorer:
    """Scores documents of any length, a window at a time; see the module docstring."""

    def __init__(self, network: nn.Module, params: Any, *, window: int = 1024):
        """Makes a scorer.

        Args:
          network: a module under T5X's decoder-only signature.
          params: its parameters.
          window: tokens read at a time; memory follows it, the result does not.
        """
        if window < 1:
            raise ValueError(f"window = {window}; it must be at least 1.")
        self.network, self.params, self.window = network, params, window
        self._grows = cache_grows(network, params)
        self._init_cache = jax.jit(
            lambda params, batch, length: init_cache(network, params, batch, length), static_argnums=(1, 2)
        )
        self.read_window = jax.jit(self._read_window, donate_argnames="cache")

    def _read_window(self, params, cache, inputs, targets, counts):
        logits, cache = advance(self.network, params, cache, inputs, counts, prefill=True)
        real = jnp.arange(self.window) < counts[:, None]
        _, nats, _ = cross_entropy(logits, targets)
        likeliest = jnp.argmax(logits, axis=-1) == targets
        return cache, jnp.where(real, nats, 0), likeliest & real

    def windows(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Costs of every token, window after window.

        Args:
          tokens: int [B, L], anything that slices like an array (a memory map is read as it is needed); row b is a
            document of its first lengths[b] tokens. Each begins with the network's BOS, which is not among them.
          lengths: int [B]; all L when None.

        Yields:
          (nats float32 [B, W], likeliest bool [B, W]) of the next W tokens, W the window or what is left; 0 and False
          beyond a row's length.

        Raises:
          UserError: a token is not in the network's vocabulary.
        """
        batch, length = tokens.shape
        lengths = np.full((batch,), length) if lengths is None else np.asarray(lengths)
        if lengths.shape != (batch,) or lengths.min(initial=0) < 0 or lengths.max(initial=0) > length:
            raise ValueError(f"lengths {lengths} do not fit tokens of shape {tokens.shape}.")
        longest = int(lengths.max(initial=0))
        if longest == 0:
            return
        # A whole number of windows, so that documents of similar length share the executables.
        capacity = -(-longest // self.window) * self.window
        cache = self._init_cache(self.params, batch, capacity if self._grows else 1)
        previous = np.full((batch, 1), BOS, np.int32)
        for begin in range(0, longest, self.window):
            targets = np.asarray(tokens[:, begin : begin + self.window], np.int32)
            counts = np.clip(lengths - begin, 0, targets.shape[1]).astype(np.int32)
            targets = np.where(np.arange(targets.shape[1]) < counts[:, None], targets, 0)
            self._check(targets)
            inputs = np.concatenate([previous, targets[:, :-1]], axis=1)
            previous = targets[:, -1:]
            pad = [(0, 0), (0, self.window - targets.shape[1])]
            cache, nats, likeliest = self.read_window(
                self.params, cache, np.pad(inputs, pad), np.pad(targets, pad), counts
            )
            width = min(self.window, longest - begin)
            yield np.asarray(nats)[:, :width], np.asarray(likeliest)[:, :width]

    def score(self, tokens: np.ndarray, lengths: np.ndarray | None = None, first: np.ndarray | None = None) -> Scores:
        """Log-likelihood of documents, or of their ends.

        Args:
          tokens, lengths: as in `windows`.
          first: int [B], the first token of each row that counts: what is before it is the prompt; 0 when None.

        Returns:
          Scores of NumPy arrays, summed in float64.
        """
        batch = tokens.shape[0]
        lengths = np.full((batch,), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        first = np.zeros((batch,), np.int64) if first is None else np.asarray(first)
        nats, missed = np.zeros(batch), np.zeros(batch, bool)
        begin = 0
        for window_nats, likeliest in self.windows(tokens, lengths):
            index = begin + np.arange(window_nats.shape[1])
            counts = (index >= first[:, None]) & (index < lengths[:, None])
            nats += np.where(counts, window_nats, 0).sum(axis=1, dtype=np.float64)
            missed |= (counts & ~likeliest).any(axis=1)
            begin += window_nats.shape[1]
        return Scores(-nats, np.maximum(lengths - first, 0).astype(np.float32), ~missed)

    def _check(self, tokens: np.ndarray) -> None:
        vocab = getattr(self.network, "vocab_size", None)
        if vocab is not None and tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise UserError(
                f"Tokens from {tokens.min()} to {tokens.max()} do not fit the network's vocabulary of {vocab}."
            )
