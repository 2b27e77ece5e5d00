import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ssm.ssm import diagonal, initialization

BATCH, LENGTH, CHANNELS, MODES = 2, 45, 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def gss_parameters():
    shared, full = (MODES,), (CHANNELS, MODES)
    return {
        "lambda_log_re": normal(0, *shared) - 1.5,
        "lambda_log_im": normal(1, *shared),
        "c_re": normal(2, *full),
        "c_im": normal(3, *full),
        "d": normal(4, CHANNELS),
    }


def dss_parameters(steps=(CHANNELS,), largest=None):
    p = gss_parameters()
    del p["lambda_log_re"], p["lambda_log_im"]
    p["lambda_re"] = normal(0, MODES) if largest is None else np.linspace(-0.4, largest, MODES)
    p["lambda_im"] = normal(1, MODES)
    p["log_step"] = normal(5, *steps) / 3 - 1
    return p


def s4d_parameters():
    full = (CHANNELS, MODES)
    names = ("a_log_re", "a_im", "b_re", "b_im", "c_re", "c_im")
    p = {name: normal(i, *full) for i, name in enumerate(names)}
    return p | {"a_im": 3 * p["a_im"], "log_step": normal(6, CHANNELS) / 3 - 1, "d": normal(7, CHANNELS)}


# name: parameters, the system under test, the oracle. Parameters are off every special point: B, D and phases are random.
SYSTEMS = {
    "gss": (gss_parameters(), lambda p: diagonal.gss(**p), oracle.gss),
    "gss-linear-imaginary": (
        gss_parameters(),
        lambda p: diagonal.gss(**p, exp_imaginary=False),
        oracle.gss_linear_imaginary,
    ),
    "dss-exp": (dss_parameters(), lambda p: diagonal.dss(**p), oracle.dss),
    "dss-exp-re-im-separate-steps": (
        dss_parameters((CHANNELS, 2)),
        lambda p: diagonal.dss(**p, kind="exp-re-im"),
        lambda p: oracle.dss(p, "exp-re-im"),
    ),
    "dss-clip-no-scale": (
        dss_parameters(),
        lambda p: diagonal.dss(**p, kind="clip", scale=False),
        lambda p: oracle.dss(p, "clip", scale=False),
    ),
    "dss-softmax": (
        dss_parameters(largest=0.3),
        lambda p: diagonal.dss(**p, kind="softmax", length=60),
        lambda p: oracle.dss(p, "softmax", length=60),
    ),
    "s4d-zoh": (s4d_parameters(), lambda p: diagonal.s4d(**p), oracle.s4d),
    "s4d-bilinear": (
        s4d_parameters(),
        lambda p: diagonal.s4d(**p, discretization="bilinear"),
        lambda p: oracle.s4d(p, "bilinear"),
    ),
}


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def oracle_kernel(system, length):
    a, b, c, _ = system
    return jnp.sum((c * b)[..., None] * jnp.exp(jnp.arange(length) * jnp.log(a)[..., None]), -2).real


@pytest.mark.parametrize("name", SYSTEMS)
def test_kernel_and_its_gradient(name):
    parameters, ours, theirs = SYSTEMS[name]
    weight = normal(9, CHANNELS, LENGTH)
    with jax.enable_x64(True):
        p = arrays(parameters)
        value = jax.jit(lambda p: diagonal.kernel(ours(p), LENGTH))(p)
        np.testing.assert_allclose(value, oracle_kernel(theirs(p), LENGTH), atol=1e-11)
        got = jax.jit(jax.grad(lambda p: jnp.sum(weight * diagonal.kernel(ours(p), LENGTH))))(p)
        want = jax.jit(jax.grad(lambda p: jnp.sum(weight * oracle_kernel(theirs(p), LENGTH))))(p)
    for key in p:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-10, atol=1e-10, err_msg=key)


def run_all(system, u, state, resets, lengths):
    """Every way to run: a dictionary of (y, state)."""
    return {
        "convolve": (diagonal.convolve(system, u), None),
        "scan": diagonal.scan(system, u, state=state, resets=resets),
        "chunked": diagonal.chunked(system, u, state=state, resets=resets, chunk_size=16),
        "chunked without resets": diagonal.chunked(system, u, state=state, chunk_size=16),
        "one chunk": diagonal.chunked(system, u, resets=resets),
        "prefill": diagonal.prefill(system, u, lengths, state=state),
        "step": diagonal.step(system, u[:, 0], state),
    }


