"""Checksums of arrays that do not depend on how the arrays are laid out over devices.

A checksum is a sum, modulo 2**32, of one mixed word per value of the array (two per 64-bit value), and each word is
mixed with its position in the row-major array. Integer addition is exact in any order, so a checksum computed on eight
devices equals the one computed on four or on one, and a checkpoint can be verified on whatever mesh restores it. Each
shard is read once where it lies; only the sums travel.

The mixing is a bijection of the word (the finaliser of MurmurHash3, by Austin Appleby, public domain), so a change
within one word is always noticed; changes in several, two swapped words included, escape with a probability of about
2**-32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B9


def checksums(arrays: Sequence[jax.Array]) -> list[str]:
    """Returns the checksum of each array's bits as eight hexadecimal digits.

    Args:
      arrays: real arrays (booleans, integers or floats of 8 to 64 bits), of any shape and sharding, all on the same
        devices.

    Returns:
      One string an array. -0.0 and 0.0 differ, as do different NaNs.

    Raises:
      TypeError: for complex arrays, typed random keys and types under 8 bits.
    """
    if not arrays:
        return []
    for array in arrays:
        _word_type(array.dtype)
    mesh = next((a.sharding.mesh for a in arrays if isinstance(a.sharding, NamedSharding)), None)
    # In a run of several processes every one of them needs the sums, so they are replicated.
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    sums = jax.jit(_sums, out_shardings=replicated)(list(arrays))
    return [f"{value:08x}" for value in np.asarray(sums)]


def _word_type(dtype: jnp.dtype) -> jnp.dtype | None:
    """The unsigned integers that hold a type's bits; None for booleans, which have no bits to cast."""
    if dtype == jnp.bool_:
        return None
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
        if bits in (8, 16, 32, 64):
            return jnp.dtype(f"uint{min(bits, 32)}")
    raise TypeError(f"a checkpoint holds real arrays of 8 to 64 bits, not {dtype}")


def _sums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(array) for array in arrays])


def _sum(array: jax.Array) -> jax.Array:
    word_type = _word_type(array.dtype)
    # A cast of 64-bit values gives a last axis of two words.
    words = array if word_type is None else jax.lax.bitcast_convert_type(array, word_type)
    words = words.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    mixed = words ^ (position * jnp.uint32(_GOLDEN))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
