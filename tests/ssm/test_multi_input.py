"""S5's system against the recurrence of the paper in complex128, one token after another: values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ssm.ssm import diagonal_scan, initialization, multi_input

BATCH, LENGTH, CHANNELS, MODES = 2, 45, 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def parameters():
    return {
        "lambda_re": -np.abs(normal(0, MODES)),
        "lambda_im": 3 * normal(1, MODES),
        "b_re": normal(2, MODES, CHANNELS),
        "b_im": normal(3, MODES, CHANNELS),
        "c_re": normal(4, CHANNELS, MODES),
        "c_im": normal(5, CHANNELS, MODES),
        "log_step": normal(6, MODES) / 3 - 1,
        "d": normal(7, CHANNELS),
    }


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def exact(p, *, discretization="zoh", conjugate_pairs=True, clip_eigs=False, step_rescale=1.0, scale=1.0):
    """(Ā, B̄, C, D) by the paper's formulas; `scale` multiplies Δ and may have leading axes."""
    re = jnp.clip(p["lambda_re"], max=-1e-4) if clip_eigs else p["lambda_re"]
    poles = jax.lax.complex(re, p["lambda_im"])
    step = scale * step_rescale * jnp.exp(p["log_step"])
    if discretization == "zoh":
        a = jnp.exp(step * poles)
        gain = (a - 1) / poles
    else:
        a = (1 + step * poles / 2) / (1 - step * poles / 2)
        gain = step / (1 - step * poles / 2)
    b = gain[..., None] * jax.lax.complex(p["b_re"], p["b_im"])
    return a, b, (2 if conjugate_pairs else 1) * jax.lax.complex(p["c_re"], p["c_im"]), p["d"]


def recur(system, u, state=None, resets=None):
    """y [B, L, H] and the states before the first and after each token, [L + 1, B, P]; Ā [(L, B), P], B̄ [(L, B), P, H]."""
    a, b, c, d = system
    state = jnp.zeros((u.shape[0], c.shape[1]), complex) if state is None else state
    resets = jnp.zeros(u.shape[:2], bool) if resets is None else resets
    a = jnp.broadcast_to(a, (u.shape[1], u.shape[0], c.shape[1]))
    b = jnp.broadcast_to(b, (u.shape[1], u.shape[0], *c.shape[::-1]))

    def body(x, inputs):
        token, reset, a, b = inputs
        x = a * jnp.where(reset[:, None], 0, x) + jnp.einsum("bph,bh->bp", b, token)
        return x, ((x @ c.T).real + d * token, x)

    _, (y, states) = jax.lax.scan(body, state, (jnp.swapaxes(u, 0, 1), resets.T, a, b))
    return jnp.swapaxes(y, 0, 1), jnp.concatenate([state[None], states])


def run_all(system, u, state, resets, lengths):
    """Every way to run: a dictionary of (y, state)."""
    return {
        "convolve": (multi_input.convolve(system, u), None),
        "scan": multi_input.scan(system, u, state=state, resets=resets),
        "chunked": multi_input.chunked(system, u, state=state, resets=resets, chunk_size=16),
        "chunked without resets": multi_input.chunked(system, u, state=state, chunk_size=16),
        "one chunk": multi_input.chunked(system, u, resets=resets),
        "prefill": multi_input.prefill(system, u, lengths, state=state),
        "step": multi_input.step(system, u[:, 0], state),
    }


def recur_all(system, u, state, resets, lengths):
    y, states = recur(system, u, state)
    y_reset, states_reset = recur(system, u, state, resets)
    y_zero_reset, states_zero_reset = recur(system, u, None, resets)
    return {
        "convolve": (recur(system, u)[0], None),
        "scan": (y_reset, states_reset[-1]),
        "chunked": (y_reset, states_reset[-1]),
        "chunked without resets": (y, states[-1]),
        "one chunk": (y_zero_reset, states_zero_reset[-1]),
        "prefill": (y, states[lengths, np.arange(BATCH)]),
        "step": (y[:, 0], states[1]),
    }


