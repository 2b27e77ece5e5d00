import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_oracle import toeplitz_convolution

from t5x_ssm.ssm import convolution
from t5x_ssm.ssm.convolution import causal_convolution, select_method

RNG = np.random.default_rng(0)


def draw(batch, length, channels, lags):
    return RNG.normal(size=(batch, length, channels)), RNG.normal(size=(channels, lags))


@pytest.mark.parametrize(
    ("length", "lags", "methods"),
    [
        (1, 1, ("direct", "fft", "matmul")),
        (33, 33, ("fft", "matmul")),
        (100, 7, ("direct", "fft")),
        (96, 40, ("fft", "matmul")),
        (8, 20, ("direct", "fft")),
        (100, 100, (None,)),
    ],
    ids=lambda x: str(x),
)
def test_against_a_dense_matrix(length, lags, methods):
    """Odd lengths, a single token, kernels longer, much shorter and somewhat shorter than the sequence."""
    u, kernel = draw(2, length, 3, lags)
    _, back = draw(2, length, 3, lags)
    for method in methods:
        with jax.enable_x64(True):
            got = causal_convolution(jnp.asarray(u), jnp.asarray(kernel), method=method)
            both = causal_convolution(
                jnp.asarray(u), jnp.asarray(kernel), anticausal_HL=jnp.asarray(back), method=method
            )
        np.testing.assert_allclose(got, toeplitz_convolution(u, kernel), atol=1e-12)
        np.testing.assert_allclose(both, toeplitz_convolution(u, kernel, back), atol=1e-12)


def test_two_transforms_of_half_the_size():
    u, kernel = draw(1, 5000, 2, 5000)
    with jax.enable_x64(True):
        got = causal_convolution(jnp.asarray(u), jnp.asarray(kernel), method="fft")
    np.testing.assert_allclose(got, toeplitz_convolution(u, kernel), atol=1e-10)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(starts=st.sets(st.integers(0, 79)), lags=st.sampled_from([80, 20]), method=st.sampled_from(["fft", "matmul"]))
def test_packed_documents_are_separate_documents(starts, lags, method):
    u, kernel = draw(2, 80, 3, lags)
    _, back = draw(2, 80, 3, lags)
    resets = np.zeros((2, 80), bool)
    resets[0, sorted(starts)] = True
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (u, kernel, back, resets)]
        got = causal_convolution(*arrays[:2], resets=arrays[3], method=method)
        both = causal_convolution(*arrays[:2], anticausal_HL=arrays[2], resets=arrays[3], method=method)
    document = np.cumsum(resets, 1)
    np.testing.assert_allclose(got, toeplitz_convolution(u, kernel, document=document), atol=1e-12)
    np.testing.assert_allclose(both, toeplitz_convolution(u, kernel, back, document), atol=1e-12)


@pytest.mark.parametrize("lags", [1, 9, 60])
def test_packed_documents_both_ways_at_short_lengths(lags):
    """Written-out sums, and kernels that end before, at and behind the sequence."""
    u, kernel = draw(2, 20, 3, lags)
    _, back = draw(2, 20, 3, max(1, lags - 1))
    resets = RNG.random((2, 20)) < 0.2
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (u, kernel, back, resets)]
        got = [
            causal_convolution(*arrays[:2], anticausal_HL=arrays[2], resets=arrays[3], method=m) for m in (None, "fft")
        ]
    want = toeplitz_convolution(u, kernel, back, np.cumsum(resets, 1))
    for y in got:
        np.testing.assert_allclose(y, want, atol=1e-12)


def test_nothing_leaks_between_documents_in_float32():
    """Not even a rounding: whatever one document holds, the other one's outputs have the same bits."""
    u, kernel = (x.astype(np.float32) for x in draw(1, 200, 2, 200))
    _, back = (x.astype(np.float32) for x in draw(1, 200, 2, 200))
    resets = np.zeros((1, 200), bool)
    resets[0, 77] = True

    def run(u, back):
        back = None if back is None else jnp.asarray(back)
        return causal_convolution(jnp.asarray(u), jnp.asarray(kernel), anticausal_HL=back, resets=jnp.asarray(resets))

    early, late = u.copy(), u.copy()
    early[:, :77] *= 1e6
    late[:, 77:] *= 1e6
    for anticausal in (None, back):
        plain = run(u, anticausal)
        np.testing.assert_array_equal(plain[:, 77:], run(early, anticausal)[:, 77:])
        np.testing.assert_array_equal(plain[:, :77], run(late, anticausal)[:, :77])
        assert not np.array_equal(plain[:, :77], run(early, anticausal)[:, :77])


