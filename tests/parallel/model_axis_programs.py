"""Run with 8 virtual devices by `test_model_axis.py`: what each mixer sends over the `model` axis, forwards and backwards.

The list is what the formulas at the head of each layer's file need, written down by hand; a change of it is a change of a design.
"""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import draw, jit, shapes

from launch import costs, hlo
from t5x_ssm.layers import dot_product
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D, S4StateSpace
from t5x_ssm.layers.s5 import S5, S5StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.parallel import rules, split_modes
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh

split_modes.FEWEST_MODES = 1
BATCH, LENGTH, WIDTH, REDUCED = 4, 24, 16, 12
LOCAL_ATTENTION = functools.partial(Attention, num_heads=2, span="sliding", window=5)

# What a device of `data` 4, which has one row, sends: kind and array, and how often.
ROW = (1, LENGTH, WIDTH)
STATISTIC = (1, LENGTH)
PROJECTIONS = {("all-reduce", ROW): 4}  # out of the output projection, and backwards into query, key and value
MIXERS = {
    "gss": (
        functools.partial(GSS, channels=REDUCED, hidden=40, state_size=3),
        {
            ("all-reduce", STATISTIC): 4,  # mean and variance, and backwards
            ("all-gather", (1, LENGTH, REDUCED)): 1,  # Y
            ("all-reduce", (1, LENGTH, REDUCED)): 1,  # its gradient
            ("all-reduce", ROW): 3,  # O, and backwards into gate and reduce
        },
    ),
    "h3": (functools.partial(H3, state_size=8), PROJECTIONS),
    "h3 heads": (functools.partial(H3, head_dim=2, state_size=4), PROJECTIONS),
    "s4 glu": (functools.partial(S4, state_size=4), {("all-reduce", ROW): 2}),
    "s4d": (functools.partial(S4D, state_size=4, output="linear"), {("all-reduce", ROW): 1}),
    "dss": (functools.partial(DSS, state_size=3), {("all-reduce", ROW): 1}),
    # What the modes of a device give is summed, and backwards its input's gradient; the gate is gathered, and its gradients summed.
    "s5": (functools.partial(S5, state_size=4), {("all-gather", ROW): 2, ("all-reduce", ROW): 3}),
    "s5 operator": (
        functools.partial(GatedOperator, state_space=functools.partial(S5StateSpace, state_size=6, conj_sym=False)),
        {("all-gather", ROW): 2, ("all-reduce", ROW): 6},
    ),
    "full attention": (functools.partial(Attention, num_heads=2, span="full", rotary=True), PROJECTIONS),
    "sliding attention": (LOCAL_ATTENTION, PROJECTIONS),
    "spade": (
        functools.partial(Spade, state_space=functools.partial(S4StateSpace, state_size=4), attention=LOCAL_ATTENTION),
        PROJECTIONS | {("all-gather", ROW): 1},  # G
    ),
    "full attention in pieces": (functools.partial(Attention, num_heads=2, span="full", rotary=True), PROJECTIONS),
}


def collectives(text, mesh):
    """By mesh axes, a counter of (kind, dimensions of an array that is sent); without scalars, which the test's loss is."""
    found = collections.defaultdict(collections.Counter)
    for instruction, times, _ in hlo.Program(text).run():
        if instruction.opcode in costs.COLLECTIVES:
            axes, size = costs.replica_axes(instruction.attributes, mesh.shape)
            if size > 1:
                for array in (array for array in instruction.arrays if array.dims):
                    found[axes][instruction.opcode, array.dims] += times
    return found


def check(name):
    make, expected = MIXERS[name]
    if name.endswith("in pieces"):  # of a few queries; the last of the list, because it is so for good
        dot_product.DENSE_LOGITS, dot_product.QUERIES = 0, 7
    layer = make()
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    variables = shapes(layer, x)
    mesh = make_mesh(MeshConfig(data=4, model=2))

    def both_ways(params, x):
        def loss(x):
            y = layer.apply({"params": params}, x, enable_dropout=False)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, has_aux=True)(x)

    with jax.set_mesh(mesh):
        params = jax.device_put(
            draw(variables["params"]),
            rules.parameter_shardings(variables["params"], variables["params_axes"], mesh),
        )
        x = jax.device_put(x, rules.batch_sharding(mesh, 3))
        found = collectives(jit(both_ways).lower(params, x).compile().as_text(), mesh)
    assert found["model"] == expected, (name, dict(found["model"]))
    # Over other axes go at most parameters: nothing that is as long as the text.
    others = [dims for axes, counts in found.items() if axes != "model" for _, dims in counts]
    assert not any(LENGTH in dims for dims in others), (name, others)


if __name__ == "__main__":
    for name in MIXERS:
        check(name)
        print("passed", name, flush=True)