def assert_trees_close(found, wanted, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        bound = tolerance * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"discretization": "bilinear", "conjugate_pairs": False}, marks=pytest.mark.slow),
        pytest.param({"clip_eigs": True, "step_rescale": 1.7}, marks=pytest.mark.slow),
    ],
    ids=["zoh", "bilinear", "clipped"],
)
def test_all_ways_are_the_recurrence(options):
    """Outputs and states from a random state, and every gradient, in float64."""
    p = parameters()
    if options.get("clip_eigs"):
        p["lambda_re"][0] = 0.3
    u, x0 = normal(10, BATCH, LENGTH, CHANNELS), normal(11, 2, BATCH, MODES)
    resets, lengths = jnp.asarray(normal(12, BATCH, LENGTH) > 1.4), jnp.array([0, 23])
    weights = {}

    def weight(way, shape):
        return weights.setdefault(way, normal(len(weights) + 50, *shape))

    def total(run, make, of_state):
        def value(p, u, x0):
            outputs = run(make(p), u, of_state(x0), resets, lengths)
            loss = 0.0
            for way, (y, state) in outputs.items():
                loss += jnp.sum(weight(way, y.shape) * y)
                if state is not None:
                    re, im = state if isinstance(state, tuple) else (state.real, state.imag)
                    loss += jnp.sum(weight(f"{way} re", re.shape) * re) + jnp.sum(weight(f"{way} im", im.shape) * im)
            return loss, outputs

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    with jax.enable_x64(True):
        args = arrays((p, u, x0))
        ours = total(run_all, lambda p: multi_input.s5(**p, **options), tuple)
        theirs = total(recur_all, lambda p: exact(p, **options), lambda x: x[0] + 1j * x[1])
        (_, got), got_gradients = ours(*args)
        (_, want), want_gradients = theirs(*args)
    for way, (y, state) in want.items():
        np.testing.assert_allclose(got[way][0], y, atol=1e-10, err_msg=way)
        if state is not None:
            np.testing.assert_allclose(got[way][1][0] + 1j * np.asarray(got[way][1][1]), state, atol=1e-10, err_msg=way)
    assert_trees_close(got_gradients, want_gradients, 1e-10)
    if options.get("clip_eigs"):
        assert got_gradients[0]["lambda_re"][0] == 0


@pytest.mark.slow
def test_bidirectional():
    """The backward direction is the recurrence of the reversed row; documents are run alone. Values and gradients."""
    p = parameters() | {"c2_re": normal(8, CHANNELS, MODES), "c2_im": normal(9, CHANNELS, MODES)}
    u, weight = normal(13, BATCH, LENGTH, CHANNELS), normal(14, BATCH, LENGTH, CHANNELS)
    starts = [0, 7, 8, 30, LENGTH]
    resets = np.zeros((BATCH, LENGTH), bool)
    resets[:, starts[:-1]] = True

    def split(p):
        return {k: v for k, v in p.items() if "2" not in k}, (2 * p["c2_re"], 2 * p["c2_im"])

    def ours(p, u):
        p, c2 = split(p)
        system = multi_input.s5(**p)
        backward = system._replace(c_re=c2[0], c_im=c2[1])
        return multi_input.bidirectional(system, backward, u, resets=jnp.asarray(resets))

    def theirs(p, u):
        p, c2 = split(p)
        a, b, c, d = exact(p)
        parts = []
        for first, end in itertools.pairwise(starts):
            document = u[:, first:end]
            ahead, _ = recur((a, b, c, d), document)
            back, _ = recur((a, b, jax.lax.complex(*c2), jnp.zeros_like(d)), document[:, ::-1])
            parts.append(ahead + back[:, ::-1])
        return jnp.concatenate(parts, axis=1)

    def total(run):
        return jax.jit(jax.value_and_grad(lambda p, u: (jnp.sum(weight * run(p, u)), run(p, u)), (0, 1), has_aux=True))

    with jax.enable_x64(True):
        (_, got), got_gradients = total(ours)(*arrays((p, u)))
        (_, want), want_gradients = total(theirs)(*arrays((p, u)))
    np.testing.assert_allclose(got, want, atol=1e-10)
    assert_trees_close(got_gradients, want_gradients, 1e-10)