@pytest.mark.parametrize(
    "method", ["fft", *(pytest.param(method, marks=pytest.mark.slow) for method in ("matmul", "direct"))]
)
def test_gradients(method):
    length = 20 if method == "direct" else 40
    u, kernel = draw(2, length, 3, length)
    _, back = draw(2, length, 3, length)
    resets = RNG.random((2, length)) < 0.1
    weight = RNG.normal(size=(2, length, 3))
    document = jnp.cumsum(resets, 1)

    def ours(u, kernel, back):
        two_sided = causal_convolution(u, kernel, anticausal_HL=back, method=method)
        packed = causal_convolution(u, kernel, anticausal_HL=back, resets=jnp.asarray(resets), method=method)
        short = causal_convolution(u, kernel[:, :9], method=method)
        return jnp.sum(weight * jnp.sin(two_sided + 2 * packed + 3 * short))

    def theirs(u, kernel, back):
        lag = np.arange(length)[:, None] - np.arange(length)[None]
        causal = jnp.where(lag >= 0, kernel[:, np.maximum(lag, 0)], 0)
        ahead = jnp.where(lag < 0, back[:, np.maximum(-lag - 1, 0)], 0)
        near = jnp.where(lag < 9, causal, 0)
        same = document[:, :, None] == document[:, None, :]
        total = jnp.einsum("hij,bjh->bih", causal + ahead + 3 * near, u)
        return jnp.sum(weight * jnp.sin(total + 2 * jnp.einsum("hij,bij,bjh->bih", causal + ahead, same, u)))

    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (u, kernel, back)]
        got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*args)
        want = jax.jit(jax.grad(theirs, argnums=(0, 1, 2)))(*args)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


def test_groups_of_channels_change_nothing(monkeypatch):
    u, kernel = (x.astype(np.float32) for x in draw(2, 50, 12, 50))

    def value_and_gradients():
        function = lambda u, k: jnp.sum(jnp.sin(causal_convolution.__wrapped__(u, k, method="fft")))
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(u, kernel)

    whole = value_and_gradients()
    monkeypatch.setattr(convolution, "CPU_GROUP_ELEMENTS", 450)
    grouped = value_and_gradients()
    monkeypatch.setattr(convolution, "KEPT_ELEMENTS", 0)
    recomputed = value_and_gradients()
    text = jax.jit(lambda u, k: causal_convolution.__wrapped__(u, k)).lower(u, kernel).as_text()
    assert "stablehlo.while" in text  # four channels at a time
    for other in (grouped, recomputed):
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["fft", "matmul"])
def test_float32_error(method):
    u, kernel = (x.astype(np.float32) for x in draw(1, 4096, 2, 4096))
    got = np.asarray(causal_convolution(jnp.asarray(u), jnp.asarray(kernel), method=method), np.float64)
    want = toeplitz_convolution(u, kernel)
    assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()


def test_causality_by_gradient():
    """No output depends on a later input: at most rounding of the transform (a tenth of a millionth) is there."""
    u, kernel = (x.astype(np.float32) for x in draw(1, 257, 2, 257))
    for at in (0, 100, 255):
        gradient = jax.grad(lambda u, at=at: causal_convolution(u, jnp.asarray(kernel))[0, at].sum())(jnp.asarray(u))
        assert np.abs(gradient[:, at + 1 :]).max() < 1e-6 < 1e-2 < np.abs(gradient[:, : at + 1]).max()


def test_the_dispatcher_chooses_each_method_somewhere():
    assert select_method("cpu", 16) == select_method("tpu", 16) == "direct"
    assert select_method("cpu", 2048) == select_method("cuda", 65536) == "fft"
    assert select_method("tpu", 2048) == "matmul"
    with jax.default_matmul_precision("high"):
        assert select_method("tpu", 2048) == "matmul_high"
        assert select_method("cpu", 2048) == "fft"

    def lowered(length, platform):
        u, kernel = jax.ShapeDtypeStruct((1, length, 2), jnp.float32), jax.ShapeDtypeStruct((2, length), jnp.float32)
        return jax.jit(causal_convolution.__wrapped__).trace(u, kernel).lower(lowering_platforms=(platform,)).as_text()

    assert "fft" in lowered(64, "cpu") and "dot_general" not in lowered(64, "cpu")
    assert "dot_general" in lowered(64, "tpu") and "stablehlo.fft" not in lowered(64, "tpu")
    for short in (lowered(16, "cpu"), lowered(16, "tpu")):
        assert "fft" not in short and "dot_general" not in short


def test_settings_that_cannot_be_are_refused():
    u, kernel = (jnp.asarray(x) for x in draw(1, 8, 2, 8))
    with pytest.raises(ValueError, match="choose method from direct, fft, matmul, matmul_high"):
        causal_convolution(u, kernel, method="fast")
    with pytest.raises(ValueError, match="at most 32 lags, not 40: choose method 'fft'"):
        causal_convolution(*(jnp.asarray(x) for x in draw(1, 40, 2, 40)), method="direct")
