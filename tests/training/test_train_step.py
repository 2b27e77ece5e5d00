import four_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_objective import ToyObjective, toy_batch, toy_gradient

from t5x_ssm.errors import UserError
from t5x_ssm.training import optimizers, schedules
from t5x_ssm.training.parameter_groups import ParameterGroup
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_eval_step, make_train_step, split_microbatches

OBJECTIVE = ToyObjective()


def make_optimizer(**settings):
    return optimizers.adamw(
        schedules.warmup_cosine(0.1, 2, 10), groups=(ParameterGroup("all", ""),), **({"b1": 0.5} | settings)
    )


def make_state(optimizer):
    return TrainState.create(OBJECTIVE.init(jax.random.key(0))["params"], optimizer)


def gradient_seen(state):
    """The gradient (after clipping) of the only update so far, from Adam's first moment at b1 = 1/2."""
    mu = state.to_tree()["state"]["param_states"]["1"]["inner_states"]["all"]["inner_state"]["0"]["mu"]
    return jax.tree.map(lambda x: 2 * np.asarray(x), mu)


@pytest.mark.parametrize(("num_microbatches", "clip"), [(1, 0.05), (2, 0.05), (4, 0.05), (4, None)])
def test_gradient_and_metrics_do_not_depend_on_the_microbatches(num_microbatches, clip):
    optimizer = make_optimizer(clip_global_norm=clip)
    state, batch = make_state(optimizer), toy_batch()
    step = jax.jit(make_train_step(OBJECTIVE, optimizer, num_microbatches=num_microbatches))
    after, metrics = step(state, batch)

    loss, gradient = toy_gradient(state.params, batch)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    factor = 1.0 if clip is None else clip / norm
    assert factor == 1.0 or factor < 0.5
    jax.tree.map(
        lambda seen, g: np.testing.assert_allclose(seen, factor * g, rtol=1e-5, atol=1e-7),
        gradient_seen(after),
        gradient,
    )
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"] / metrics["weights"], loss, rtol=1e-6)
    np.testing.assert_array_equal(metrics["weights"], batch["decoder_loss_weights"].sum())
    changes = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after.params, state.params)
    change = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(changes)))
    np.testing.assert_allclose(metrics["update_norm"], change, rtol=1e-4)
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(after.params)))
    np.testing.assert_allclose(metrics["param_norm"], size, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.05, rtol=1e-6)
    assert metrics["skipped"] == 0 and after.step == 1
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")} and {m.shape for m in metrics.values()} == {()}


def test_dropout_keys_differ_by_step_and_microbatch():
    rng = jax.random.key(3)
    optimizer = make_optimizer()
    step = jax.jit(make_train_step(OBJECTIVE, optimizer, num_microbatches=2, rng=rng))
    state = make_state(optimizer)
    draws = []
    for _ in range(2):
        state, metrics = step(state, toy_batch())
        draws.append(float(metrics["draw"]))
    expected = [
        sum(float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(rng, s), m))) for m in range(2))
        for s in range(2)
    ]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)
    assert expected[0] != expected[1]