@pytest.mark.slow
def test_irregular_sampling():
    """Every token has its own step; gradients reach the steps too. Phases go beyond a turn, where whole turns matter."""
    p = parameters()
    p["lambda_im"] = 40 * p["lambda_im"]
    u, x0, weight = (
        normal(15, BATCH, LENGTH, CHANNELS),
        normal(16, 2, BATCH, MODES),
        normal(17, BATCH, LENGTH, CHANNELS),
    )
    scale = np.exp(normal(18, BATCH, LENGTH))
    resets = jnp.asarray(normal(19, BATCH, LENGTH) > 1.4)

    def ours(p, u, x0, scale):
        y, state = multi_input.scan(multi_input.s5(**p), u, state=tuple(x0), resets=resets, step_scale=scale)
        return jnp.sum(weight * y) + jnp.sum(state[0]) + 2 * jnp.sum(state[1]), y

    def theirs(p, u, x0, scale):
        y, states = recur(exact(p, scale=scale.T[..., None]), u, x0[0] + 1j * x0[1], resets)
        return jnp.sum(weight * y) + jnp.sum(states[-1].real) + 2 * jnp.sum(states[-1].imag), y

    with jax.enable_x64(True):
        args = arrays((p, u, x0, scale))
        (_, got), got_gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3), has_aux=True))(*args)
        (_, want), want_gradients = jax.jit(jax.value_and_grad(theirs, (0, 1, 2, 3), has_aux=True))(*args)
        np.testing.assert_allclose(got, want, atol=1e-10)
        assert_trees_close(got_gradients, want_gradients, 1e-10)
        single = jax.tree.map(lambda x: x.astype(jnp.float32), args)
        rounded = jax.tree.map(lambda x: x.astype(jnp.float64), single)
        want = theirs(*rounded)[1]
    got = jax.jit(lambda *args: ours(*args)[1])(*single)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@functools.cache
