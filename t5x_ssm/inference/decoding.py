"""Writing text with a trained network: a prompt is read in pieces of fixed size, then tokens come one at a time.

What is fed is what training fed: the text shifted right by one, so a row's tokens p0 … p(n-1) enter the network as
0, p0, … p(n-2), and p(n-1) is consumed by the first step, whose logits choose the next token. A `DecodeState` therefore
is a cache together with the newest token, which the cache has not seen yet; a fresh state's newest token is the 0 that
begins every document. Reading a prompt, drawing tokens and reading the next turn's prompt all go from state to state.

Nothing here depends on the length of a text: neither the shapes of the two executables (read a piece, make steps) nor,
for networks without full attention, the memory. A network with full attention holds every token, and its capacity is
chosen when its state is made.
"""

import collections
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from t5x_ssm.errors import UserError
from t5x_ssm.inference import sampling as sampling_lib
from t5x_ssm.inference.sampling import GREEDY, Sampling

Array = jax.Array
Cache = Any

BOS = 0
# What a row yields after its end. It is not a token: `Sampling` forbids it unless told otherwise.
PAD = 0
# Signs among drawn tokens: of logits that are not finite, and an id that no row ever draws.
NOT_FINITE = -1
NO_TOKEN = -2


class DecodeState(struct.PyTreeNode):
    """A batch of texts, as far as they have been read and written.

    Attributes:
      cache: the network's cache, batch axis as `Generator.batch_axis`.
      token: int32 [B], the newest token of each row, which the cache has not consumed.
      consumed: int32 [B], how many tokens the cache has consumed, the leading 0 included.
      capacity: how many tokens the cache can hold, None if any number.
    """

    cache: Cache
    token: Array
    consumed: Array
    capacity: int | None = struct.field(pytree_node=False, default=None)


def init_cache(network: nn.Module, params: Any, batch: int, max_length: int) -> Cache:
    """A cache that has consumed nothing.

    Args:
      network: a module under T5X's decoder-only signature.
      params: its parameters (only their shapes matter).
      batch: number of rows.
      max_length: how many tokens the caches of full attention are to hold. The others have a size of their own.
    """
    tokens = jnp.zeros((batch, max_length), jnp.int32)
    _, variables = network.apply(
        {"params": params}, tokens, tokens, enable_dropout=False, decode=True, mutable=["cache"]
    )
    return variables["cache"]


def cache_shapes(network: nn.Module, params: Any, batch: int, max_length: int) -> Cache:
    """The shapes and types of `init_cache`, without making it."""
    return jax.eval_shape(lambda params: init_cache(network, params, batch, max_length), params)


def cache_grows(network: nn.Module, params: Any) -> bool:
    """Whether the cache's size depends on the length of the text, as with full attention."""
    short, long = (jax.tree.leaves(cache_shapes(network, params, 1, length)) for length in (1, 2))
    return any(a.shape != b.shape for a, b in zip(short, long, strict=True))


def advance(network: nn.Module, params: Any, cache: Cache, tokens: Array, counts: Array, **mode) -> tuple[Array, Cache]:
    """Feeds tokens to a cache.

    Args:
      network, params: the module and its parameters.
      cache: what the rows have consumed so far.
      tokens: int [B, L].
      counts: int [B], how many of its tokens each row consumes.
      **mode: prefill=True for any L, or decode=True for L = 1.

    Returns:
      (logits float32 [B, L, V], of use in a row's first counts[b] positions; the cache after them).
    """
    logits, variables = network.apply(
        {"params": params, "cache": cache},
        tokens,
        tokens,
        enable_dropout=False,
        prefill_lengths=counts,
        mutable=["cache"],
        **mode,
    )
    return logits, variables["cache"]


def row_keys(seeds: int | Sequence[int], batch: int) -> Array:
    """One random key a row: from one seed a row, or from one seed that row b shifts by b."""
    seeds = np.asarray(seeds, np.int64)
    if seeds.ndim == 0:
        seeds = seeds + np.arange(batch)
    if seeds.shape != (batch,):
        raise ValueError(f"seeds have shape {seeds.shape}; give one, or one for each of the {batch} rows.")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds % 2**32, jnp.uint32))