@pytest.mark.parametrize(("bad", "num_microbatches"), [(np.inf, 1), (np.nan, 2)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bad, num_microbatches):
    optimizer = make_optimizer()
    step = jax.jit(make_train_step(OBJECTIVE, optimizer, num_microbatches=num_microbatches), donate_argnums=0)
    good = toy_batch() | {"features": np.ones((8, 5), np.float32)}
    spoiled = good | {"features": np.where(np.arange(40).reshape(8, 5) == 37, bad, 1).astype(np.float32)}

    state, _ = step(make_state(optimizer), good)
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, spoiled)
    assert metrics["skipped"] == 1 and metrics["update_norm"] == 0
    assert not np.isfinite(metrics["grad_norm"])
    assert state.step == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))

    # The next update goes on where the last one stopped: the schedule counts updates, and so does the logged rate.
    state, metrics = step(state, good)
    expected, expected_metrics = step(jax.tree.map(jnp.asarray, before), good)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (expected.params, expected.opt_state))
    assert metrics["learning_rate"] == expected_metrics["learning_rate"] == np.float32(0.1)
    assert metrics["skipped"] == 0 and state.step == 3


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too():
    class Infinite(ToyObjective):
        def loss_sums(self, params, batch, dropout_rng=None):
            loss, sums = super().loss_sums(params, batch, dropout_rng)
            return loss + jnp.inf, sums

    optimizer = make_optimizer()
    state = make_state(optimizer)
    after, metrics = jax.jit(make_train_step(Infinite(), optimizer))(state, toy_batch())
    assert metrics["skipped"] == 1 and np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_a_batch_without_weights_has_a_zero_gradient():
    optimizer = make_optimizer(weight_decay=0.0)
    state = make_state(optimizer)
    batch = toy_batch() | {"decoder_loss_weights": np.zeros((8, 5), np.int32)}
    after, metrics = jax.jit(make_train_step(OBJECTIVE, optimizer, num_microbatches=2))(state, batch)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] == 0 and metrics["weights"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_fractional_weights_are_normalized_by_their_sum():
    optimizer = make_optimizer()
    state, batch = make_state(optimizer), toy_batch()
    batch = batch | {"decoder_loss_weights": batch["decoder_loss_weights"] / np.float32(1024)}
    assert batch["decoder_loss_weights"].sum() < 1
    _, metrics = jax.jit(make_train_step(OBJECTIVE, optimizer, num_microbatches=2))(state, batch)
    _, gradient = toy_gradient(state.params, batch)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


def test_eval_step_sums_like_numpy_for_any_number_of_microbatches():
    params, batch = OBJECTIVE.init(jax.random.key(0))["params"], toy_batch()
    loss, _ = toy_gradient(params, batch)
    for num_microbatches in (1, 4):
        sums = jax.jit(make_eval_step(OBJECTIVE, num_microbatches=num_microbatches))(params, batch)
        assert sums.keys() == {"loss", "nats", "correct", "weights"}
        np.testing.assert_allclose(sums["nats"], loss * batch["decoder_loss_weights"].sum(), rtol=1e-6)


def test_microbatches_take_every_mth_row():
    rows = np.arange(12).reshape(6, 2)
    split = split_microbatches({"x": rows}, 3)["x"]
    np.testing.assert_array_equal(split, [[rows[0], rows[3]], [rows[1], rows[4]], [rows[2], rows[5]]])


def test_what_cannot_be_trained_is_refused():
    optimizer = make_optimizer()
    state, batch = make_state(optimizer), toy_batch()
    with pytest.raises(UserError, match=r"8 rows.*num_microbatches=3"):
        jax.eval_shape(make_train_step(OBJECTIVE, optimizer, num_microbatches=3), state, batch)
    with pytest.raises(UserError, match="num_microbatches is 0"):
        make_train_step(OBJECTIVE, optimizer, num_microbatches=0)
    with pytest.raises(UserError, match="decoder_loss_weights"):
        unweighted = {name: x for name, x in batch.items() if name != "decoder_loss_weights"}
        jax.eval_shape(make_train_step(OBJECTIVE, optimizer), state, unweighted)

    class Clashing(ToyObjective):
        def loss_sums(self, params, batch, dropout_rng=None):
            loss, sums = super().loss_sums(params, batch, dropout_rng)
            return loss, sums | {"grad_norm": loss}

    with pytest.raises(ValueError, match="grad_norm"):
        jax.eval_shape(make_train_step(Clashing(), optimizer), state, batch)


SHARDED = """
    import re
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    import test_train_step as t
    from t5x_ssm.training.train_step import make_train_step

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = t.make_optimizer()
    state, batch = t.make_state(optimizer), t.toy_batch()
    expected, expected_metrics = jax.jit(make_train_step(t.OBJECTIVE, optimizer))(state, batch)

    replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), state)
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    step = make_train_step(t.OBJECTIVE, optimizer, num_microbatches=2, param_shardings=replicated.params)
    compiled = jax.jit(step, out_shardings=(replicated, None)).lower(jax.device_put(state, replicated), batch).compile()
    found = set(re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", compiled.as_text()))
    assert found == {"all-reduce"}, found
    sharded, metrics = compiled(jax.device_put(state, replicated), batch)
    for a, b in zip(jax.tree.leaves((sharded, metrics)), jax.tree.leaves((expected, expected_metrics))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    print("equal")
"""


def test_microbatches_of_a_sharded_batch_move_no_rows():
    assert four_devices.printed(SHARDED) == "equal"
