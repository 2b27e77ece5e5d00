"""Checksums against a plain NumPy rendering of their definition, and what they notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ssm.training.checksums import checksums


def words_of(array: np.ndarray) -> np.ndarray:
    """One integer per 8-, 16- or 32-bit value, two per 64-bit value, in row-major order."""
    array = np.ascontiguousarray(array)
    return array.reshape(-1).view(f"<u{min(array.dtype.itemsize, 4)}").astype(object)


def oracle(array: np.ndarray) -> str:
    total = 0
    for i, word in enumerate(words_of(array)):
        h = int(word) ^ (i * 0x9E3779B9 % 2**32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return f"{total % 2**32:08x}"


def test_equals_the_definition_for_every_type_and_shape():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, size=4 * 3 * 5 * 8, dtype=np.uint8).tobytes()
    types = [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint32, np.int16, np.int8, np.uint8]
    arrays = [np.frombuffer(noise, dtype)[:60].reshape(4, 3, 5) for dtype in types]
    arrays += [np.float32(-0.0).reshape(()), rng.random((7, 2)) > 0.5, np.zeros(0, np.float32), arrays[0].reshape(60)]
    assert checksums([jnp.asarray(a) for a in arrays]) == [oracle(a) for a in arrays]
    with jax.enable_x64(True):
        wide = np.frombuffer(noise, np.float64)[:6].reshape(2, 3)
        assert checksums([jnp.asarray(wide)]) == [oracle(wide)]


BASE = np.random.default_rng(1).standard_normal(96).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(place=st.integers(0, 95), bit=st.integers(0, 31))
def test_every_flipped_bit_changes_it(place, bit):
    changed = BASE.copy()
    changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
    before, after = checksums([jnp.asarray(BASE), jnp.asarray(changed)])
    assert before != after


def test_order_and_blocks_of_zeros_change_it():
    swapped, cleared = BASE.copy(), BASE.copy()
    swapped[[3, 70]] = swapped[[70, 3]]
    cleared[32:64] = 0
    assert len(set(checksums([jnp.asarray(a) for a in (BASE, swapped, cleared)]))) == 3


def test_types_without_plain_bits_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        checksums([jnp.zeros(3, jnp.complex64)])
    with pytest.raises(TypeError, match="key"):
        checksums([jax.random.key(0)])