class Generator:
    """Reads prompts into, and draws tokens from, states of one network.

    Every method that takes a `DecodeState` uses it up: its buffers go into the state that comes back. `copy` keeps one.

    Attributes:
      network, params: the module and its parameters.
      batch_axis: of every leaf of the cache.
    """

    def __init__(self, network: nn.Module, params: Any, *, piece_size: int = 512):
        """Makes a generator.

        Args:
          network: a module under T5X's decoder-only signature.
          params: its parameters.
          piece_size: prompts are read this many tokens at a time; memory while reading follows it.
        """
        if piece_size < 1:
            raise ValueError(f"piece_size = {piece_size}; it must be at least 1.")
        self.network, self.params = network, params
        # The network's own convention, T5X's too: under a scan every leaf has the layers first.
        self.batch_axis = 1 if getattr(network, "scan_layers", False) else 0
        self._piece_size = piece_size
        self._grows = cache_grows(network, params)
        self._init_cache = jax.jit(
            lambda params, batch, length: init_cache(network, params, batch, length), static_argnums=(1, 2)
        )
        # The two executables. Neither sees a text's length, only a batch, a piece and a number of steps.
        self.read_piece = jax.jit(self._read_piece, donate_argnames="state")
        self.make_steps = jax.jit(self._make_steps, donate_argnames="state", static_argnames=("sampling", "steps"))

    def with_params(self, params: Any) -> "Generator":
        """The same with other parameters of the same shapes; the executables are shared."""
        other = copy.copy(self)
        other.params = params
        return other

    def start(self, batch: int, max_length: int | None = None) -> DecodeState:
        """The state of `batch` empty texts.

        Args:
          batch: number of rows.
          max_length: the longest text, prompt and continuation together; needed with full attention only.

        Raises:
          UserError: the network has full attention and `max_length` is None.
        """
        if self._grows and max_length is None:
            raise UserError("This network has full attention, whose cache holds every token: give max_length.")
        cache = self._init_cache(self.params, batch, max_length if self._grows else 1)
        return DecodeState(
            cache,
            token=jnp.full((batch,), BOS, jnp.int32),
            consumed=jnp.zeros((batch,), jnp.int32),
            capacity=max_length if self._grows else None,
        )

    def read(self, state: DecodeState, tokens: np.ndarray, lengths: np.ndarray | None = None) -> DecodeState:
        """Appends text to each row.

        Args:
          state: the texts so far; used up.
          tokens: int [B, L]; row b's text is its first lengths[b] tokens.
          lengths: int [B], 0 … L; all L when None.

        Returns:
          The state whose newest token is the last one appended.

        Raises:
          UserError: a token is not in the vocabulary, or the capacity does not suffice.
        """
        tokens = np.asarray(tokens, np.int32)
        batch = state.token.shape[0]
        lengths = np.full((batch,), tokens.shape[-1]) if lengths is None else np.asarray(lengths)
        if tokens.ndim != 2 or tokens.shape[0] != batch or lengths.shape != (batch,):
            raise ValueError(f"tokens {tokens.shape} and lengths {lengths.shape} are not of {batch} rows.")
        if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            raise ValueError(f"lengths reach from {lengths.min()} to {lengths.max()}, rows hold {tokens.shape[1]}.")
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        vocab = getattr(self.network, "vocab_size", None)
        if vocab is not None and np.any(real & ((tokens < 0) | (tokens >= vocab))):
            wrong = tokens[real & ((tokens < 0) | (tokens >= vocab))][0]
            raise UserError(f"Token {wrong} is not in the network's vocabulary of {vocab}; is this its vocabulary?")
        self.check_capacity(state, lengths)

        # The newest token is fed first, and the last one takes its place.
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0] if tokens.size else 0
        last = jnp.where(lengths > 0, jnp.asarray(last, jnp.int32), state.token)
        first = np.zeros((batch, 1), np.int32)
        fed = np.where(real, tokens, PAD)[:, :-1]
        fed = np.concatenate([first, fed], axis=1) if tokens.shape[1] else first
        size = self._piece_size
        for begin in range(0, int(lengths.max()), size):
            piece = fed[:, begin : begin + size]
            piece = np.pad(piece, [(0, 0), (0, size - piece.shape[1])])
            counts = np.clip(lengths - begin, 0, size).astype(np.int32)
            state = self.read_piece(self.params, state, piece, counts, begin == 0)
        return state.replace(token=last)

    def generate(
        self,
        state: DecodeState,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        eos_id: int | None = 1,
        seeds: int | Sequence[int] = 0,
        steps_per_call: int = 1,
    ) -> "Stream":
        """Continues every row.

        Args:
          state: the texts so far; used up.
          max_new_tokens: rows that have not ended by then stop.
          sampling: how tokens are drawn.
          eos_id: a row ends with this token; None never ends one.
          seeds: of the draws, one a row or one for all (row b then uses seed + b). A draw is a function of the seed and
            of the token's position in the text: neither the other rows nor how the text came to be matter.
          steps_per_call: tokens drawn between two looks of the host. 1 hands out every token at once and can be left
            after any of them; more save a round trip a token.

        Returns:
          An iterator over int32 [B] arrays, the tokens of one step, `PAD` in rows that have ended.

        Raises:
          UserError: the capacity does not suffice; while iterating, the network's logits are not finite.
        """
        if steps_per_call < 1:
            raise ValueError(f"steps_per_call = {steps_per_call}; it must be at least 1.")
        # The last token drawn is not consumed, but the newest one of `state` is.
        self.check_capacity(state, np.full(state.token.shape, max_new_tokens))
        return Stream(
            self, state, max_new_tokens, sampling, eos_id, row_keys(seeds, state.token.shape[0]), steps_per_call
        )

    def copy(self, state: DecodeState, rows: Sequence[int] | np.ndarray) -> DecodeState:
        """A new state whose row i is row rows[i] of `state`, which stays as it is. Rows may repeat."""
        rows = jnp.asarray(rows, jnp.int32)
        take = lambda leaf, axis: jnp.take(leaf, rows, axis=axis)
        return state.replace(
            cache=jax.tree.map(lambda leaf: take(leaf, self.batch_axis), state.cache),
            token=take(state.token, 0),
            consumed=take(state.consumed, 0),
        )

    def check_capacity(self, state: DecodeState, more: np.ndarray) -> None:
        """Raises UserError unless the cache can hold more[b] tokens beside those that row b has consumed."""
        if state.capacity is None:
            return
        needed = int(np.max(np.asarray(state.consumed) + more))
        if needed > state.capacity:
            raise UserError(
                f"The text reaches {needed} tokens, but the full-attention cache was made for max_length = "
                f"{state.capacity}; make it longer, or the text shorter."
            )

    def _read_piece(self, params, state: DecodeState, tokens, lengths, is_first):
        """Consumes lengths[b] of the tokens [B, piece size]; the first piece begins with the newest token."""
        tokens = tokens.at[:, 0].set(jnp.where(is_first, state.token, tokens[:, 0]))
        _, cache = advance(self.network, params, state.cache, tokens, lengths, prefill=True)
        return state.replace(cache=cache, consumed=state.consumed + lengths)

    def _make_steps(self, params, state: DecodeState, active, keys, eos_id, limit, *, sampling: Sampling, steps: int):
        """Draws up to `steps` tokens, but at most `limit`, in the rows that are active.

        Returns:
          (state, active [B], drawn int32 [steps, B]); drawn is NOT_FINITE where the logits are not.
        """

        def one_step(carry, index):
            state, active = carry
            running = active & (index < limit)
            count = running.astype(jnp.int32)
            # A row that has ended consumes nothing more: its state stays that of its own text.
            logits, cache = advance(self.network, params, state.cache, state.token[:, None], count, decode=True)
            logits = logits[:, 0].astype(jnp.float32)
            drawn = sampling_lib.draw(logits, jax.vmap(jax.random.fold_in)(keys, state.consumed), sampling)
            drawn = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), drawn, NOT_FINITE)
            token = jnp.where(running, drawn, state.token)
            active = active & ~(running & (drawn == eos_id))
            state = state.replace(cache=cache, token=token, consumed=state.consumed + count)
            return (state, active), jnp.where(running, drawn, PAD)

        if steps == 1:
            (state, active), drawn = one_step((state, active), 0)
            return state, active, drawn[None]
        (state, active), drawn = jax.lax.scan(one_step, (state, active), jnp.arange(steps))
        return state, active, drawn