def oracle_all(system, u, state, resets, lengths):
    def run(state, resets):
        y, states = oracle.recur(system, u, state, resets)
        return y, states

    y, states = run(state, None)
    y_reset, states_reset = run(state, resets)
    y_zero_reset, states_zero_reset = run(None, resets)
    return {
        "convolve": (run(None, None)[0], None),
        "scan": (y_reset, states_reset[-1]),
        "chunked": (y_reset, states_reset[-1]),
        "chunked without resets": (y, states[-1]),
        "one chunk": (y_zero_reset, states_zero_reset[-1]),
        "prefill": (y, states[lengths, np.arange(BATCH)]),
        "step": (y[:, 0], states[1]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gss", "s4d-bilinear", "dss-softmax"])
def test_all_ways_are_the_recurrence(name):
    """Outputs and states from a random state, and every gradient, in float64."""
    parameters, ours, theirs = SYSTEMS[name]
    u, lengths = normal(10, BATCH, LENGTH, CHANNELS), jnp.array([0, 23])
    x0 = normal(11, 2, BATCH, CHANNELS, MODES)
    resets = jnp.asarray(normal(12, BATCH, LENGTH) > 1.4)

    def compare(run, system, split):
        def total(p, u, x0):
            outputs = run(system(p), u, split(x0), resets, lengths)
            loss = 0.0
            for i, (y, state) in enumerate(outputs.values()):
                loss += jnp.sum(jnp.cos(i + jnp.arange(y.size).reshape(y.shape)) * y)
                if state is not None:
                    re, im = (state.real, state.imag) if jnp.iscomplexobj(state) else state
                    loss += jnp.sum(jnp.cos(i + jnp.arange(re.size).reshape(re.shape)) * (re + 2 * im))
            return loss, outputs

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    with jax.enable_x64(True):
        args = arrays((parameters, u, x0))
        (_, got), got_gradients = compare(run_all, ours, tuple)(*args)
        (_, want), want_gradients = compare(oracle_all, theirs, lambda x: x[0] + 1j * x[1])(*args)
    for way, (y, state) in want.items():
        np.testing.assert_allclose(got[way][0], y, atol=1e-10, err_msg=way)
        if state is not None:
            np.testing.assert_allclose(got[way][1][0] + 1j * np.asarray(got[way][1][1]), state, atol=1e-10, err_msg=way)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got_gradients), jax.tree.leaves(want_gradients), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def float64_ways():
    """Compiled once for the property tests: fixed shapes, everything that varies is an array."""
    parameters, ours, theirs = SYSTEMS["gss"]
    with jax.enable_x64(True):
        p = arrays(parameters)
        system, exact = ours(p), theirs(p)
        chunked = jax.jit(lambda u, x, r: diagonal.chunked(system, u, state=x, resets=r, chunk_size=16))
        prefill = jax.jit(lambda u, x, n: diagonal.prefill(system, u, n, state=x))
        step = jax.jit(lambda u, x: diagonal.step(system, u, x))
        recur = jax.jit(lambda u, x, r: oracle.recur(exact, u, x[0] + 1j * x[1], r))
    return chunked, prefill, step, recur


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_resets_anywhere(float64_ways, data):
    chunked, _, _, recur = float64_ways
    starts = [data.draw(st.sets(st.integers(0, LENGTH - 1)), label=f"starts of row {b}") for b in range(BATCH)]
    resets = np.zeros((BATCH, LENGTH), bool)
    for b in range(BATCH):
        resets[b, sorted(starts[b])] = True
    u, x0 = normal(13, BATCH, LENGTH, CHANNELS), normal(14, 2, BATCH, CHANNELS, MODES)
    with jax.enable_x64(True):
        y, (re, im) = chunked(u, tuple(x0), resets)
        want, states = recur(u, x0, resets)
    np.testing.assert_allclose(y, want, atol=1e-11)
    np.testing.assert_allclose(re + 1j * np.asarray(im), states[-1], atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(lengths=st.tuples(*[st.integers(0, LENGTH)] * BATCH))
def test_prefill_then_steps_is_the_whole(float64_ways, lengths):
    """Ragged prompts from 0 to the whole; three steps after each; then what is behind the prompts must not matter."""
    _, prefill, step, recur = float64_ways
    u, x0 = normal(15, BATCH, LENGTH, CHANNELS), normal(16, 2, BATCH, CHANNELS, MODES)
    more = normal(17, BATCH, 3, CHANNELS)
    garbage = np.where(np.arange(LENGTH)[None, :, None] < np.array(lengths)[:, None, None], u, 1e3)
    with jax.enable_x64(True):
        _, state = prefill(garbage, tuple(x0), np.array(lengths))
        got = []
        for l in range(3):
            y, state = step(more[:, l], state)
            got.append(y)
        for b in range(BATCH):
            joined = np.concatenate([u[:, : lengths[b]], more, u[:, lengths[b] :]], axis=1)[:, :LENGTH]
            joined = np.concatenate([joined, more], axis=1)[:, :LENGTH] if lengths[b] + 3 > LENGTH else joined
            if lengths[b] + 3 <= LENGTH:
                want, _ = recur(joined, x0, np.zeros((BATCH, LENGTH), bool))
                np.testing.assert_allclose(np.stack(got, 1)[b], want[b, lengths[b] : lengths[b] + 3], atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 33])
def test_every_length_and_chunk(length):
    parameters, ours, theirs = SYSTEMS["s4d-zoh"]
    u = normal(18, BATCH, length, CHANNELS)
    with jax.enable_x64(True):
        p = arrays(parameters)
        want, states = oracle.recur(theirs(p), jnp.asarray(u))
        for chunk_size in (1, 32, 33, 1000):
            run = jax.jit(lambda p, u, chunk_size=chunk_size: diagonal.chunked(ours(p), u, chunk_size=chunk_size))
            y, (re, im) = run(p, u)
            np.testing.assert_allclose(y, want, atol=1e-11)
            np.testing.assert_allclose(re + 1j * np.asarray(im), states[-1], atol=1e-11)
        np.testing.assert_allclose(jax.jit(lambda p, u: diagonal.convolve(ours(p), u))(p, u), want, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional(packed):
    """Lag 0 belongs to the forward system; the future's part begins at the next token. Values and gradients."""
    u, weight = normal(25, BATCH, LENGTH, CHANNELS), normal(26, BATCH, LENGTH, CHANNELS)
    resets = normal(27, BATCH, LENGTH) > 1.2 if packed else None
    document = jnp.cumsum(resets, 1) if packed else jnp.zeros((BATCH, LENGTH), int)
    other = {name: normal(40 + i, *x.shape) / 2 for i, (name, x) in enumerate(s4d_parameters().items())}
    lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]

    def ours(p, q, u):
        y = diagonal.bidirectional(diagonal.s4d(**p), diagonal.s4d(**q), u, resets=resets)
        return jnp.sum(weight * y), y

    def theirs(p, q, u):
        k, back = (oracle_kernel(oracle.s4d(x), LENGTH) for x in (p, q))
        matrix = jnp.where(lag >= 0, k[:, np.maximum(lag, 0)], back[:, np.maximum(-lag - 1, 0)])
        same = document[:, :, None] == document[:, None, :]
        y = jnp.einsum("hij,bij,bjh->bih", matrix, same, u) + p["d"] * u
        return jnp.sum(weight * y), y

    with jax.enable_x64(True):
        args = arrays((s4d_parameters(), other, u))
        (_, got), gradient = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(*args)
        (_, want), want_gradient = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1, 2), has_aux=True))(*args)
    np.testing.assert_allclose(got, want, atol=1e-11)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------------------
