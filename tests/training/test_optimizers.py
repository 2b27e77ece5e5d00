import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util

from t5x_ssm.errors import UserError
from t5x_ssm.layers.basic import MLP
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import optimizers, parameter_groups, schedules
from t5x_ssm.training.parameter_groups import ParameterGroup, parameter_path


def network(seed=0):
    """Parameters with the names of a scanned GSS decoder, and some that lie in wait for careless patterns."""
    random = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    block = {
        "mixer_norm": {"scale": array(2, 4), "bias": array(2, 4)},
        "mixer": {
            "gate": {"kernel": array(2, 4, 6)},
            "ssm": {
                "lambda_log_re": array(2, 3),
                "lambda_log_im": array(2, 3),
                "log_dt": array(2, 4),
                "b_re": array(2, 3),
                "c_re": array(2, 4, 3),
                "d": array(2, 4),
            },
        },
        "lossm": {"b_re": array(3), "bias_kernel": array(2)},
    }
    return {"embedding": {"embedding": array(5, 4)}, "stack": {"segment_0": {"block_0": block}}}


def by_path(tree):
    return {parameter_path(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


STATE_SPACE = {f"stack/segment_0/block_0/mixer/ssm/{x}" for x in ("lambda_log_re", "lambda_log_im", "log_dt", "b_re")}
UNDECAYED = {f"stack/segment_0/block_0/mixer_norm/{leaf}" for leaf in ("scale", "bias")}


def test_default_groups_match_whole_paths():
    labels = by_path(parameter_groups.group_labels(network(), parameter_groups.default_groups()))
    assert {path for path, label in labels.items() if label == "state_space"} == STATE_SPACE
    assert {path for path, label in labels.items() if label == "no_decay"} == UNDECAYED
    output = {f"stack/segment_0/block_0/mixer/ssm/{leaf}" for leaf in ("c_re", "d")}
    assert {path for path, label in labels.items() if label == "state_space_decayed"} == output


def test_groups_of_the_gss_hybrid_of_the_paper():
    tokens = jnp.zeros((1, 8), jnp.int32)
    network = Decoder(32000, 1024, "gss*3 chunk", 16, mlp=functools.partial(MLP, hidden=4096))
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens, tokens, enable_dropout=False))["params"]
    sizes = {row["group"]: row["parameters"] for row in optimizers.adamw(0.1).group_rows(params)}
    norms = 12 * (1024 + 256) + 4 * 2 * 1024 + 1024
    assert sizes == {
        "state_space": 12 * 2 * 512,
        "no_decay": 2 * norms,
        "state_space_decayed": 12 * (2 * 256 * 512 + 256),
        "decay": 202_652_672 - 12 * (2 * 512 + 2 * 256 * 512 + 256),
    }


