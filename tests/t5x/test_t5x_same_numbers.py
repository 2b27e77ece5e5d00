"""One checkpoint, one task: T5X's own train step and the native one give the same losses, and each reads the other's saves."""

import jax
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from both_engines import (
    NETWORKS,
    STEPS,
    Case,
    batches,
    on_one_device,
    one_device,
    optimizer,
    restore_in_t5x,
    save_natively,
    t5x_initializer,
    t5x_train_step,
)

from t5x_ssm.integrations.t5x.optimizer_definition import Adafactor, learning_rate_fn
from t5x_ssm.training import checkpoints, restoring
from t5x_ssm.training.train_step import make_train_step

pytestmark = [pytest.mark.t5x, pytest.mark.slow]


@pytest.mark.parametrize("case", map(Case, NETWORKS), ids=NETWORKS)
def test_both_engines_learn_the_same_and_read_each_other(case, tmp_path):
    start = case.start()
    save_natively(tmp_path / "native", start)
    model, partitioner = case.t5x_model(), one_device()
    initializer = t5x_initializer(model, partitioner, batches(case.task)[0])
    (tmp_path / "t5x").mkdir()
    state, manager = restore_in_t5x(tmp_path / "native/checkpoint_0", partitioner, initializer, tmp_path / "t5x")

    step = t5x_train_step(model, state, partitioner, initializer, learning_rate_fn(optimizer()))
    native_step = jax.jit(make_train_step(case.objective, optimizer()))
    native, losses, native_losses = start, [], []
    for batch in batches(case.task):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].total))
        native, sums = native_step(native, batch)
        native_losses.append(float(sums["loss"] / sums["weights"]))
        logged = metrics["learning_rate"]
        np.testing.assert_allclose(float(logged.total / logged.count), float(sums["learning_rate"]), rtol=1e-6)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, native_losses, rtol=1e-5)

    # T5X -> native: the parameters, or the whole state with moments and step.
    manager.save(state)
    manager.wait_until_finished()
    saved = tmp_path / "t5x" / f"checkpoint_{STEPS}"
    found = restoring.restore_parameters(
        checkpoints.RestoreCheckpointConfig(path=str(saved)), on_one_device(start.params)
    )
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    whole = checkpoints.RestoreCheckpointConfig(path=str(saved), what="state")
    tree = restoring.restore_state(whole, on_one_device(start.to_tree())).tree
    continued = on_one_device(start).from_tree(tree)
    assert int(continued.step) == STEPS
    for ours, theirs in zip(jax.tree.leaves(continued.opt_state), jax.tree.leaves(state.param_states), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Native -> T5X, with moments and step.
    save_natively(tmp_path / "native", native)
    checkpoint = tmp_path / "native" / f"checkpoint_{STEPS}"
    again, _ = restore_in_t5x(checkpoint, partitioner, initializer, tmp_path / "t5x_again")
    assert int(again.step) == STEPS
    for ours, theirs in zip(jax.tree.leaves(native.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(jax.tree.leaves(native.opt_state), jax.tree.leaves(again.param_states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_t5xs_adafactor_trains_a_hybrid():
    case = Case("gss*3 chunk")
    model, partitioner = case.t5x_model(optimizer_def=Adafactor()), one_device()
    initializer = t5x_initializer(model, partitioner, batches(case.task)[0])
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    step = t5x_train_step(model, state, partitioner, initializer, lambda step: 0.1)
    losses = []
    for batch in batches(case.task):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].total))
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.8 * losses[0], losses
