import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_oracle import toeplitz_convolution

from t5x_ssm.ssm import shift

RNG = np.random.default_rng(0)
BATCH, LENGTH, CHANNELS, TAPS = 2, 45, 3, 8


def parameters():
    return [RNG.normal(size=s) for s in ((CHANNELS, TAPS), (CHANNELS, TAPS), (CHANNELS,))]


def oracle(params, u, state, resets):
    """The state space with a shift matrix, from the paper: x[l] = S x[l-1] + b u[l], y = c·x + d u.

    Its state S^k b u is another one than the inputs, so the past enters as tokens before the sequence.
    """
    b, c, d = params
    past = jnp.swapaxes(state, 1, 2)
    u, resets = jnp.concatenate([past, u], 1), jnp.concatenate([jnp.zeros(past.shape[:2], bool), resets], 1)

    def body(x, inputs):
        token, reset = inputs
        x = jnp.where(reset[:, None, None], 0, x)
        x = jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], -1) + b * token[..., None]
        return x, jnp.sum(c * x, -1) + d * token

    zero = jnp.zeros((u.shape[0], *b.shape))
    _, y = jax.lax.scan(body, zero, (jnp.swapaxes(u, 0, 1), resets.T))
    return jnp.swapaxes(y, 0, 1)[:, past.shape[1] :]


def last_inputs(u, state, resets, lengths):
    out = np.zeros(state.shape)
    for b in range(state.shape[0]):
        history = list(np.swapaxes(state, 1, 2)[b])
        for l in range(lengths[b]):
            if resets[b, l]:
                history = [np.zeros(CHANNELS)] * TAPS
            history.append(u[b, l])
        out[b] = np.stack(history[-TAPS:], -1)
    return out


def test_the_kernel_is_the_papers():
    b, c, d = parameters()
    with jax.enable_x64(True):
        system = shift.shift(*(jnp.asarray(x) for x in (b, c, d)))
        for length in (3, TAPS, 20):
            want = [
                [sum(b[h, n] * c[h, n + j] for n in range(TAPS - j)) for j in range(length)] for h in range(CHANNELS)
            ]
            np.testing.assert_allclose(shift.kernel(system, length), want, atol=1e-13)
        # At the start B is the first unit vector and the filter is C itself.
        first = jnp.eye(TAPS)[jnp.zeros(CHANNELS, int)]
        np.testing.assert_allclose(shift.shift(first, jnp.asarray(c), jnp.asarray(d)).taps, c, atol=1e-13)


@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_all_ways_are_the_state_space(length):
    params, u = parameters(), RNG.normal(size=(BATCH, length, CHANNELS))
    state = RNG.normal(size=(BATCH, CHANNELS, TAPS))
    resets = RNG.random((BATCH, length)) < 0.15
    never = np.zeros_like(resets)
    lengths = np.array([0, length])
    with jax.enable_x64(True):
        system = shift.shift(*(jnp.asarray(x) for x in params))
        x, s, r = jnp.asarray(u), jnp.asarray(state), jnp.asarray(resets)
        want, want_reset = oracle(params, x, s, jnp.asarray(never)), oracle(params, x, s, r)
        np.testing.assert_allclose(
            shift.convolve(system, x), toeplitz_convolution(u, shift.kernel(system, length)) + params[2] * u, atol=1e-12
        )
        for run in (shift.scan, shift.chunked, lambda *a, **k: shift.chunked(*a, chunk_size=16, **k)):
            for resets_, y_want, given_ in ((None, want, never), (r, want_reset, resets)):
                y, final = run(system, x, state=s, resets=resets_)
                np.testing.assert_allclose(y, y_want, atol=1e-12)
                np.testing.assert_allclose(final, last_inputs(u, state, given_, [length] * 2), atol=1e-15)
        y, final = shift.prefill(system, x, jnp.asarray(lengths), state=s)
        np.testing.assert_allclose(y, want, atol=1e-12)
        np.testing.assert_allclose(final, last_inputs(u, state, never, lengths), atol=1e-15)
        y, final = shift.step(system, x[:, 0], s)
        np.testing.assert_allclose(y, want[:, 0], atol=1e-12)
        np.testing.assert_allclose(
            shift.prefill(system, x, jnp.asarray(lengths))[0], shift.convolve(system, x), atol=1e-12
        )


def test_gradients():
    params, u = parameters(), RNG.normal(size=(BATCH, LENGTH, CHANNELS))
    state, weight = RNG.normal(size=(BATCH, CHANNELS, TAPS)), RNG.normal(size=u.shape)
    resets = jnp.asarray(RNG.random((BATCH, LENGTH)) < 0.1)

    def loss(run):
        return jax.jit(jax.grad(lambda p, u, s: jnp.sum(weight * run(p, u, s)), argnums=(0, 1, 2)))

    def ours(way, **kwargs):
        return loss(lambda p, u, s: way(shift.shift(*p), u, state=s, resets=resets, **kwargs)[0])

    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, (params, u, state))
        want = loss(lambda p, u, s: oracle(p, u, s, resets))(*args)
        for way, kwargs in ((shift.chunked, {"chunk_size": 16}), (shift.scan, {})):
            got = ours(way, **kwargs)(*args)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-10)


def test_bfloat16_inputs_are_filtered_in_float32():
    params = [jnp.asarray(x, jnp.float32) for x in parameters()]
    u = jnp.asarray(RNG.normal(size=(BATCH, LENGTH, CHANNELS)), jnp.bfloat16)
    system = shift.shift(*params)
    y = shift.convolve(system, u)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, shift.convolve(system, u.astype(jnp.float32)).astype(jnp.bfloat16))
    y, state = shift.step(system, u[:, 0], shift.zero_state(system, BATCH))
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
