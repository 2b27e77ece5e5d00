"""Run with 8 virtual devices by `test_sequence.py`: `sequence_programs.py CHECK MIXER…` checks these mixers.

The oracle is the same layer on one device, whose own tests are elsewhere. With JAX_ENABLE_X64=1 both compute in float64, in which
they must agree to 9 digits: for layers that in float32 round too much to tell.
"""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import functools

import jax
import jax.numpy as jnp
import numpy as np
from collectives import bytes_moved
from tiny import draw, jit, shapes

from t5x_ssm.errors import UserError
from t5x_ssm.layers import dot_product
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D
from t5x_ssm.layers.s5 import S5, S5StateSpace
from t5x_ssm.parallel import rules, split_modes
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh

split_modes.FEWEST_MODES = 1
BATCH, LENGTH, WIDTH = 4, 24, 8
# A document over all pieces, documents that end within pieces and at their edges, many short ones, and padding.
SEGMENTS = np.array(
    [[1] * 24, [1] * 3 + [2] * 17 + [3] * 4, [1] * 6 + [2] * 1 + [3] * 5 + [4] * 12, [1] * 13 + [0] * 11]
)

MESHES = {
    "data 2 sequence 4": MeshConfig(data=2, sequence=4),
    "fsdp 2 sequence 2 model 2": MeshConfig(data=1, fsdp=2, sequence=2, model=2),
}

MIXERS = {
    "gss": functools.partial(GSS, channels=4, hidden=12, state_size=3),
    # 7 taps, so that a piece of 6 tokens is not all that the next but one needs.
    "h3": functools.partial(H3, state_size=8),
    "h3 heads": functools.partial(H3, head_dim=2, state_size=4),
    "s4": functools.partial(S4, state_size=4),
    "s4d": functools.partial(S4D, state_size=4, output="linear"),
    "dss": functools.partial(DSS, state_size=3),
    "s4 both ways": functools.partial(S4, state_size=4, bidirectional=True),
    "s4d both ways": functools.partial(S4D, state_size=4, bidirectional=True),
    "dss both ways": functools.partial(DSS, state_size=3, bidirectional=True),
    "s5": functools.partial(S5, state_size=4),
    "s5 both ways": functools.partial(S5, state_size=4, bidirectional=True),
    "s5op": functools.partial(GatedOperator, state_space=functools.partial(S5StateSpace, state_size=6, conj_sym=False)),
    # The windows do not divide the pieces.
    "swa": functools.partial(Attention, num_heads=4, num_kv_heads=2, span="sliding", window=4, relative_bias=True),
    "both ways": functools.partial(Attention, num_heads=2, span="sliding", window=5, causal=False, rotary=True),
    "chunk": functools.partial(Attention, num_heads=2, span="chunk", window=5, relative_bias=True),
    "even chunk": functools.partial(Attention, num_heads=2, span="chunk", window=3, relative_bias=True),
    "attn": functools.partial(Attention, num_heads=2, span="full", rotary=True),
}


REAL = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
TOLERANCE = {jnp.float32: (1e-4, 2e-5), jnp.float64: (1e-9, 1e-10)}[REAL]


def build(name, length=LENGTH):
    layer = MIXERS[name](dtype=REAL)
    x = np.random.default_rng(1).normal(size=(BATCH, length, WIDTH)).astype(REAL)
    variables = shapes(layer, x)
    params = jax.tree.map(lambda leaf: leaf.astype(REAL), draw(variables["params"]))
    return layer, params, variables["params_axes"], x


def loss(layer, params, x, segment_ids):
    y = layer.apply({"params": params}, x, segment_ids=segment_ids, enable_dropout=False)
    return jnp.sum(jnp.sin(y) * (1 + jnp.arange(y.shape[1]))[:, None] / y.shape[1]), y


def values_and_gradients(layer):
    one = jax.value_and_grad(functools.partial(loss, layer), argnums=(0, 1), has_aux=True)
    return lambda params, x, segments: {"plain": one(params, x, None), "packed": one(params, x, segments)}