# float32
# ---------------------------------------------------------------------------------------------------------------------


def long_lived_systems():
    """Modes that remember 65,536 tokens, fast phases, and LegS frequencies up to 20,860, at small H and N."""
    rng = np.random.default_rng(1)
    slow = {
        "lambda_log_re": np.array([-11.5, -9.0, -6.0, 0.5]),
        "lambda_log_im": np.array([3.4, 0.3, 2.0, 1.0]),
        "c_re": rng.normal(size=(2, 4)),
        "c_im": rng.normal(size=(2, 4)),
        "d": rng.normal(size=2),
    }
    legs = initialization.legs_poles(128)[[0, 3, 20, 60, 100, 127]]
    full = lambda x: np.broadcast_to(x, (2, 6)).copy()
    s4d = {
        "a_log_re": full(np.log([0.5, 0.01, 0.5, 0.02, 0.5, 0.01])),
        "a_im": full(legs.imag),
        **{k: rng.normal(size=(2, 6)) for k in ("b_re", "b_im", "c_re", "c_im")},
        "log_step": np.log([1e-3, 1e-1]),
        "d": rng.normal(size=2),
    }
    return {
        "gss": (slow, lambda p: diagonal.gss(**p), oracle.gss),
        "s4d-zoh": (s4d, lambda p: diagonal.s4d(**p), oracle.s4d),
        "s4d-bilinear": (
            s4d,
            lambda p: diagonal.s4d(**p, discretization="bilinear"),
            lambda p: oracle.s4d(p, "bilinear"),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gss", "s4d-zoh", "s4d-bilinear"])
@pytest.mark.parametrize(("length", "tolerance"), [(1024, 1e-5), (65536, 1e-4)])
def test_float32_accuracy(name, length, tolerance):
    """Values, states and all parameter gradients against float64 of the same rounded parameters.

    A channel's time step serves all its modes, whose contributions to its gradient may cancel (4,116 and -4,400 of a mode each
    to 289 in sum, for S4D): what floats can promise is measured by the largest of them.
    """
    parameters, ours, theirs = long_lived_systems()[name]
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), parameters)
    u, weight = (normal(seed, 1, length, 2).astype(np.float32) for seed in (20, 21))

    def runs(p, u):
        system = ours(p)
        lengths = jnp.full(1, length - 100)
        return {
            "convolve": diagonal.convolve(system, u),
            "chunked": diagonal.chunked(system, u, chunk_size=length // 8),
            "prefill": diagonal.prefill(system, u, lengths),
            "scan": diagonal.scan(system, u),
        }

    got = jax.jit(runs)(single, u)
    gradients = {
        way: jax.jit(jax.grad(lambda p, run=run: jnp.sum(weight * run(ours(p)))))(single)
        for way, run in {
            "convolve": lambda s: diagonal.convolve(s, u),
            "chunked": lambda s: diagonal.chunked(s, u, chunk_size=length // 8)[0],
        }.items()
    }
    with jax.enable_x64(True):
        p, x = arrays(jax.tree.map(lambda x: x.astype(np.float64), (single, u)))
        y, states = jax.jit(lambda p, u: oracle.recur(theirs(p), u))(p, x)
        gradient_of = jax.jit(jax.grad(lambda p: jnp.sum(weight * oracle.recur(theirs(p), x)[0])))
        want = gradient_of(p)
        gradient_scale = {key: np.abs(exact).max() for key, exact in want.items()}
        if "log_step" in p:
            modes = [
                {k: v[:, n : n + 1] if v.ndim == 2 else v for k, v in p.items()} for n in range(p["a_im"].shape[1])
            ]
            gradient_scale["log_step"] = max(np.abs(gradient_of(mode)["log_step"]).max() for mode in modes)
    scale, state_scale = np.abs(y).max(), np.abs(states).max()
    for way, value in got.items():
        output, state = value if isinstance(value, tuple) else (value, None)
        assert output.dtype == jnp.float32
        assert np.abs(np.asarray(output, np.float64) - y).max() < tolerance * scale, way
        if state is not None:
            exact = states[length - 100 if way == "prefill" else length]
            error = np.abs(np.asarray(state[0], np.float64) + 1j * np.asarray(state[1], np.float64) - exact).max()
            assert error < tolerance * state_scale, way
    for way, gradient in gradients.items():
        for key, exact in want.items():
            error = np.abs(np.asarray(gradient[key], np.float64) - exact).max()
            assert error < tolerance * gradient_scale[key], (way, key)


@pytest.mark.slow
def test_softmax_with_strong_growth():
    """e^{(L-1) Re ΔΛ} = e^300 has no float32; the kernel and its gradients have. The public gradient is wrong here."""
    length = 1000
    rng = np.random.default_rng(2)
    p = {
        "lambda_re": np.array([0.3, -0.3, 0.02], np.float32),
        "lambda_im": np.array([1.0, 2.0, 3.0], np.float32),
        "c_re": rng.normal(size=(2, 3)).astype(np.float32),
        "c_im": rng.normal(size=(2, 3)).astype(np.float32),
        "log_step": np.log(np.array([1.0, 0.1], np.float32)),
        "d": np.zeros(2, np.float32),
    }
    weight = rng.normal(size=(2, length))

    def theirs(p):
        poles = jax.lax.complex(p["lambda_re"], p["lambda_im"])
        exponent = jnp.exp(p["log_step"])[:, None, None] * poles[:, None] * jnp.arange(length)
        top = jax.lax.stop_gradient(exponent.real.max(-1, keepdims=True))
        powers = jnp.exp(exponent - top)
        c = jax.lax.complex(p["c_re"], p["c_im"])
        return jnp.einsum("hn,hnl->hl", c / poles, powers / powers.sum(-1, keepdims=True)).real

    def ours(p):
        return diagonal.kernel(diagonal.dss(**p, kind="softmax", length=length), length)

    got, gradient = jax.jit(lambda p: (ours(p), jax.grad(lambda p: jnp.sum(weight * ours(p)))(p)))(p)
    with jax.enable_x64(True):
        exact = arrays(jax.tree.map(lambda x: x.astype(np.float64), p))
        want = theirs(exact)
        want_gradient = jax.jit(jax.grad(lambda p: jnp.sum(weight * theirs(p))))(exact)
    assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()
    for key in p:
        if key != "d":
            error = np.abs(gradient[key] - want_gradient[key]).max()
            assert error < 2e-5 * np.abs(want_gradient[key]).max(), key


def test_bfloat16_inputs_leave_the_state_space_in_float32():
    """Everything between the cast in and the cast out is float32: parameters, kernels, transforms and states."""
    parameters, ours, _ = SYSTEMS["gss"]
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)
    u = jnp.asarray(normal(22, BATCH, LENGTH, CHANNELS), jnp.bfloat16)
    system = ours(p)

    def run(u):
        outputs = run_all(
            system, u, diagonal.zero_state(system, BATCH), jnp.zeros((BATCH, LENGTH), bool), jnp.full(2, 5)
        )
        return jax.tree.map(lambda x: x, outputs)

    for way, (y, state) in jax.eval_shape(run, u).items():
        assert y.dtype == jnp.bfloat16, way
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state)), way

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for sub in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)

    # What may touch bfloat16: casts, and moving tokens around. No arithmetic.
    moves = {
        "convert_element_type",
        "slice",
        "squeeze",
        "transpose",
        "reshape",
        "concatenate",
        "broadcast_in_dim",
        "copy",
    }
    moves |= {
        "pad",
        "dynamic_slice",
        "scan",
        "jit",
        "pjit",
        "checkpoint",
        "remat",
        "remat2",
        "gather",
        "select_n",
        "cond",
    }
    seen = set()
    for equation in equations(jax.make_jaxpr(run)(u).jaxpr):
        if any(getattr(v.aval, "dtype", None) == jnp.bfloat16 for v in (*equation.invars, *equation.outvars)):
            seen.add(equation.primitive.name)
    assert "convert_element_type" in seen and seen <= moves


