"""Beam search: the likeliest whole texts that continue each row, as far as a few beams find them.

A row keeps `beams` texts that may go on and the `beams` best texts that have ended. Every step continues the former by every
token and keeps the likeliest; those that end are ranked by

    log p(text) / ((5 + tokens) / 6)^length_penalty          Wu et al. 2016 (1609.08144), equation 14, as in T5X

over the tokens written, the end included. A row is done when no text that goes on can rank before those that have ended. Texts
that were cut off at the limit are ranked behind all that ended, as in T5X, by the same score.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from t5x_ssm.errors import UserError
from t5x_ssm.inference.decoding import NO_TOKEN, PAD, DecodeState, Generator, advance
from t5x_ssm.inference.sampling import GREEDY, Sampling, allowed

Array = jax.Array


class Beams(NamedTuple):
    """The texts found for each row, best first.

    Attributes:
      tokens: int32 [B, K, T], `PAD` after a text's end.
      scores: float32 [B, K], log p over the length's penalty; -infinity where there are fewer texts.
      ended: bool [B, K], whether the text ends with EOS; the others were cut off.
    """

    tokens: np.ndarray
    scores: np.ndarray
    ended: np.ndarray


class _Search(struct.PyTreeNode):
    """A search after some steps.

    Attributes:
      state: of the B·K texts that may go on, row by row.
      going: their tokens, int32 [B, K, T].
      log_p: of these texts, float32 [B, K]; -infinity where there is none.
      ended, scores: the texts that have ended and their scores, as `going` and `log_p`.
      steps: how many were made.
      finite: whether all logits were.
    """

    state: DecodeState
    going: Array
    log_p: Array
    ended: Array
    scores: Array
    steps: Array
    finite: Array


class BeamSearcher:
    """Searches with one network.

    Attributes:
      generator: whose network and parameters it searches with.
    """

    def __init__(self, generator: Generator):
        self.generator = generator
        self._run = jax.jit(self._search, static_argnames=("beams", "limit", "sampling"))

    def with_params(self, params: Any) -> "BeamSearcher":
        """The same with other parameters of the same shapes; the executable is shared."""
        other = copy.copy(self)
        other.generator = self.generator.with_params(params)
        return other

    def search(
        self,
        state: DecodeState,
        max_new_tokens: int,
        beams: int,
        *,
        length_penalty: float = 0.6,
        sampling: Sampling = GREEDY,
        eos_id: int | None = 1,
    ) -> Beams:
        """Continues every row, whose texts do not depend on the rows beside it.

        Args:
          state: the texts so far, [B]; it stays as it is.
          max_new_tokens: T, where texts are cut off.
          beams: K.
          length_penalty: the exponent; 0 ranks by log p, larger ones favour long texts.
          sampling: its forbidden ids and size of the vocabulary are heeded; probabilities are the network's own, not what
            they become without these ids.
          eos_id: ends a text; None never ends one.

        Raises:
          UserError: a setting is out of range or has no meaning for beams; the capacity does not suffice; the logits are
            not finite.
        """
        check_settings(beams, length_penalty, sampling)
        generator = self.generator
        rows = state.token.shape[0]
        generator.check_capacity(state, np.full(rows, max_new_tokens))
        found = self._run(
            generator.params,
            generator.copy(state, np.repeat(np.arange(rows), beams)),
            np.int32(NO_TOKEN if eos_id is None else eos_id),
            np.float32(length_penalty),
            beams=beams,
            limit=max_new_tokens,
            sampling=sampling,
        )
        *found, finite = jax.tree.map(np.asarray, found)
        if not finite:
            raise UserError("The network's logits are not finite: the checkpoint's parameters have diverged.")
        return Beams(*found)

    def _search(self, params, state, eos_id, length_penalty, *, beams: int, limit: int, sampling: Sampling):
        rows = state.token.shape[0] // beams
        nothing = jnp.full((rows, beams), -jnp.inf)
        texts = jnp.full((rows, beams, limit), PAD, jnp.int32)
        # All beams of a row begin as the same text, which counts once.
        start = _Search(state, texts, nothing.at[:, 0].set(0), texts, nothing, jnp.int32(0), jnp.bool_(True))

        def penalty(tokens):
            return ((5.0 + tokens) / 6.0) ** length_penalty

        def undecided(search: _Search):
            # Log p only falls, and no text is longer than the limit.
            reachable = jnp.max(search.log_p, axis=1) / penalty(limit)
            return (search.steps < limit) & search.finite & jnp.any(reachable > jnp.min(search.scores, axis=1))

        def step(search: _Search):
            ones = jnp.ones_like(search.state.token)
            logits, cache = advance(
                self.generator.network, params, search.state.cache, search.state.token[:, None], ones, decode=True
            )
            logits = logits[:, 0].astype(jnp.float32)
            vocab = logits.shape[-1]
            log_p = jnp.where(jnp.isfinite(allowed(logits, sampling)), jax.nn.log_softmax(logits), -jnp.inf)
            longer = search.log_p[..., None] + log_p.reshape(rows, beams, vocab)
            # At most one continuation of a beam ends it, so 2 K of them hold K that go on.
            wanted = min(2 * beams, beams * vocab)
            best, index = jax.lax.top_k(longer.reshape(rows, beams * vocab), wanted)
            parent, token = index // vocab, (index % vocab).astype(jnp.int32)
            written = _take(search.going, parent).at[:, :, search.steps].set(token)

            ends = token == eos_id
            scores = jnp.where(ends, best / penalty(search.steps + 1), -jnp.inf)
            ended, scores = _best(
                jnp.concatenate([search.ended, written], axis=1),
                jnp.concatenate([search.scores, scores], axis=1),
                beams,
            )
            best, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), beams)
            parent = (jnp.arange(rows)[:, None] * beams + _take(parent, kept)).reshape(-1)
            axis = self.generator.batch_axis
            state = DecodeState(
                jax.tree.map(lambda leaf: jnp.take(leaf, parent, axis=axis), cache),
                token=_take(token, kept).reshape(-1),
                consumed=jnp.take(search.state.consumed, parent) + 1,
                capacity=search.state.capacity,
            )
            alive = jnp.isfinite(search.log_p)
            finite = jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)).reshape(rows, beams) | ~alive)
            return _Search(state, _take(written, kept), best, ended, scores, search.steps + 1, search.finite & finite)

        last = jax.lax.while_loop(undecided, step, start)
        # Behind the texts that ended stand those that did not. Where the search stopped before the limit, there are none.
        rank = jnp.arange(beams) - jnp.sum(jnp.isfinite(last.scores), axis=1, keepdims=True)
        has_ended, behind = rank < 0, jnp.maximum(rank, 0)
        scores = jnp.where(has_ended, last.scores, _take(last.log_p, behind) / penalty(limit))
        texts = jnp.where(has_ended[..., None], last.ended, _take(last.going, behind))
        return jnp.where(jnp.isfinite(scores)[..., None], texts, PAD), scores, has_ended, last.finite


def check_settings(beams: int, length_penalty: float, sampling: Sampling) -> None:
    """Raises UserError for settings of a search that are out of range, or that only random draws have."""
    if beams < 1:
        raise UserError(f"beams = {beams}; it must be at least 1.")
    if not 0 <= length_penalty < float("inf"):
        raise UserError(f"length_penalty = {length_penalty}; it is 0 or a positive number.")
    if not sampling.greedy or sampling.top_p < 1 or sampling.top_k:
        raise UserError(
            f"beams = {beams} search for the likeliest text and draw nothing: leave temperature, top_k and top_p at "
            "their defaults, or beams at 1."
        )


def _take(values: Array, index: Array) -> Array:
    """values[b, index[b, i], …]."""
    return jnp.take_along_axis(values, index.reshape(index.shape + (1,) * (values.ndim - 2)), axis=1)


def _best(texts: Array, scores: Array, count: int) -> tuple[Array, Array]:
    """The texts of the highest scores, best first; of equal ones the earlier."""
    scores, index = jax.lax.top_k(scores, count)
    return _take(texts, index), scores
