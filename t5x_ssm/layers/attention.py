"""Multi-head attention as a mixer: full, sliding window or non-overlapping chunks; self or cross.

What a query at document position i may see among keys at positions j of the same document:

| span        | causal                    | bidirectional        |
|-------------|---------------------------|----------------------|
| `full`      | j <= i                    | everything           |
| `sliding`   | i - window < j <= i       | abs(i - j) < window  |
| `chunk`     | j <= i, same chunk        | same chunk           |

A chunk is `window` consecutive positions counted from the start of the document, so a packed batch gives what its documents
give alone. The sliding window of radius r in LongT5's and SPADE's terms is window = r + 1.
All spans take memory linear in the length: local ones are computed blockwise, full attention as `dot_product` says. The decode cache
of local spans holds `window` keys however long the text; full attention caches every key; cross-attention caches nothing, but has
its keys and values apart (`ENCODED`).
Collectives under model sharding (heads): one all-reduce of the output projection; none inside attention. Under sequence
sharding local spans receive the `window` keys and values before their own (and after, when not causal); full attention,
cross-attention and a text no longer than `window` gather all keys and values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.layers import dot_product
from t5x_ssm.layers.basic import Dense, Initializer, default_kernel_init
from t5x_ssm.layers.dot_product import Places
from t5x_ssm.layers.mixer import Run
from t5x_ssm.layers.positions import RelativeBias, relative_bias, rotate
from t5x_ssm.layers.settings import require_positive
from t5x_ssm.parallel import sequence
from t5x_ssm.parallel.shard import constrain

Array = jax.Array
SPANS = ("full", "sliding", "chunk")
# A collection of what cross-attention makes of the encoder's output, in each layer `keys` and `values` [B, kv_heads, S, head_dim]. Where it
# may be written it is made; where it is given it stands for `encoded`, and a token costs no projection of what was encoded. Each of its
# rows may serve several rows of the decoder, one after another, as in beams.
ENCODED = "encoded"


class Attention(nn.Module):
    """Self-attention mixer (or cross-attention, when `cross`).

    Attributes:
      num_heads: query heads.
      head_dim: width of a head; width / num_heads when None.
      num_kv_heads: key and value heads, shared by groups of query heads; num_heads when None.
      span: one of `SPANS`.
      window: keys a query sees under `sliding` (itself included); chunk length under `chunk`.
      causal: whether later positions are hidden. Decoding needs it.
      cross: keys and values come from `encoded`.
      relative_bias: T5's bucketed bias, with a table of this layer's own.
      shared_bias: the same, with the table that the layers of the network share (its field `shared_bias`).
      rotary: rotary position embedding of queries and keys.
      scale: factor on the logits; head_dim ** -0.5 when None.
      use_bias: biases on the four projections.
      kernel_init: of the projections.
      out_kernel_init: of the output projection, if another.
      dropout_rate: on the attention weights.
    """

    num_heads: int = 8
    head_dim: int | None = None
    num_kv_heads: int | None = None
    span: str = "full"
    window: int = 512
    causal: bool = True
    cross: bool = False
    relative_bias: bool = False
    shared_bias: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rotary: bool = False
    scale: float | None = None
    use_bias: bool = False
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    dropout_rate: float = 0.0
    feed_forward: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        if self.span not in SPANS:
            raise UserError(f"Attention.span = {self.span!r}; it is one of {', '.join(SPANS)}.")
        if return_state or run.initial_state is not None:
            raise UserError("Attention passes its state through the decode cache (prefill=True), not initial_state.")
        if self.cross and run.encoded is None and not self.has_variable(ENCODED, "keys"):
            raise UserError("Attention.cross = True attends to an encoder's output, and none was given (encoded).")
        if self.cross and (self.relative_bias or self.shared_bias or self.rotary):
            raise UserError(
                "Attention.cross = True has no relative positions: leave relative_bias, shared_bias and rotary False."
            )
        if self.relative_bias and self.shared_bias:
            raise UserError("Attention.relative_bias and shared_bias are two ways to the same thing: set one of them.")
        if self.shared_bias and run.bias_table is None:
            raise UserError("Attention.shared_bias = True needs the network to have one: set its shared_bias.")
        batch, length, width = x.shape
        require_positive("Attention", num_heads=self.num_heads, window=self.window)
        if self.head_dim is None and width % self.num_heads:
            raise UserError(f"Attention.num_heads = {self.num_heads} does not divide the width {width}; set head_dim.")
        head_dim = width // self.num_heads if self.head_dim is None else self.head_dim
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        require_positive("Attention", head_dim=head_dim, num_kv_heads=kv_heads)
        if self.num_heads % kv_heads:
            raise UserError(f"Attention.num_kv_heads = {kv_heads} does not divide num_heads = {self.num_heads}.")

        # Where keys are gathered they are gathered here, once; a cache is whole on every device of `sequence`.
        cached = run.decode or run.prefill
        q_length = None if cached else "length"
        local = self.span != "full" and length > self.window
        k_length = "length" if local and not cached and not self.cross else None

        def project(name, inputs, heads, length_axis):
            y = Dense(heads * head_dim, ("embed", "joined_kv"), self.use_bias, self.dtype, self.kernel_init, name=name)(
                inputs
            )
            return constrain(y.reshape(*y.shape[:-1], heads, head_dim), ("batch", length_axis, "heads", None))

        source = run.encoded if self.cross else x
        q = project("query", x, self.num_heads, q_length)
        keys, values = (functools.partial(project, name, source, kv_heads, k_length) for name in ("key", "value"))
        apart = self.cross and (self.has_variable(ENCODED, "keys") or self._makes_encoded())
        if apart:
            k = self.variable(ENCODED, "keys", lambda: _heads_first(keys())).value
            v = self.variable(ENCODED, "values", lambda: _heads_first(values())).value
        else:
            k, v = keys(), values()
        q = q * (head_dim**-0.5 if self.scale is None else self.scale)
        table = run.bias_table if self.shared_bias else None
        if self.relative_bias:
            table = RelativeBias(self.num_heads, self.relative_buckets, name="relative_bias")()
        bias = None
        if table is not None:
            bias = functools.partial(
                relative_bias, table, max_distance=self.relative_max_distance, bidirectional=not self.causal
            )
        drops = enable_dropout and self.dropout_rate > 0
        attend = functools.partial(
            dot_product.attention,
            visible=self._visible,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )

        if self.cross:
            # Rows that share an encoded text, as beams do, ask it together.
            q = q.reshape(k.shape[0], -1, *q.shape[2:])
            at, to = _across(q, k.shape[-2 if apart else -3], run)
            out = attend(q, k, v, at, to, visible=_same_segment, heads_first=apart)
        elif cached:
            out = self._cached(q, k, v, run, attend)
        else:
            positions, segments = run.positions, run.segment_ids
            # Positions that simply count from 0 are the same for all rows and blocks.
            regular = positions is None and segments is None
            if regular:
                positions = jnp.arange(length, dtype=jnp.int32)[None]
            elif positions is None:
                positions = sequence.document_positions(segments)
            if run.padding_mask is not None:
                padding = run.padding_mask.astype(jnp.int32)
                segments = padding if segments is None else segments * padding
            if self.rotary:
                q, k = rotate(q, positions), rotate(k, positions)
            if local:
                out = self._blockwise(q, k, v, positions, segments, attend, regular=regular)
            else:
                here = Places(positions, segments)
                in_order = None if self.span != "full" else "causal" if self.causal else "full"
                out = attend(q, k, v, here, here, in_order=in_order)

        out = out.reshape(batch, length, self.num_heads * head_dim)
        out_init = self.out_kernel_init or self.kernel_init
        return Dense(width, ("joined_kv", "embed"), self.use_bias, self.dtype, out_init, name="out")(out)

    def _makes_encoded(self) -> bool:
        # A module that is initialized may write into every collection.
        return self.is_mutable_collection(ENCODED) and not self.is_initializing()

    def _visible(self, at: Places, to: Places) -> Array:
        """Which keys [.., K] each query [.., Q] sees: bool [.., Q, K]."""
        i, j = at.positions[..., :, None], to.positions[..., None, :]
        visible = (j <= i) if self.causal else jnp.ones(jnp.broadcast_shapes(i.shape, j.shape), bool)
        if self.span == "sliding":
            visible &= jnp.abs(i - j) < self.window
        elif self.span == "chunk":
            visible &= i // self.window == j // self.window
        if at.segments is not None:
            visible &= _same_segment(at, to)
        return visible

    def _blockwise(self, q, k, v, positions, segments, attend, *, regular):
        """Local attention in blocks of `window`: each block of queries sees its own and the neighbouring blocks.

        Args:
          positions: int [B or 1, L].
          segments: int [B or 1, L] or None.
          regular: positions simply count from 0, so that blocks are chunks and all blocks share one relative bias.
        """
        length, window = positions.shape[1], self.window
        count = sequence.pieces(length)
        if count > 1 and length // count < window:
            raise UserError(
                f"Attention.window = {window} reaches beyond the neighbouring device: {length} tokens over "
                f"MeshConfig.sequence = {count} are {length // count} a device. Lower MeshConfig.sequence or the window."
            )
        alone = regular and self.span == "chunk" and (count == 1 or length // count % window == 0)
        per_token, per_head = ("batch", "length"), ("batch", "length", "heads", None)
        blocks = functools.partial(sequence.cut_into_blocks, size=window)
        context = functools.partial(blocks, before=not alone, after=not alone and not self.causal)

        # Segment -1 is nobody's: padding and the blocks beyond both ends are never seen.
        segments = jnp.ones_like(positions) if segments is None else segments
        at = Places(blocks(positions, per_token), blocks(segments, per_token, fill=-1))
        to = Places(context(positions, per_token), context(segments, per_token, fill=-1))
        if regular:
            first = 0 if alone else -window
            at = at._replace(shared=jnp.arange(window, dtype=jnp.int32)[None, None])
            to = to._replace(shared=jnp.arange(first, first + to.positions.shape[-1], dtype=jnp.int32)[None, None])
        out = attend(blocks(q, per_head), context(k, per_head), context(v, per_head), at, to)
        return sequence.join_blocks(out, per_head, length)

    def _cached(self, q, k, v, run: Run, attend):
        """Consumes tokens from and into the cache: a ring of keys and values, and how many tokens each row has seen."""
        if not self.causal:
            raise UserError("Attention.causal = False cannot decode: its outputs depend on tokens not yet written.")
        batch, length, kv_heads, head_dim = k.shape
        created = self.has_variable("cache", "cached_key")
        # T5X creates the cache by a call at full length: that length is all that full attention will ever hold.
        slots = length if self.span == "full" else self.window
        axes = ("batch", "heads", None, None)
        zeros = lambda: jnp.zeros((batch, kv_heads, slots, head_dim), self.dtype)
        keys = partitioning.variable_with_axes("cache", "cached_key", zeros, axes=axes)
        values = partitioning.variable_with_axes("cache", "cached_value", zeros, axes=axes)
        seen = partitioning.variable_with_axes(
            "cache", "tokens_seen", lambda: jnp.zeros((batch,), jnp.int32), axes=("batch",)
        )
        if run.decode and not created:
            return jnp.zeros_like(q)
        slots, full = keys.value.shape[2], self.span == "full"
        consumed = run.prefill_lengths
        if consumed is None:
            consumed = jnp.full((batch,), length, jnp.int32)
        consumed = consumed.astype(jnp.int32)

        def advance(ring, block):
            """Attends for a block of at most `slots` new tokens and writes those that are real into the ring."""
            ring_k, ring_v, count = ring
            new_q, new_k, new_v, offset = block
            size = new_q.shape[1]
            new_pos = count[:, None] + jnp.arange(size, dtype=jnp.int32)
            if self.rotary:
                new_q, new_k = rotate(new_q, new_pos), rotate(new_k, new_pos)
            real = jnp.clip(consumed - offset, 0, size)
            # Tokens beyond a row's length are sent to a slot that does not exist, and dropped. In a prompt, full attention has a slot
            # for each, which counts as empty again when this call is over.
            roomy = full and size > 1
            kept = new_pos < slots if roomy else jnp.arange(size) < real[:, None]
            target = jnp.where(kept, new_pos % slots, slots)
            rows = jnp.arange(batch)[:, None]
            written_k = ring_k.at[rows, :, target].set(new_k.astype(ring_k.dtype), mode="drop")
            written_v = ring_v.at[rows, :, target].set(new_v.astype(ring_v.dtype), mode="drop")
            if full or size == 1:
                # The ring holds all that is seen: a single token takes the place of one that no local span still sees.
                held = jnp.minimum(count + size, slots) if roomy else count + real
                seen_k, seen_v, k_pos = written_k, written_v, _held(held, slots)
            else:
                seen_k = jnp.concatenate([ring_k, _heads_first(new_k).astype(ring_k.dtype)], axis=2)
                seen_v = jnp.concatenate([ring_v, _heads_first(new_v).astype(ring_v.dtype)], axis=2)
                k_pos = jnp.concatenate([_held(count, slots), new_pos], axis=1)
            at = Places(new_pos, jnp.ones_like(new_pos))
            to = Places(k_pos, (k_pos >= 0).astype(jnp.int32))
            seen_k, seen_v = seen_k.astype(new_q.dtype), seen_v.astype(new_q.dtype)
            out = attend(new_q, seen_k, seen_v, at, to, heads_first=True)
            return (written_k, written_v, count + real), out

        ring, outs = (keys.value, values.value, seen.value), []
        for start in range(0, length, slots):
            piece = slice(start, min(start + slots, length))
            ring, out = advance(ring, (q[:, piece], k[:, piece], v[:, piece], start))
            outs.append(out)
        keys.value, values.value, seen.value = ring
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _held(count: Array, slots: int) -> Array:
    """The newest position [B, slots] that each slot of a ring can hold after `count` [B] tokens; negative for none."""
    last = count[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def _same_segment(at: Places, to: Places) -> Array:
    return at.segments[..., :, None] == to.segments[..., None, :]


def _heads_first(x: Array) -> Array:
    """[B, N, heads, D] to [B, heads, N, D]."""
    return jnp.swapaxes(x, 1, 2)


def _across(q: Array, length: int, run: Run) -> tuple[Places, Places]:
    """Places of queries [B, Q, …] and of the encoder's tokens, as many as `length`; segment -1 is nobody's."""
    packed = run.segment_ids is not None and run.encoded_segment_ids is not None
    at = run.segment_ids if packed else jnp.ones(q.shape[:2], jnp.int32)
    to = run.encoded_segment_ids if packed else jnp.ones((q.shape[0], length), jnp.int32)
    if run.encoded_mask is not None:
        to = jnp.where(run.encoded_mask > 0, to, -1)
    return Places(segments=at), Places(segments=to)
