"""The partitioner and the optimizer definitions, without a training run."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import traverse_util
from flax.core import freeze

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from t5x import adafactor, train_state

from t5x_ssm.errors import UserError
from t5x_ssm.integrations.t5x import optimizer_definition
from t5x_ssm.integrations.t5x.partitioner import Partitioner
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.h3 import H3
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.parallel.mesh import MeshConfig
from t5x_ssm.training import optimizers

pytestmark = pytest.mark.t5x


def shapes(definition, scan_layers=True):
    """The train state of a small H3 under an optimizer definition, as shapes."""
    mixers = {"h3": functools.partial(H3, state_size=128)}
    net = Decoder(259, 128, "h3*2", None, mixers, functools.partial(MLP, hidden=128), scan_layers=scan_layers)
    tokens = jnp.ones((1, 4), jnp.int32)
    init = lambda: train_state.FlaxOptimTrainState.create(
        definition, freeze(net.init(jax.random.key(0), tokens, tokens, enable_dropout=False))
    )
    return jax.eval_shape(init)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_every_leaf_of_the_state_has_a_place(make):
    state = shapes(optimizer_definition.OptimizerDefinition(make(1e-3)))
    places = Partitioner(MeshConfig(data=1)).get_mesh_axes(state)
    assert set(traverse_util.flatten_dict(places.state_dict())) == set(traverse_util.flatten_dict(state.state_dict()))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_adafactor_factors_projections_and_no_state_space(scan_layers):
    definition = optimizer_definition.Adafactor()
    state = shapes(definition, scan_layers)
    moments = traverse_util.flatten_dict(state.state_dict()["state"]["param_states"], sep="/")
    whole = {path.removesuffix("/v"): leaf.shape != (1,) for path, leaf in moments.items() if path.endswith("/v")}
    in_state_spaces = {path: value for path, value in whole.items() if "ssm/" in path}
    assert in_state_spaces and all(in_state_spaces.values())
    kernels = {path: value for path, value in whole.items() if "/mlp/" in path and path.endswith("kernel")}
    assert kernels and not any(kernels.values())


def test_the_logged_rate_is_the_applied_one():
    optimizer = optimizers.adamw(optax.linear_schedule(1e-3, 0.0, 10))
    rate = optimizer_definition.learning_rate_fn(optimizer)
    assert [float(rate(step)) for step in (0, 5)] == pytest.approx([1e-3, 5e-4])


def test_mistakes_name_the_setting():
    with pytest.raises(UserError, match="OPTIMIZER"):
        optimizer_definition.OptimizerDefinition(optax.adam(1e-3))
    with pytest.raises(UserError, match="factor_map"):
        optimizer_definition.Adafactor(factor_map=adafactor.HParamMap(()))
