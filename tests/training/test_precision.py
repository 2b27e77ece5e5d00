"""Which types a whole training step of the published networks computes in, under dtype bfloat16; traced, not run."""

import collections

import gin
import jax
import jax.numpy as jnp
import pytest

from t5x_ssm import config
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.training import optimizers
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_train_step

BATCH, LENGTH = 1, 1024
# As published, but for N, which would be the attention window.
E, F, H, N, V = 1024, 4096, 256, 384, 32000
PROJECTIONS = {
    "gss_192m": {(E, F), (E, H), (H, F), (F, E), (V, E)},
    "gss_hybrid_203m": {(E, F), (E, H), (H, F), (F, E), (V, E), (E, E)},
}
# Kernels, discretization, norms, softmax and the loss.
TRANSCENDENTAL = ("exp", "exp2", "expm1", "log", "log1p", "cos", "sin", "rsqrt", "sqrt")
STATISTICS = ("reduce_max", "reduce_sum", "cumsum", "fft")


@pytest.fixture(scope="module", params=[pytest.param("gss_192m", marks=pytest.mark.slow), "gss_hybrid_203m"])
def network(request):
    """(name, forward programs, program of a whole step, state before, state after, metrics)."""
    config.load(
        ["runs/pretrain.gin", "optimizers/adamw_cosine.gin", f"networks/{request.param}.gin"],
        ["TRAIN_STEPS=9", "WARMUP_STEPS=1", f"gss.GSS.state_size={N}"],
    )
    model = gin.get_configurable(LanguageModel)(
        network=gin.query_parameter("NETWORK/gin.macro.value").scoped_configurable_fn()
    )
    optimizer = gin.get_configurable(optimizers.adamw)()
    assert model.network.dtype == "bfloat16"
    names = ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
    packed = {f"decoder_{name}": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32) for name in names}
    single = {name: packed[name] for name in list(packed)[:3]}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), packed)["params"])
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    step = make_train_step(model, optimizer)
    forward = [jax.make_jaxpr(model.loss_sums)(params, batch) for batch in (packed, single)]
    traced, (after, metrics) = jax.make_jaxpr(step, return_shape=True)(state, single)
    return request.param, forward, traced, state, after, metrics


def equations(jaxpr):
    """Every equation of a program, those of the programs in it included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def input_types(programs, primitives):
    """primitive -> the floating types of its inputs."""
    found = collections.defaultdict(set)
    for program in programs:
        for equation in equations(program.jaxpr):
            if equation.primitive.name in primitives:
                found[equation.primitive.name] |= {
                    str(variable.aval.dtype)
                    for variable in equation.invars
                    if jnp.issubdtype(variable.aval.dtype, jnp.inexact)
                }
    return found


def test_what_is_stored_is_float32(network):
    _, _, _, before, after, metrics = network
    for tree in (before, after, metrics):
        floating = [leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert floating and set(floating) == {jnp.dtype("float32")}


def test_kernels_norms_softmax_and_loss_are_float32(network):
    _, forward, *_ = network
    types = input_types(forward, TRANSCENDENTAL)
    assert {"exp", "log", "cos", "sin", "rsqrt"} <= types.keys()
    assert all(found <= {"float32"} for found in types.values()), types
    types = input_types(forward, STATISTICS)
    assert {"reduce_max", "reduce_sum", "fft"} <= types.keys()
    assert all(found <= {"float32", "complex64"} for found in types.values()), types


def test_the_backward_pass_of_kernels_and_norms_is_float32(network):
    _, _, step, *_ = network
    types = input_types([step], ("cos", "sin", "rsqrt", "fft", "log"))
    assert all(found <= {"float32", "complex64"} for found in types.values()), types


def test_projections_are_bfloat16_and_only_they(network):
    name, forward, *_ = network
    types = collections.defaultdict(set)
    for program in forward:
        for equation in equations(program.jaxpr):
            if equation.primitive.name == "dot_general":
                left, right = (variable.aval for variable in equation.invars)
                for operand in (left, right):
                    if operand.shape in PROJECTIONS[name]:
                        types[operand.shape] |= {str(left.dtype), str(right.dtype)}
                    elif {N, 2 * N} & set(operand.shape):
                        types["state space"] |= {str(left.dtype), str(right.dtype)}
    assert types.pop("state space") == {"float32"}
    assert types == {shape: {"bfloat16"} for shape in PROJECTIONS[name]}