def test_decayed_are_exactly_the_parameters_that_are_neither_dynamics_nor_norms_nor_biases():
    params = network()
    optimizer = optimizers.adamw(0.5, weight_decay=0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    before, after = by_path(params), by_path(optax.apply_updates(params, updates))
    for path in before:
        factor = 1.0 if path in STATE_SPACE | UNDECAYED else 1.0 - 0.5 * 0.25
        np.testing.assert_array_equal(after[path], np.float32(factor) * before[path], err_msg=path)


def test_adamw_is_adamw_in_every_group():
    b1, b2, eps, clip = 0.8, 0.9, 1e-3, 1.0
    params = network()
    groups = (
        ParameterGroup("slow", r"/ssm/", learning_rate_scale=0.5, max_learning_rate=0.04, weight_decay=0.0),
        ParameterGroup("own", r"^embedding/", learning_rate=0.3, weight_decay=0.02),
        ParameterGroup("rest", ""),
    )
    schedule = schedules.warmup_cosine(0.1, 2, 5)
    optimizer = optimizers.adamw(
        schedule, b1=b1, b2=b2, eps=eps, weight_decay=0.1, groups=groups, clip_global_norm=clip
    )
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)

    expected = {path: x.astype(np.float64) for path, x in by_path(params).items()}
    mu, nu = ({path: np.zeros_like(x) for path, x in expected.items()} for _ in range(2))
    for n, rate in enumerate([0.05, 0.1, 0.0775], start=1):
        # Gradients on both sides of the clipping bound.
        grads = jax.tree.map(lambda x: x * (0.01 if n == 2 else 1.0), network(seed=n))  # noqa: B023
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        grads = {path: g.astype(np.float64) for path, g in by_path(grads).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        assert (norm > clip) == (n != 2)
        for path, g in grads.items():
            g = g * min(1.0, clip / norm)
            mu[path] = b1 * mu[path] + (1 - b1) * g
            nu[path] = b2 * nu[path] + (1 - b2) * g**2
            direction = mu[path] / (1 - b1**n) / (np.sqrt(nu[path] / (1 - b2**n)) + eps)
            lr, decay = (min(0.5 * rate, 0.04), 0.0) if "/ssm/" in path else (rate, 0.1)
            lr, decay = (0.3, 0.02) if path.startswith("embedding/") else (lr, decay)
            expected[path] = expected[path] - lr * (direction + decay * expected[path])
        for path, x in by_path(params).items():
            np.testing.assert_allclose(x, expected[path], rtol=2e-5, atol=2e-6, err_msg=f"{path}, update {n}")


def test_the_reported_learning_rate_is_the_applied_one():
    # With a constant gradient and no epsilon, Adam moves every parameter by exactly the learning rate.
    params = network()
    groups = (
        ParameterGroup("state_space", r"/ssm/", max_learning_rate=0.02),
        ParameterGroup("own", r"^embedding/", learning_rate=schedules.rsqrt(0.3, 2)),
        ParameterGroup("rest", ""),
    )
    optimizer = optimizers.adamw(
        schedules.wsd(0.05, 3, 6, 2), eps=0.0, weight_decay=0.0, groups=groups, clip_global_norm=None
    )
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(optimizer.update)
    seen = []
    for step in range(6):
        assert optimizer.updates_applied(state) == step
        rates = optimizer.learning_rates(optimizer.updates_applied(state))
        assert rates.keys() == {"learning_rate", "learning_rate/state_space", "learning_rate/own"}
        updates, state = update(grads, state, params)
        for path, change in by_path(updates).items():
            key = {"e": "learning_rate/own"}.get(path[0], "learning_rate")
            key = "learning_rate/state_space" if "/ssm/" in path else key
            np.testing.assert_allclose(-change, rates[key], rtol=1e-5, err_msg=f"{path}, {step}")
        seen.append({name: float(rate) for name, rate in rates.items()})
    np.testing.assert_allclose(
        [s["learning_rate"] for s in seen], 0.05 * np.array([1 / 3, 2 / 3, 1, 1, 0.5, 0]), rtol=1e-5
    )
    np.testing.assert_allclose(max(s["learning_rate/state_space"] for s in seen), 0.02, rtol=1e-5)


def test_frozen_parameters_stay_and_count_for_nothing():
    params = network()
    groups = (ParameterGroup("frozen", r"/ssm/", frozen=True), ParameterGroup("rest", "", weight_decay=0.0))
    optimizer = optimizers.adamw(0.1, groups=groups, clip_global_norm=1.0)
    grads = jax.tree.map(lambda x: 1e-3 * x, network(1))
    huge = jax.tree_util.tree_map_with_path(lambda path, g: g * 1e6 if "/ssm/" in parameter_path(path) else g, grads)
    state = optimizer.init(params)
    assert not any("/ssm/" in path for path in by_path(state))
    update = jax.jit(optimizer.update)
    updates, after = update(huge, state, params)
    without, _ = update(grads, state, params)
    assert all(np.all(x == 0) == ("/ssm/" in path) for path, x in by_path(updates).items())
    jax.tree.map(np.testing.assert_array_equal, updates, without)
    np.testing.assert_array_equal(optimizer.gradient_norm(huge), optimizer.gradient_norm(grads))
    assert optimizer.updates_applied(after) == 1


def test_the_layout_of_the_state_does_not_depend_on_settings():
    params = network()
    makers = (
        lambda **kw: optimizers.adamw(0.1, **kw),
        lambda **kw: optimizers.adafactor(0.1, **kw),
    )
    for make in makers:
        bare = jax.eval_shape(make(clip_global_norm=None, weight_decay=0.0).init, params)
        full = jax.eval_shape(make(clip_global_norm=2.0, weight_decay=0.3).init, params)
        assert jax.tree.structure(bare) == jax.tree.structure(full)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_the_state_is_float32_and_survives_flax_serialization(make):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network())
    optimizer = make(0.1)
    _, state = jax.jit(optimizer.update)(network(1), optimizer.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    restored = serialization.from_state_dict(optimizer.init(params), serialization.to_state_dict(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_first_moment_in_bfloat16():
    optimizer = optimizers.adamw(0.1, mu_dtype="bfloat16")
    state = serialization.to_state_dict(jax.eval_shape(optimizer.init, network()))
    flat = traverse_util.flatten_dict(state, sep="/")
    assert {str(x.dtype) for path, x in flat.items() if "/mu/" in path} == {"bfloat16"}
    assert {str(x.dtype) for path, x in flat.items() if "/nu/" in path} == {"float32"}


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def test_adafactor_by_hand():
    """Two updates: a factored and scaled matrix, and state-space leaves that are neither factored nor scaled."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (8, 6), "ssm": {"b_re": (8, 6), "c_re": (8, 6)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    optimizer = optimizers.adafactor(0.05, min_dim_size_to_factor=4, weight_decay=0.1)
    state = optimizer.init(params)
    kernel = np.asarray(params["kernel"], np.float64)
    ssm = {name: np.asarray(x, np.float64) for name, x in params["ssm"].items()}
    row, column, second = np.zeros(8), np.zeros(6), {name: np.zeros((8, 6)) for name in ssm}
    for n in (1, 2):
        grads = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = 1 - n**-0.8
        g = np.asarray(grads["kernel"], np.float64)
        row = decay * row + (1 - decay) * np.mean(g**2, axis=1)
        column = decay * column + (1 - decay) * np.mean(g**2, axis=0)
        u = g / np.sqrt(np.outer(row, column) / np.mean(row))
        u = u / max(1.0, rms(u)) * rms(kernel)
        kernel = kernel - 0.05 * (u + 0.1 * kernel)
        np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5, atol=1e-6)
        for name, lr, weight_decay in (("b_re", 1e-3, 0.0), ("c_re", 0.05, 0.1)):
            g = np.asarray(grads["ssm"][name], np.float64)
            second[name] = decay * second[name] + (1 - decay) * g**2
            u = g / np.sqrt(second[name])
            ssm[name] = ssm[name] - lr * (u / max(1.0, rms(u)) + weight_decay * ssm[name])
            np.testing.assert_allclose(params["ssm"][name], ssm[name], rtol=1e-5, atol=1e-6)


def test_adafactor_treats_the_layers_of_a_scanned_stack_as_separate_parameters():
    random = np.random.default_rng(1)

    def draw(scale=1.0):
        sizes = np.array([0.01, 1.0, 30.0]).reshape(3, 1, 1)
        return {
            "kernel": jnp.asarray(scale * sizes * random.normal(size=(3, 8, 6)), jnp.float32),
            "bias": jnp.asarray(scale * sizes[..., 0] * random.normal(size=(3, 6)), jnp.float32),
        }

    params, grads = draw(), [draw(10.0), draw(0.1)]
    optimizer = optimizers.adafactor(0.1, min_dim_size_to_factor=4)
    update = jax.jit(optimizer.update)
    results = []
    for names in (lambda p: {"segment_0": p}, lambda p: {f"segment_0_{i}": {k: p[k][i] for k in p} for i in range(3)}):
        p = names(params)
        state = optimizer.init(p)
        for g in grads:
            updates, state = update(names(g), state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    stacked, separate = results
    for name in params:
        expected = np.stack([separate[f"segment_0_{i}"][name] for i in range(3)])
        np.testing.assert_allclose(stacked["segment_0"][name], expected, rtol=1e-6)


def test_clipping_leaves_small_gradients_alone_to_the_bit():
    params, grads = network(), jax.tree.map(lambda x: 1e-2 * x, network(1))
    states = []
    for clip in (None, 1.0):
        optimizer = optimizers.adamw(0.1, clip_global_norm=clip)
        states.append(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_group_table():
    params = network()
    optimizer = optimizers.adamw(
        0.1, groups=(ParameterGroup("s4", "log_dt", frozen=True), *parameter_groups.default_groups())
    )
    rows = {row["group"]: row for row in optimizer.group_rows(params)}
    assert [(r["leaves"], r["parameters"], r["weight_decay"]) for r in rows.values()] == [
        (1, 8, 0.0),
        (3, 18, 0.0),
        (2, 16, 0.0),
        (2, 24 + 8, 0.1),
        (4, 20 + 48 + 3 + 2, 0.1),
    ]
    assert rows["s4"]["learning_rate"] == "frozen"
    assert rows["state_space"]["learning_rate"] == "min(schedule, 0.001)"
    lines = optimizer.group_table(params).splitlines()
    assert lines[0] == "optimizer: adamw" and lines[-1].split() == ["total", "12", "147"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((ParameterGroup("a", "nothing_like_it"), ParameterGroup("b", "")), "'a' has no parameter.*nothing_like_it"),
        ((ParameterGroup("a", ""), ParameterGroup("b", "kernel")), "'b' has no parameter"),
        ((ParameterGroup("a", "ssm"),), "embedding/embedding matches no parameter group"),
        ((ParameterGroup("a", "ssm"), ParameterGroup("a", "")), "different names"),
        ((ParameterGroup("a", "", frozen=True),), "nothing to train"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(UserError, match=message):
        optimizers.adamw(0.1, groups=groups).init(network())


@pytest.mark.parametrize("settings", [{"clip_global_norm": 0.0}, {"weight_decay": -1.0}, {"learning_rate": -1.0}])
def test_optimizer_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings)).replace("learning_rate", "learning rate")):
        optimizers.adamw(**({"learning_rate": 0.1} | settings))
