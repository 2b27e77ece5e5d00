"""DPLR systems against the dense matrix of all modes, conjugates included, inverted and stepped in complex128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import jit

from t5x_ssm.ssm import dplr, dplr_kernel, initialization
from t5x_ssm.ssm.dplr_kernel import KERNEL_METHODS, kernel

BATCH, LENGTH, CHANNELS, MODES = 2, 45, 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def random_parameters():
    """Off every special point."""
    full = (CHANNELS, MODES)
    names = ("a_log_re", "a_im", "p_re", "p_im", "b_re", "b_im", "c_re", "c_im")
    p = {name: normal(i, *full) for i, name in enumerate(names)}
    return p | {"a_im": 3 * p["a_im"], "log_step": normal(8, CHANNELS) / 3 - 1, "d": normal(9, CHANNELS)}


def legs_parameters(size, steps, **changes):
    """HiPPO-LegS of real size `size`, A and B shared by channels with the given time steps."""
    legs, modes = initialization.legs_normal_plus_low_rank(size), size // 2
    poles, p, b = legs.poles[:modes], legs.p[:modes], legs.b[:modes]
    c = normal(10, 2, len(steps), modes) / np.sqrt(2)
    parameters = {
        "a_log_re": np.log(-poles.real),
        "a_im": poles.imag,
        "p_re": p.real,
        "p_im": p.imag,
        "b_re": b.real,
        "b_im": b.imag,
        "c_re": c[0],
        "c_im": c[1],
        "log_step": np.log(steps),
        "d": normal(11, len(steps)),
    }
    return parameters | changes


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def both(z):
    """The numbers of the kept modes and of their conjugates."""
    return jnp.concatenate([z, z.conj()], axis=-1)


def dense(p):
    """(Ā, B̄, C, D) over all modes: complex [H, M, M], [H, M], [H, M] and [H]."""
    w = both(jax.lax.complex(-jnp.exp(p["a_log_re"]), p["a_im"]))
    low, b, c = (both(jax.lax.complex(p[f"{name}_re"], p[f"{name}_im"])) for name in ("p", "b", "c"))
    identity = jnp.eye(w.shape[-1])
    a = w[..., None] * identity - low[..., :, None] * low.conj()[..., None, :]
    step = jnp.exp(p["log_step"])[:, None, None]
    inverse = jnp.linalg.inv(identity - step / 2 * a)
    return inverse @ (identity + step / 2 * a), (inverse @ (step * b[..., None]))[..., 0], c, p["d"]


def recur(system, u, state=None, resets=None):
    """y [B, L, H] and the states before the first and after each token, [L + 1, B, H, M] complex."""
    a, b, c, d = system
    state = jnp.zeros((u.shape[0], *c.shape), complex) if state is None else state
    resets = jnp.zeros(u.shape[:2], bool) if resets is None else resets

    def body(x, inputs):
        token, reset = inputs
        x = jnp.where(reset[:, None, None], 0, x)
        x = jnp.einsum("hij,bhj->bhi", a, x) + b * token[..., None]
        return x, (jnp.sum(c * x, -1).real + d * token, x)

    _, (y, states) = jax.lax.scan(body, state, (jnp.swapaxes(u, 0, 1), resets.T))
    return jnp.swapaxes(y, 0, 1), jnp.concatenate([state[None], states])


def dense_kernel(p, length):
    """The response to an impulse, [H, length]."""
    a, b, c, _ = dense(p)
    impulse = jnp.zeros((1, length, len(b))).at[:, 0].set(1)
    return recur((a, b, c, jnp.zeros(len(b))), impulse)[0][0].T


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 45, 1100])
def test_kernel_and_its_gradient(length):
    """Both methods, at lengths that are odd, one, and no power of two."""
    weight = normal(12, CHANNELS, length)

    def run(kernel):
        def total(p):
            value = kernel(p)
            return jnp.sum(weight * value), value

        return jit(jax.value_and_grad(total, has_aux=True))

    with jax.enable_x64(True):
        p = arrays(random_parameters())
        (_, want), want_gradient = run(lambda p: dense_kernel(p, length))(p)
        for method in KERNEL_METHODS:
            (_, value), gradient = run(lambda p, m=method: kernel(dplr.s4(**p), length, method=m))(p)
            np.testing.assert_allclose(value, want, atol=1e-11, err_msg=method)
            for key in p:
                np.testing.assert_allclose(gradient[key], want_gradient[key], rtol=1e-9, atol=1e-9, err_msg=key)


def test_the_legs_start_is_the_hippo_system():
    """A unitary change of basis: the kernel of the real matrix, with C = C_real V."""
    size, length = 16, 50
    a, b = initialization.hippo_legs(size)
    c = normal(13, 2, size)
    rotated = c @ initialization.legs_normal_plus_low_rank(size).vectors[:, : size // 2]
    steps = np.array([1e-2, 0.2])
    with jax.enable_x64(True):
        parameters = arrays(legs_parameters(size, steps, c_re=rotated.real, c_im=rotated.imag))
        value = kernel(dplr.s4(**parameters), length)
    for h, step in enumerate(steps):
        inverse = np.linalg.inv(np.eye(size) - step / 2 * a)
        a_bar, state = inverse @ (np.eye(size) + step / 2 * a), inverse @ (step * b)
        for l in range(length):
            np.testing.assert_allclose(value[h, l], c[h] @ state, atol=1e-11)
            state = a_bar @ state


def run_all(system, u, state, resets, lengths):
    """Every way to run: a dictionary of (y, state)."""
    return {
        "convolve": (dplr.convolve(system, u), None),
        "scan": dplr.scan(system, u, state=state, resets=resets),
        "chunked": dplr.chunked(system, u, state=state, resets=resets, chunk_size=15),
        "one chunk": dplr.chunked(system, u, resets=resets),
        "prefill": dplr.prefill(system, u, lengths, state=state),
        "step": dplr.step(system, u[:, 0], state),
    }


def oracle_all(system, u, state, resets, lengths):
    y, states = recur(system, u, state)
    y_reset, states_reset = recur(system, u, state, resets)
    y_zero_reset, states_zero_reset = recur(system, u, None, resets)
    return {
        "convolve": (recur(system, u)[0], None),
        "scan": (y_reset, states_reset[-1]),
        "chunked": (y_reset, states_reset[-1]),
        "one chunk": (y_zero_reset, states_zero_reset[-1]),
        "prefill": (y, states[lengths, np.arange(BATCH)]),
        "step": (y[:, 0], states[1]),
    }


def kept(state):
    """The kept modes as complex numbers, of our pair or of the oracle's full state."""
    return jax.lax.complex(*state) if isinstance(state, tuple) else state[..., : state.shape[-1] // 2]


@pytest.mark.slow
def test_all_ways_are_the_recurrence():
    """Outputs and states from a random state, and every gradient, in float64."""
    u, lengths = normal(14, BATCH, LENGTH, CHANNELS), jnp.array([0, 23])
    x0 = normal(15, 2, BATCH, CHANNELS, MODES)
    resets = jnp.asarray(normal(16, BATCH, LENGTH) > 1.4)

    def compare(run, system, split):
        def total(p, u, x0):
            outputs = run(system(p), u, split(x0), resets, lengths)
            loss = 0.0
            for i, (y, state) in enumerate(outputs.values()):
                loss += jnp.sum(jnp.cos(i + jnp.arange(y.size).reshape(y.shape)) * y)
                if state is not None:
                    z = kept(state)
                    loss += jnp.sum(jnp.cos(i + jnp.arange(z.size).reshape(z.shape)) * (z.real + 2 * z.imag))
            return loss, outputs

        return jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    with jax.enable_x64(True):
        args = arrays((random_parameters(), u, x0))
        (_, got), gradients = compare(run_all, lambda p: dplr.s4(**p), tuple)(*args)
        (_, want), want_gradients = compare(oracle_all, dense, lambda x: both(jax.lax.complex(x[0], x[1])))(*args)
        for way, (y, state) in want.items():
            np.testing.assert_allclose(got[way][0], y, atol=1e-10, err_msg=way)
            if state is not None:
                np.testing.assert_allclose(kept(got[way][1]), kept(state), atol=1e-10, err_msg=way)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def float64_ways():
    """Compiled once for the property tests: fixed shapes, everything that varies is an array."""
    with jax.enable_x64(True):
        p = arrays(random_parameters())
        system, exact = dplr.s4(**p), dense(p)
        chunked = jit(lambda u, x, r: dplr.chunked(system, u, state=x, resets=r, chunk_size=16))
        prefill = jit(lambda u, x, n: dplr.prefill(system, u, n, state=x))
        step = jit(lambda u, x: dplr.step(system, u, x))
        oracle = jit(lambda u, x, r: recur(exact, u, both(jax.lax.complex(x[0], x[1])), r))
    return chunked, prefill, step, oracle


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_resets_anywhere(float64_ways, data):
    chunked, _, _, oracle = float64_ways
    starts = [data.draw(st.sets(st.integers(0, LENGTH - 1)), label=f"starts of row {b}") for b in range(BATCH)]
    resets = np.zeros((BATCH, LENGTH), bool)
    for b in range(BATCH):
        resets[b, sorted(starts[b])] = True
    u, x0 = normal(17, BATCH, LENGTH, CHANNELS), normal(18, 2, BATCH, CHANNELS, MODES)
    with jax.enable_x64(True):
        y, (re, im) = chunked(u, tuple(x0), resets)
        want, states = oracle(u, x0, resets)
    np.testing.assert_allclose(y, want, atol=1e-11)
    np.testing.assert_allclose(np.asarray(re) + 1j * np.asarray(im), np.asarray(states)[-1, ..., :MODES], atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(lengths=st.tuples(*[st.integers(0, LENGTH)] * BATCH))
def test_prefill_then_steps_is_the_whole(float64_ways, lengths):
    """Ragged prompts from nothing to the whole, three steps after each; what is behind the prompts does not matter."""
    _, prefill, step, oracle = float64_ways
    u, x0 = normal(19, BATCH, LENGTH, CHANNELS), normal(20, 2, BATCH, CHANNELS, MODES)
    more = normal(21, BATCH, 3, CHANNELS)
    after = np.arange(LENGTH)[None, :, None] >= np.array(lengths)[:, None, None]
    with jax.enable_x64(True):
        y, state = prefill(np.where(after, 1e3, u), tuple(x0), np.array(lengths))
        want, states = oracle(u, x0, np.zeros((BATCH, LENGTH), bool))
        np.testing.assert_allclose(np.where(after, 0, y), np.where(after, 0, want), atol=1e-10)
        begin = states[np.array(lengths), np.arange(BATCH), :, :MODES]
        padded = np.concatenate([more, np.zeros((BATCH, LENGTH - 3, CHANNELS))], axis=1)
        continued, _ = oracle(padded, np.stack([begin.real, begin.imag]), np.zeros((BATCH, LENGTH), bool))
        for l in range(3):
            y, state = step(more[:, l], state)
            np.testing.assert_allclose(y, continued[:, l], atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 33])
def test_every_length_and_chunk(length):
    u = normal(22, BATCH, length, CHANNELS)
    with jax.enable_x64(True):
        p = arrays(random_parameters())
        want, states = recur(dense(p), jnp.asarray(u))
        for chunk_size in {1, 31, length, 1000}:
            run = jit(lambda p, u, chunk_size=chunk_size: dplr.chunked(dplr.s4(**p), u, chunk_size=chunk_size))
            y, state = run(p, u)
            np.testing.assert_allclose(y, want, atol=1e-11)
            np.testing.assert_allclose(kept(state), kept(states[-1]), atol=1e-11)


@pytest.mark.slow
def test_bidirectional_with_documents():
    """Lag 0 belongs to the forward system; the future's part begins at the next token. Values and gradients."""
    length = 40
    u, weight = normal(23, BATCH, length, CHANNELS), normal(24, BATCH, length, CHANNELS)
    resets = normal(25, BATCH, length) > 1.2
    other = {name: normal(30 + i, *x.shape) / 2 for i, (name, x) in enumerate(random_parameters().items())}

    def ours(p, q, u):
        y = dplr.bidirectional(dplr.s4(**p), dplr.s4(**q), u, resets=resets)
        return jnp.sum(weight * y), y

    def theirs(p, q, u):
        a, b, c, d = dense(q)
        # Backwards in time; the state before a token's own step is what the future sends. Documents begin at their ends.
        backwards, begins = u[:, ::-1], jnp.roll(resets, -1, axis=1)[:, ::-1]
        _, states = recur((a, b, c, d), backwards, None, begins)
        before = jnp.where(begins.T[..., None, None], 0, states[:-1])
        y = recur(dense(p), u, None, resets)[0] + jnp.einsum("hm,lbhm->blh", c, before).real[:, ::-1]
        return jnp.sum(weight * y), y

    with jax.enable_x64(True):
        args = arrays((random_parameters(), other, u))
        (_, got), gradient = jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(*args)
        (_, want), want_gradient = jit(jax.value_and_grad(theirs, argnums=(0, 1, 2), has_aux=True))(*args)
    np.testing.assert_allclose(got, want, atol=1e-11)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------------------
# float32
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "tolerance", "steps"), [(1024, 1e-5, (1e-3, 1e-2, 1e-1)), (65536, 1e-4, (1e-3,))], ids=["short", "long"]
)
def test_float32_accuracy_of_legs(length, tolerance, steps):
    """N = 64 over the published range of Δ: values, states and all gradients against float64 of the rounded parameters."""
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), legs_parameters(64, steps))
    u, weight = (normal(seed, 1, length, len(steps)).astype(np.float32) for seed in (26, 27))

    def runs(p):
        system = dplr.s4(**p)
        return {
            "convolve": dplr.convolve(system, u),
            "chunked": dplr.chunked(system, u, chunk_size=length // 8),
            "prefill": dplr.prefill(system, u, jnp.full(1, length - 100)),
            "scan": dplr.scan(system, u),
        }

    def loss(p, way):
        y = runs(p)[way]
        return jnp.sum(weight * (y[0] if isinstance(y, tuple) else y))

    got, gradients = jit(lambda p: (runs(p), {way: jax.grad(loss)(p, way) for way in ("convolve", "chunked")}))(single)

    def oracle(p, u):
        y, states = recur(dense(p), u)
        return jnp.sum(weight * y), (y, states[length - 100], states[length], jnp.abs(states).max())

    with jax.enable_x64(True):
        p, x = arrays(jax.tree.map(lambda x: x.astype(np.float64), (single, u)))
        (_, found), want = jit(jax.value_and_grad(oracle, has_aux=True))(p, x)
    (y, early, last, state_scale), want = jax.tree.map(np.asarray, (found, want))
    for way, value in got.items():
        output, state = value if isinstance(value, tuple) else (value, None)
        assert output.dtype == jnp.float32
        for h in range(len(steps)):
            error = np.abs(np.asarray(output, np.float64) - y)[..., h].max()
            assert error < tolerance * np.abs(y[..., h]).max(), (way, h)
        if state is not None:
            exact = kept(early if way == "prefill" else last)
            error = np.abs(np.asarray(state[0], np.float64) + 1j * np.asarray(state[1], np.float64) - exact).max()
            assert error < tolerance * state_scale, way
    for way, gradient in gradients.items():
        for key, exact in want.items():
            error = np.abs(np.asarray(gradient[key], np.float64) - exact).max()
            assert error < tolerance * np.abs(exact).max(), (way, key)


@pytest.mark.parametrize("method", KERNEL_METHODS)
def test_float32_kernels_of_legs(method):
    steps = np.array([1e-3, 1e-2, 1e-1])
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), legs_parameters(64, steps))
    value = np.asarray(jit(lambda p: kernel(dplr.s4(**p), 1024, method=method))(single), np.float64)
    with jax.enable_x64(True):
        exact = jit(lambda p: dense_kernel(p, 1024))(arrays(jax.tree.map(lambda x: x.astype(np.float64), single)))
    exact = np.asarray(exact)
    assert (np.abs(value - exact).max(1) < 1e-5 * np.abs(exact).max(1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", KERNEL_METHODS)
def test_groups_of_channels_and_of_frequencies_change_nothing(monkeypatch, method):
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_parameters())

    def value_and_gradient():
        run = lambda p: jnp.sum(jnp.sin(kernel(dplr.s4(**p), LENGTH, method=method)))
        return jit(jax.value_and_grad(run))(p)

    whole = value_and_gradient()
    monkeypatch.setattr(dplr_kernel, "GROUP_ELEMENTS", 100)  # one channel at a time
    monkeypatch.setattr(dplr_kernel, "CAUCHY_GROUP_ELEMENTS", 64)  # four frequencies, the last group not full
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(value_and_gradient()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_causality_by_gradient():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_parameters())
    u = jnp.asarray(normal(28, 1, LENGTH, CHANNELS), jnp.float32)
    gradient = jit(jax.jacrev(lambda u: dplr.chunked(dplr.s4(**p), u, chunk_size=40)[0][0].sum(-1)))(u)[:, 0]
    size = np.abs(gradient).max(-1)  # [output position, input position]
    later = np.arange(LENGTH)[None] > np.arange(LENGTH)[:, None]
    assert size[later].max() < 1e-6 * size.max()
    assert np.all(np.diag(size) > 1e-3)


def test_bfloat16_inputs_leave_the_states_in_float32():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_parameters())
    u = jnp.asarray(normal(29, BATCH, LENGTH, CHANNELS), jnp.bfloat16)

    def run(u):
        system = dplr.s4(**p)
        return run_all(system, u, dplr.zero_state(system, BATCH), jnp.zeros((BATCH, LENGTH), bool), jnp.full(2, 5))

    for way, (y, state) in jax.eval_shape(run, u).items():
        assert y.dtype == jnp.bfloat16, way
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state)), way


