import jax
import numpy as np
import pytest

from t5x_ssm.ssm import initialization


def test_legs_matrix_is_the_papers():
    a, b = initialization.hippo_legs(4)
    for n in range(4):
        for k in range(4):
            want = -np.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            assert a[n, k] == pytest.approx(want, abs=1e-14)
    np.testing.assert_allclose(b, np.sqrt([1, 3, 5, 7]))


@pytest.mark.parametrize("size", [2, 8, 64, 256])
def test_normal_plus_low_rank_rebuilds_legs(size):
    a, b = initialization.hippo_legs(size)
    poles, p, b_modal, vectors = initialization.legs_normal_plus_low_rank(size)
    adjoint = vectors.conj().T
    scale = np.abs(a).max()
    np.testing.assert_allclose(adjoint @ vectors, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(vectors @ (np.diag(poles) - np.outer(p, p.conj())) @ adjoint, a, atol=1e-12 * scale)
    np.testing.assert_allclose(vectors @ b_modal, b, atol=1e-10)
    # Conjugate pairs, the negative half first: S5 keeps that half, DSS and H3 the other.
    assert np.all(poles.imag[: size // 2] < 0) and np.all(np.diff(poles.imag) > 0)
    np.testing.assert_allclose(poles, poles[::-1].conj(), atol=1e-9 * scale)
    np.testing.assert_array_equal(poles.real, -0.5)


def test_published_frequencies():
    # The extreme frequencies at size 256 as published code gives them, to the digits that are known.
    skew_256 = initialization.legs_poles(128).imag
    assert skew_256[0] == pytest.approx(0.212, abs=5e-4) and skew_256[-1] == pytest.approx(20860, rel=1e-3)
    np.testing.assert_allclose(initialization.lin_poles(3), [-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi])
    # S4D-Inv with N = 4: (4/π)(4/(2n+1) - 1) for n = 0, 1.
    np.testing.assert_allclose(initialization.inv_poles(2), -0.5 + 1j * 4 / np.pi * np.array([3, 1 / 3]))


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="must be even"):
        initialization.legs_normal_plus_low_rank(7)


def test_shared_arrays_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        initialization.legs_poles(4)[0] = 0


def test_random_starts_have_their_distributions():
    keys = jax.random.split(jax.random.key(0), 3)
    log_step = np.asarray(initialization.log_uniform(keys[0], (20000,), 1e-3, 1e-1))
    assert np.log(1e-3) <= log_step.min() < np.log(1.05e-3) and np.log(0.95e-1) < log_step.max() <= np.log(1e-1) + 1e-6
    assert np.mean(log_step) == pytest.approx(np.log(1e-2), abs=0.03)
    re, im = initialization.complex_normal(keys[1], (20000,), variance=0.5)
    assert np.var(re) == pytest.approx(0.25, rel=0.05) and np.var(im) == pytest.approx(0.25, rel=0.05)
    assert abs(np.corrcoef(re, im)[0, 1]) < 0.03
    p, q = initialization.gss_poles(keys[2], 20000)
    assert np.std(p) == pytest.approx(1, rel=0.03) and np.std(q) == pytest.approx(1, rel=0.03)
    assert abs(np.corrcoef(p, q)[0, 1]) < 0.03
    with pytest.raises(ValueError, match="0 < low <= high"):
        initialization.log_uniform(keys[0], (1,), 1.0, 0.1)


@pytest.mark.parametrize("conj_sym", [True, False])
def test_s5_starts_from_blocks_of_legs(conj_sym):
    """Λ with the modes' vectors V rebuilds the block-diagonal normal part of LegS, which is what B and C are written in."""
    state_size, blocks, channels = 24, 3, 5
    start = initialization.s5_start(jax.random.key(0), state_size, channels, blocks, conj_sym=conj_sym)
    size = state_size // blocks
    a, _ = initialization.hippo_legs(size)
    p = np.sqrt(np.arange(size) + 0.5)
    normal = a + np.outer(p, p)
    kept = size // 2 if conj_sym else size
    vectors = initialization.legs_normal_plus_low_rank(size).vectors[:, :kept]
    poles = (start.lambda_re + 1j * np.asarray(start.lambda_im)).reshape(blocks, kept)
    for block in poles:
        part = (vectors * block) @ vectors.conj().T
        np.testing.assert_allclose(2 * part.real if conj_sym else part, normal, atol=1e-5 * np.abs(normal).max())
    assert not conj_sym or np.all(poles.imag < 0)
    # B = V^H B0 of a real B0: V B is real.
    b = (start.b_re + 1j * np.asarray(start.b_im)).reshape(blocks, kept, channels)
    if not conj_sym:
        np.testing.assert_allclose((vectors @ b).imag, 0, atol=1e-6)
    assert [leaf.shape for leaf in start] == [(blocks * kept,)] * 2 + [(blocks * kept, channels)] * 2 + [
        (channels, blocks * kept)
    ] * 2


@pytest.mark.parametrize(("c_init", "variance"), [("lecun_normal", 2 / (64 * 256)), ("trunc_standard_normal", 2 / 64), ("complex_normal", 1)])  # fmt: skip
def test_s5_variances(c_init, variance):
    start = initialization.s5_start(jax.random.key(1), 64, 256, 4, c_init=c_init)
    assert np.mean(start.b_re**2 + start.b_im**2) == pytest.approx(1 / 64, rel=0.06)
    assert np.mean(start.c_re**2 + start.c_im**2) == pytest.approx(variance, rel=0.06)
    assert abs(np.corrcoef(np.ravel(start.c_re), np.ravel(start.c_im))[0, 1]) < 0.06


def test_s5_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of 2·blocks"):
        initialization.s5_start(jax.random.key(0), 12, 4, 4)
    with pytest.raises(ValueError, match="choose from lecun_normal"):
        initialization.s5_start(jax.random.key(0), 8, 4, c_init="zeros")
