"""Dot-product attention of queries to keys: one function, three ways to compute it, and which of them is taken.

  dense      the logits of all pairs of a query and a key;
  in pieces  some queries at a time, and again in the backward pass, so that memory grows with the keys alone: where the
             logits of one row and head would be more than `DENSE_LOGITS`;
  kernel     on TPUs jax's Pallas kernel ("splash attention"), which keeps logits in the chip's vector memory and passes over
             blocks of pairs that cannot see each other: full self-attention of at least `KERNEL_LENGTH` tokens that are whole
             on a device, without biases on the logits and without dropout.

Weights are float32 until they meet the values, in all three.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention

from t5x_ssm.parallel import sequence
from t5x_ssm.parallel.shard import shard

Array = jax.Array

# Large and finite: a row whose keys are all masked gives a uniform, not a NaN.
MASKED = -1e9
DENSE_LOGITS = 1 << 20
QUERIES = 128  # of a piece
KERNEL_LENGTH = 1024
LANES = 128
KERNEL_BLOCKS = (512, 256, LANES)
# A kernel's arithmetic cannot be read from a compiled program: the pairs of one head that it computes stand in its scope.
PAIRS_SCOPE = "attention_pairs_"


class Places(NamedTuple):
    """Where tokens stand; None for what nobody asks for.

    Attributes:
      positions: int [.., N].
      segments: int [.., N].
      shared: int [.., N], positions but for a number that queries and keys have in common, where more rows than `positions` has
        are alike in that: a relative bias is then made once for them.
    """

    positions: Array | None = None
    segments: Array | None = None
    shared: Array | None = None


# From places [.., Q] and [.., K] to whether the query sees the key, bool [.., Q, K].
Visible = Callable[[Places, Places], Array]
# From positions [.., Q] and [.., K] to what is added to the logits [.., heads, Q, K].
Bias = Callable[[Array, Array], Array]


def attention(
    q: Array,
    k: Array,
    v: Array,
    at: Places,
    to: Places,
    visible: Visible,
    *,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    in_order: str | None = None,
    heads_first: bool = False,
) -> Array:
    """Softmax of q · k over the keys that a query sees, times v.

    Args:
      q: [.., Q, heads, D], scaled.
      k, v: [.., K, kv_heads, D], or [.., kv_heads, K, D] if `heads_first`; groups of heads share one.
      at, to: places of the queries and of the keys.
      visible: which keys a query sees.
      bias: added to the logits.
      dropout_rate: on the weights, if there is a key for it.
      dropout_key: of its masks.
      in_order: 'causal' or 'full' if queries and keys are the same tokens [B, L, ..] in the order of their positions, and
        `visible` is that within segments; None for anything else, and with `heads_first`.
      heads_first: how k and v lie. For a single query, what a product does not have to rearrange is most of its time.

    Returns:
      [.., Q, heads, D].
    """
    dropout = None if dropout_key is None or dropout_rate == 0 else (dropout_rate, dropout_key)
    keys = k.shape[-2 if heads_first else -3]
    ways = functools.partial(
        _in_pieces if q.shape[-3] * keys > DENSE_LOGITS else _dense, visible=visible, bias=bias, heads_first=heads_first
    )
    if in_order is None or not _kernel_serves(q, bias, dropout):
        return ways(q, k, v, at, to, dropout=dropout)

    def in_kernel(q, k, v, at, to):
        return _in_kernel(q, k, v, at.segments, causal=in_order == "causal")

    return lax.platform_dependent(q, k, v, at, to, tpu=in_kernel, default=functools.partial(ways, dropout=None))


def _dense(q, k, v, at, to, *, visible, bias, dropout, heads_first=False):
    kv_heads, keys = k.shape[-3 if heads_first else -2], "...hkd" if heads_first else "...khd"
    groups = q.shape[-2] // kv_heads
    q = q.reshape(*q.shape[:-2], kv_heads, groups, q.shape[-1])
    at_least_float32 = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum(f"...qhgd,{keys}->...hgqk", q, k, preferred_element_type=at_least_float32)
    if bias is not None:
        added = bias(*(places.positions if places.shared is None else places.shared for places in (at, to)))
        logits = logits + added.reshape(*added.shape[:-3], kv_heads, groups, *added.shape[-2:])
    logits = jnp.where(visible(at, to)[..., None, None, :, :], logits, MASKED)
    weights = _softmax(logits).astype(v.dtype)
    if dropout is not None:
        rate, key = dropout
        kept = jax.random.bernoulli(key, 1 - rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - rate), 0)
    out = jnp.einsum(f"...hgqk,{keys}->...qhgd", weights, v)
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


@jax.custom_jvp
def _softmax(logits):
    """Over the last axis. Its gradient keeps the weights alone; jax.nn.softmax, a program of its own, hands them out twice."""
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


@_softmax.defjvp
def _(primals, tangents):
    weights = _softmax(*primals)
    along = weights * tangents[0]
    return weights, along - weights * jnp.sum(along, axis=-1, keepdims=True)


def _in_pieces(q, k, v, at, to, *, visible, bias, dropout, heads_first=False):
    """As `_dense`, of queries whose length may be cut over devices: each takes its own in pieces."""
    length = q.shape[-3]
    count = sequence.pieces(length)
    size = min(QUERIES, length // count)
    number = -(-(length // count) // size)

    def cut(x, axis):
        """The axis becomes [number, .., count, size], the first of them leading."""
        axis = axis % x.ndim
        x = x.reshape(*x.shape[:axis], count, length // count, *x.shape[axis + 1 :])
        room = number * size - length // count
        x = jnp.pad(x, [(0, room if i == axis + 1 else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[: axis + 1], number, size, *x.shape[axis + 2 :])
        return jnp.moveaxis(x, axis + 1, 0)

    per_piece = (cut(q, -3), jax.tree.map(lambda x: cut(x, -1), at), jnp.arange(number))
    k, v = (jnp.expand_dims(x, -4) for x in (k, v))
    to = jax.tree.map(lambda x: jnp.expand_dims(x, -2), to)

    @jax.checkpoint
    def piece(q, at, index):
        masked = None if dropout is None else (dropout[0], jax.random.fold_in(dropout[1], index))
        return _dense(q, k, v, at, to, visible=visible, bias=bias, dropout=masked, heads_first=heads_first)

    out = jnp.moveaxis(lax.map(lambda args: piece(*args), per_piece), 0, -4)  # [.., count, number, size, heads, D]
    out = out.reshape(*out.shape[:-5], count, number * size, *out.shape[-2:])[..., : length // count, :, :]
    return out.reshape(*out.shape[:-4], length, *out.shape[-2:])


def _kernel_serves(q, bias, dropout) -> bool:
    length = q.shape[-3]
    whole = sequence.pieces(length) == 1 and length % LANES == 0 and length >= KERNEL_LENGTH
    return whole and q.ndim == 4 and q.dtype != jnp.float64 and bias is None and dropout is None


def _in_kernel(q, k, v, segments, *, causal, interpret=False):
    """q [B, L, heads, D], k and v [B, L, kv_heads, D], segments [B or 1, L] or None."""
    batch, length, kv_heads, _ = k.shape
    per_group = q.reshape(batch, length, kv_heads, -1, q.shape[-1])
    if segments is not None:
        segments = jnp.broadcast_to(segments, (batch, length))
    grouped, single = ("batch", None, "heads", None, None), ("batch", None, "heads", None)
    run = functools.partial(_run_kernel, causal=causal, interpret=interpret)
    out = shard(run, (grouped, single, single, ("batch", None)), grouped)(per_group, k, v, segments)
    return out.reshape(q.shape[:-1] + v.shape[-1:])


def _run_kernel(q, k, v, segments, *, causal, interpret):
    """q [B, L, kv_heads, groups, D], k and v [B, L, kv_heads, D], segments [B, L] or None; what one device holds."""
    length, groups = q.shape[1], q.shape[3]
    block = next(size for size in KERNEL_BLOCKS if length % size == 0)
    mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)((length, length))
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash_attention.make_splash_mqa_single_device(
        mask=splash_attention.MultiHeadMask([mask] * groups),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
        interpret=interpret,
    )
    blocks = length // block
    computed = blocks * (blocks + 1) // 2 if causal else blocks**2

    def of_row(q, k, v, segments):
        ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(q, k, v)

    q, k, v = jnp.moveaxis(q, 1, 3), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    with jax.named_scope(f"{PAIRS_SCOPE}{computed * block**2}"):
        return jnp.moveaxis(jax.vmap(of_row)(q, k, v, segments), 3, 1)