class Stream:
    """The tokens of one `Generator.generate`, as they come; see there."""

    def __init__(
        self,
        generator: Generator,
        state: DecodeState,
        max_new_tokens: int,
        sampling: Sampling,
        eos_id: int | None,
        keys: Array,
        steps_per_call: int,
    ):
        self._generator, self._state, self._sampling, self._keys = generator, state, sampling, keys
        self._eos_id = np.int32(NO_TOKEN if eos_id is None else eos_id)
        self._steps, self._left = steps_per_call, max_new_tokens
        self._active = jnp.ones(state.token.shape, bool)
        self._ended = np.zeros(state.token.shape, bool)
        self._ready: collections.deque[np.ndarray] = collections.deque()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if not self._ready:
            if self._left <= 0 or self._ended.all():
                raise StopIteration
            self._advance()
        tokens = self._ready.popleft()
        self._ended = self._ended | (tokens == self._eos_id)
        return tokens

    def _advance(self) -> None:
        self._state, self._active, drawn = self._generator.make_steps(
            self._generator.params,
            self._state,
            self._active,
            self._keys,
            self._eos_id,
            np.int32(self._left),
            sampling=self._sampling,
            steps=self._steps,
        )
        drawn = np.asarray(drawn)
        if np.any(drawn == NOT_FINITE):
            raise UserError("The network's logits are not finite: the checkpoint's parameters have diverged.")
        ended = self._ended
        for tokens in drawn[: self._left]:
            if ended.all():
                break
            self._ready.append(tokens)
            ended = ended | (tokens == self._eos_id)
        self._left -= min(self._steps, self._left)

    @property
    def ended(self) -> np.ndarray:
        """bool [B], the rows that have yielded their end."""
        return self._ended

    @property
    def state(self) -> DecodeState:
        """The texts with every token that was yielded, to be continued; the stream is then at its end.

        Raises:
          ValueError: tokens were drawn that have not been yielded (steps_per_call above 1, left in between).
        """
        if self._ready:
            raise ValueError(
                f"{len(self._ready)} tokens are in the state and were not yielded: iterate to the end of the call, or "
                "generate with steps_per_call=1."
            )
        self._left = 0
        return self._state