def float64_ways():
    """Compiled once for the property tests: fixed shapes, everything that varies is an array."""
    with jax.enable_x64(True):
        p = arrays(parameters())
        system, oracle = multi_input.s5(**p), exact(p)
        scan = jax.jit(lambda u, x, r: multi_input.scan(system, u, state=x, resets=r))
        chunked = jax.jit(lambda u, x, r: multi_input.chunked(system, u, state=x, resets=r, chunk_size=16))
        prefill = jax.jit(lambda u, x, n: multi_input.prefill(system, u, n, state=x))
        step = jax.jit(lambda u, x: multi_input.step(system, u, x))
        recurrence = jax.jit(lambda u, x, r: recur(oracle, u, x[0] + 1j * x[1], r))
    return scan, chunked, prefill, step, recurrence


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_resets_anywhere(data):
    scan, chunked, _, _, recurrence = float64_ways()
    resets = np.zeros((BATCH, LENGTH), bool)
    for b in range(BATCH):
        resets[b, sorted(data.draw(st.sets(st.integers(0, LENGTH - 1)), label=f"starts of row {b}"))] = True
    u, x0 = normal(20, BATCH, LENGTH, CHANNELS), normal(21, 2, BATCH, MODES)
    with jax.enable_x64(True):
        want, states = recurrence(u, x0, resets)
        for run in (scan, chunked):
            y, (re, im) = run(u, tuple(x0), resets)
            np.testing.assert_allclose(y, want, atol=1e-11)
            np.testing.assert_allclose(re + 1j * np.asarray(im), states[-1], atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(lengths=st.tuples(*[st.integers(0, LENGTH - 3)] * BATCH))
def test_prefill_then_steps_is_the_whole(lengths):
    """Ragged prompts; three steps after each; what stands behind the prompts must not matter."""
    _, _, prefill, step, recurrence = float64_ways()
    u, x0, more = normal(22, BATCH, LENGTH, CHANNELS), normal(23, 2, BATCH, MODES), normal(24, BATCH, 3, CHANNELS)
    ends = np.array(lengths)[:, None, None]
    garbage = np.where(np.arange(LENGTH)[None, :, None] < ends, u, 1e3)
    whole = u.copy()
    for b, n in enumerate(lengths):
        whole[b, n : n + 3] = more[b]
    with jax.enable_x64(True):
        _, state = prefill(garbage, tuple(x0), np.array(lengths))
        got = []
        for l in range(3):
            y, state = step(more[:, l], state)
            got.append(y)
        want, _ = recurrence(whole, x0, np.zeros((BATCH, LENGTH), bool))
    np.testing.assert_allclose(np.stack(got, 1), np.take_along_axis(want, ends + np.arange(3)[:, None], 1), atol=1e-11)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_every_length_and_chunk(length):
    p, u = parameters(), normal(25, BATCH, length, CHANNELS)
    with jax.enable_x64(True):
        p = arrays(p)
        want, states = recur(exact(p), jnp.asarray(u))
        for chunk_size in (1, 32, 1000):
            run = jax.jit(lambda p, u, n=chunk_size: multi_input.chunked(multi_input.s5(**p), u, chunk_size=n))
            y, (re, im) = run(p, u)
            np.testing.assert_allclose(y, want, atol=1e-11)
            np.testing.assert_allclose(re + 1j * np.asarray(im), states[-1], atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("elements", [8, 40, 1 << 15])
def test_blocks_of_every_kind(monkeypatch, elements, reverse):
    """One block, a few, and as many as the square root, with a ragged end: the states and all gradients of the scan."""
    monkeypatch.setattr(diagonal_scan, "STEP_ELEMENTS", elements)
    v, weight = normal(26, BATCH, 21, 2, MODES), normal(27, BATCH, 21, 2, MODES)
    x0, resets = normal(28, BATCH, 2, MODES), normal(29, BATCH, 21) > 1.2

    def ours(p, v, x0):
        return diagonal_scan.states(multi_input.s5(**p).pole, v, x0, jnp.asarray(resets), reverse)

    def theirs(p, v, x0):
        a = exact(p)[0]
        cut = np.pad(resets[:, 1:], [(0, 0), (0, 1)]) if reverse else resets

        def body(x, inputs):
            v, cut = inputs
            x = a * jnp.where(cut[:, None], 0, x) + v[:, 0] + 1j * v[:, 1]
            return x, jnp.stack([x.real, x.imag], 1)

        inputs = (jnp.swapaxes(v, 0, 1), cut.T)
        return jnp.swapaxes(jax.lax.scan(body, x0[:, 0] + 1j * x0[:, 1], inputs, reverse=reverse)[1], 0, 1)

    def total(run):
        return jax.jit(jax.value_and_grad(lambda *a: (jnp.sum(weight * run(*a)), run(*a)), (0, 1, 2), has_aux=True))

    with jax.enable_x64(True):
        args = arrays((parameters(), v, x0))
        (_, got), got_gradients = total(ours)(*args)
        (_, want), want_gradients = total(theirs)(*args)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert_trees_close(got_gradients, want_gradients, 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# float32
# ---------------------------------------------------------------------------------------------------------------------


def long_lived_parameters():
    """LegS frequencies up to 20,860 and modes that remember 65,536 tokens, at small H and P."""
    modes = 6
    p = {name: normal(i, modes, 2) for i, name in enumerate(("b_re", "b_im"))}
    p |= {name: normal(i, 2, modes) for i, name in enumerate(("c_re", "c_im"), 2)}
    legs = initialization.legs_poles(128)[[0, 3, 20, 60, 100, 127]]
    return p | {
        "lambda_re": np.array([-0.5, -0.01, -0.5, -0.02, -0.5, -0.01]),
        "lambda_im": -legs.imag,
        "log_step": np.log(np.array([1e-3, 1e-1, 1e-2, 1e-3, 1e-1, 1e-3])),
        "d": normal(5, 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize(("length", "tolerance"), [(1024, 1e-5), (65536, 1e-4)])
def test_float32_accuracy(discretization, length, tolerance):
    """Values, states and all parameter gradients against float64 of the same rounded parameters."""
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), long_lived_parameters())
    u, weight = (normal(seed, 1, length, 2).astype(np.float32) for seed in (30, 31))

    def ours(p, u):
        system = multi_input.s5(**p, discretization=discretization)
        y, state = multi_input.scan(system, u)
        return jnp.sum(weight * y), (y, state, multi_input.prefill(system, u, jnp.full(1, length - 100))[1])

    def theirs(p, u):
        y, states = recur(exact(p, discretization=discretization), u)
        return jnp.sum(weight * y), (y, states[-1], states[length - 100])

    (_, (y, *found)), gradient = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(single, u)
    with jax.enable_x64(True):
        p, x = arrays(jax.tree.map(lambda x: x.astype(np.float64), (single, u)))
        (_, (want, *states)), want_gradient = jax.jit(jax.value_and_grad(theirs, (0, 1), has_aux=True))(p, x)
    assert y.dtype == jnp.float32
    assert np.abs(np.asarray(y, np.float64) - want).max() < tolerance * np.abs(want).max()
    for (re, im), state in zip(found, states, strict=True):
        error = np.abs(np.asarray(re, np.float64) + 1j * np.asarray(im, np.float64) - state).max()
        assert error < tolerance * np.abs(state).max()
    for (path, x), leaf in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(want_gradient), strict=True
    ):
        error = np.abs(np.asarray(x, np.float64) - leaf).max()
        assert error < tolerance * np.abs(leaf).max(), jax.tree_util.keystr(path)


def test_a_half_spectrum_stands_for_the_whole():
    """2 Re(C x) over one mode of each pair is Re(C x) over both."""
    p, u = parameters(), normal(32, BATCH, LENGTH, CHANNELS)
    both = {k: np.concatenate([v, v], 1 if k[0] == "c" else 0) for k, v in p.items() if k != "d"} | {"d": p["d"]}
    for name, axis in (("lambda_im", 0), ("b_im", 0), ("c_im", 1)):
        both[name] = np.concatenate([p[name], -p[name]], axis)
    with jax.enable_x64(True):
        half, whole = jax.jit(
            lambda p, both: (
                multi_input.convolve(multi_input.s5(**p), u),
                multi_input.convolve(multi_input.s5(**both, conjugate_pairs=False), u),
            )
        )(*arrays((p, both)))
        np.testing.assert_allclose(half, whole, atol=1e-12)


def test_bfloat16_inputs_leave_the_states_in_float32():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters())
    u = jnp.asarray(normal(33, BATCH, LENGTH, CHANNELS), jnp.bfloat16)
    system = multi_input.s5(**p)
    state, lengths = multi_input.zero_state(system, BATCH), jnp.full(BATCH, 5)
    outputs, expected = jax.jit(
        lambda u: [run_all(system, x, state, None, lengths) for x in (u, u.astype(jnp.float32))]
    )(u)
    for way, (y, state) in outputs.items():
        assert y.dtype == jnp.bfloat16, way
        # What is lost is the rounding of the output alone.
        np.testing.assert_allclose(np.asarray(y, np.float32), expected[way][0], rtol=2**-8, atol=1e-5, err_msg=way)
        for leaf, exact_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected[way][1]), strict=True):
            assert leaf.dtype == jnp.float32, way
            np.testing.assert_allclose(leaf, exact_leaf, rtol=1e-4, atol=1e-5, err_msg=way)


def test_causality_by_gradient():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters())
    u = jnp.asarray(normal(34, 1, LENGTH, CHANNELS), jnp.float32)
    gradient = jax.jit(jax.jacrev(lambda u: multi_input.convolve(multi_input.s5(**p), u)[0].sum(-1)))(u)[:, 0]
    size = np.abs(gradient).max(-1)  # [output position, input position]
    later = np.arange(LENGTH)[None] > np.arange(LENGTH)[:, None]
    assert not size[later].any()
    assert np.all(np.diag(size) > 1e-3)


def test_settings_that_cannot_be_are_refused():
    p = jax.tree.map(jnp.asarray, parameters())
    with pytest.raises(ValueError, match="choose from zoh, bilinear"):
        multi_input.s5(**p, discretization="euler")
    u = jnp.zeros((1, 5, CHANNELS))
    with pytest.raises(ValueError, match="discretization='zoh'"):
        multi_input.scan(multi_input.s5(**p, discretization="bilinear"), u, step_scale=jnp.ones((1, 5)))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        multi_input.chunked(multi_input.s5(**p), u, chunk_size=0)
