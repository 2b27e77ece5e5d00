import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ssm.errors import UserError
from t5x_ssm.training import optimizers
from t5x_ssm.training.train_state import TrainState, state_shardings


def make_params():
    return {
        "block": {"norm": {"scale": jnp.ones((4,))}, "ssm": {"log_dt": jnp.full((3,), 0.5)}},
        "out": {"kernel": jnp.arange(12.0).reshape(3, 4)},
    }


def make_state(make=optimizers.adamw, **settings):
    params = make_params()
    optimizer = make(0.1, **settings)
    state = TrainState.create(params, optimizer)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), state.opt_state, params)
    return state.replace(step=state.step + 3, opt_state=opt_state)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_round_trip_through_the_tree_of_t5x(make):
    state = make_state(make)
    tree = state.to_tree()
    assert tree.keys() == {"target", "state"} and tree["state"].keys() == {"step", "param_states"}
    leaves = traverse_util.flatten_dict(tree, keep_empty_nodes=True)
    assert not any(leaf is traverse_util.empty_node for leaf in leaves.values())
    assert all(isinstance(part, str) for path in leaves for part in path)

    saved = jax.tree.map(np.asarray, tree)
    template = TrainState.create(make_params(), make(0.1))
    restored = template.from_tree(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_the_tree_carries_shapes_as_well_as_arrays():
    shapes = jax.eval_shape(make_state)
    assert shapes.from_tree(shapes.to_tree()) == shapes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: tree["target"]["out"].pop("kernel"), r"1 missing: target/out/kernel"),
        (lambda tree: tree["target"]["out"].update(more=np.zeros(2)), r"1 not of this model.*: target/out/more"),
        (lambda tree: tree["target"]["out"].update(kernel=np.zeros((4, 3))), r"kernel \(4, 3\) instead of \(3, 4\)"),
        (lambda tree: tree["state"].update(param_states={}), r"missing: state/param_states/1/inner_states/decay/"),
        (lambda tree: tree.pop("state"), r"15 missing: state/.* and 7 more"),
    ],
)
def test_a_tree_of_another_model_is_refused_by_leaf(spoil, message):
    state = make_state()
    tree = jax.tree.map(np.asarray, state.to_tree())
    spoil(tree)
    with pytest.raises(UserError, match=message):
        state.from_tree(tree)


def test_optimizer_state_lies_as_its_parameters():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "model"))
    specs = {
        "block": {"norm": {"scale": PartitionSpec()}, "ssm": {"log_dt": PartitionSpec("model")}},
        "out": {"kernel": PartitionSpec("fsdp", "model")},
    }
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def placed(state):
        tree = state_shardings(state, shardings).to_tree()
        return {path: s.spec for path, s in traverse_util.flatten_dict(tree, sep="/").items()}

    adam = placed(make_state())
    inner = "state/param_states/1/inner_states"
    assert adam["state/step"] == PartitionSpec()
    assert adam["target/out/kernel"] == PartitionSpec("fsdp", "model")
    assert adam[f"{inner}/decay/inner_state/0/count"] == PartitionSpec()
    for moment in ("mu", "nu"):
        assert adam[f"{inner}/decay/inner_state/0/{moment}/out/kernel"] == PartitionSpec("fsdp", "model")
        assert adam[f"{inner}/state_space/inner_state/0/{moment}/block/ssm/log_dt"] == PartitionSpec("model")

    state = make_state(optimizers.adafactor, min_dim_size_to_factor=2)
    factored = placed(state)
    leaf = f"{inner}/decay/inner_state/0/0/{{}}/out/kernel"
    shapes = {p: x.shape for p, x in traverse_util.flatten_dict(state.to_tree(), sep="/").items()}
    assert shapes[leaf.format("v_row")] == (3,) and factored[leaf.format("v_row")] == PartitionSpec("fsdp")
    assert shapes[leaf.format("v_col")] == (4,) and factored[leaf.format("v_col")] == PartitionSpec("model")
    assert factored[leaf.format("v")] == PartitionSpec()