@pytest.mark.slow
def test_a_layer_of_65536_tokens_needs_at_most_1536_mib():
    """The compiler's temporary memory of forward and backward at SPADE's size, where one sequence is 256 MiB."""
    channels, modes, length = 1024, 32, 65536
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    p = [shape(modes)] * 6 + [shape(channels, modes)] * 2 + [shape(channels)] * 2

    def loss(p, u, weight):
        return jnp.sum(weight * dplr.convolve(dplr.s4(*p), u))

    u = shape(1, length, channels)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(p, u, u).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 1536 * 2**20


def test_no_operation_is_left_to_a_linear_algebra_library():
    """All of it lowers for accelerators as products, FFTs and elementwise operations."""
    system = jax.eval_shape(lambda p: dplr.s4(**p), arrays(random_parameters()))
    for method in KERNEL_METHODS:
        run = jax.jit(jax.grad(lambda s, method=method: kernel(s, 64, method=method).sum()))
        text = run.trace(system).lower(lowering_platforms=("tpu",)).as_text()
        assert "lapack" not in text and "custom_call @" not in text.replace("custom_call @Sharding", "")


def test_settings_that_cannot_be_are_refused():
    system = dplr.s4(**arrays(random_parameters()))
    with pytest.raises(ValueError, match="choose method from krylov, cauchy"):
        kernel(system, 8, method="doubling")
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        dplr.chunked(system, jnp.zeros((1, 5, CHANNELS)), chunk_size=0)