def placed(mesh, params, axes, x):
    batch = rules.batch_sharding(mesh)
    return (
        jax.device_put(params, rules.parameter_shardings(params, axes, mesh)),
        jax.device_put(x, rules.batch_sharding(mesh, 3)),
        batch,
    )


def check_values_and_gradients(name):
    layer, params, axes, x = build(name)
    run = values_and_gradients(layer)
    expected = jit(run)(params, x, SEGMENTS)
    if name == "attn":  # on meshes in pieces of a few queries
        dot_product.DENSE_LOGITS, dot_product.QUERIES = 0, 4
    for label, config in MESHES.items():
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            on_mesh, x_on_mesh, batch = placed(mesh, params, axes, x)
            found = jit(run)(on_mesh, x_on_mesh, jax.device_put(SEGMENTS, batch))

        def close(path, got, want, label=label):
            want = np.asarray(want)
            message = f"{name} on {label}: {jax.tree_util.keystr(path)}"
            rtol, atol = TOLERANCE
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * np.abs(want).max(), err_msg=message)

        jax.tree_util.tree_map_with_path(close, found, expected)


def check_communication_does_not_grow_with_the_length(name):
    mesh = make_mesh(MESHES["data 2 sequence 4"])
    moved = []
    for factor in (1, 8):
        layer, params, axes, x = build(name, 2 * LENGTH * factor)
        segments = np.repeat(SEGMENTS, 2 * factor, axis=1)
        with jax.set_mesh(mesh):
            on_mesh, x_on_mesh, batch = placed(mesh, params, axes, x)
            compiled = (
                jit(values_and_gradients(layer)).lower(on_mesh, x_on_mesh, jax.device_put(segments, batch)).compile()
            )
        moved.append(bytes_moved(compiled.as_text()))
    print(name, moved[0])
    if name == "attn":  # the exception, which shows that the reader sees a gather
        assert moved[1]["all-gather"] > 4 * moved[0]["all-gather"], moved
    else:
        assert moved[0] == moved[1], (name, moved)
        assert moved[0]["collective-permute"] > 0 or name == "even chunk", moved


def check_a_state_comes_in_and_goes_out(name):
    layer, params, _, x = build(name)
    call = {"return_state": True, "enable_dropout": False}
    state = layer.apply({"params": params}, x, **call)[1]
    state = jax.tree.map(lambda leaf: jnp.cos(1 + leaf), state)

    def run(params, x, state, segments):
        def both(params, x, state):
            y, end = layer.apply({"params": params}, x, initial_state=state, segment_ids=segments, **call)
            # Outputs reach 130, where a sine would magnify their rounding.
            return sum(jnp.sum(jnp.sin(leaf / 32)) for leaf in jax.tree.leaves((y, end))), (y, end)

        return jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True)(params, x, state)

    # The state of S5 is cut over `model`.
    mesh = make_mesh(MESHES["fsdp 2 sequence 2 model 2" if name == "s5" else "data 2 sequence 4"])
    for segments in (None, SEGMENTS):
        expected = jit(run)(params, x, state, segments)
        with jax.set_mesh(mesh):
            found = jit(run)(params, x, state, segments)

        def close(got, want):
            want = np.asarray(want)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())

        jax.tree.map(close, found, expected)


def check_mistakes_name_their_settings(name):
    del name
    x = jnp.ones((BATCH, LENGTH, WIDTH))
    mesh = make_mesh(MESHES["data 2 sequence 4"])
    for layer, message in [
        (Attention(num_heads=2, span="sliding", window=7), "Attention.window = 7 reaches beyond"),
    ]:
        params = draw(shapes(layer, x)["params"])
        with jax.set_mesh(mesh):
            try:
                jax.eval_shape(lambda x, layer=layer, p=params: layer.apply({"params": p}, x, enable_dropout=False), x)
            except UserError as error:
                assert message in str(error) and "MeshConfig.sequence" in str(error)
            else:
                raise AssertionError(message)


if __name__ == "__main__":
    check, *names = sys.argv[1:]
    for name in names:
        globals()[f"check_{check}"](name)
        print("passed", name, flush=True)