def test_causality_by_gradient():
    parameters, ours, _ = SYSTEMS["gss"]
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)
    u = jnp.asarray(normal(23, 1, LENGTH, CHANNELS), jnp.float32)
    gradient = jax.jit(jax.jacrev(lambda u: diagonal.chunked(ours(p), u, chunk_size=40)[0][0].sum(-1)))(u)[:, 0]
    size = np.abs(gradient).max(-1)  # [output position, input position]
    later = np.arange(LENGTH)[None] > np.arange(LENGTH)[:, None]
    assert size[later].max() < 1e-6 * size.max()
    assert np.all(np.diag(size) > 1e-3)


@pytest.mark.slow
def test_padding_after_a_document_does_not_matter():
    """Different lengths of zeros behind the tokens give the same outputs."""
    parameters, ours, _ = SYSTEMS["s4d-bilinear"]
    with jax.enable_x64(True):
        system = ours(arrays(parameters))
        u = jnp.asarray(normal(24, 1, 30, CHANNELS))
        longer = diagonal.convolve(system, jnp.pad(u, [(0, 0), (0, 50), (0, 0)]))[:, :30]
        np.testing.assert_allclose(longer, diagonal.convolve(system, u), atol=1e-12)


@pytest.mark.slow
def test_a_gss_layer_of_65536_tokens_needs_at_most_512_mib():
    """The compiler's temporary memory of forward and backward at the published size; compiled, not run."""
    channels, modes, length = 256, 512, 65536
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    p = [shape(modes), shape(modes), shape(channels, modes), shape(channels, modes), shape(channels)]

    def loss(p, u, weight):
        return jnp.sum(weight * diagonal.convolve(diagonal.gss(*p), u))

    u = shape(1, length, channels)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(p, u, u).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 512 * 2**20


def test_settings_that_cannot_be_are_refused():
    p = dss_parameters()
    with pytest.raises(ValueError, match="choose kind from exp, exp-re-im, clip, softmax"):
        diagonal.dss(**p, kind="relu")
    with pytest.raises(ValueError, match="set length"):
        diagonal.dss(**p, kind="softmax")
    with pytest.raises(ValueError, match="leave scale=True"):
        diagonal.dss(**p, kind="softmax", length=5, scale=False)
    with pytest.raises(ValueError, match="choose from zoh, bilinear"):
        diagonal.s4d(**s4d_parameters(), discretization="euler")
    system = diagonal.gss(**jax.tree.map(jnp.asarray, gss_parameters()))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        diagonal.chunked(system, jnp.zeros((1, 5, CHANNELS)), chunk_size=0)
