"""Run with 8 virtual devices by `test_shard.py`: each function is one check, by name on the command line."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from t5x_ssm.parallel import rules, split_modes
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.parallel.shard import constrain, current_mesh, shard

FULL = ("batch", None, "channels")
U = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
seen = []


def core(u, gain):
    seen.append((u.shape, gain.shape))
    return jnp.cumsum(u * gain, axis=1)


run = shard(core, (FULL, ("channels",)), FULL)


def check_every_way_of_entering_a_mesh():
    gain = np.arange(8.0, dtype=np.float32)
    expected = np.cumsum(U * gain, axis=1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, model=4))

    def local_shape():
        seen.clear()
        found = jax.jit(lambda u: run(u, gain))(U)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        return seen[-1]

    assert current_mesh() is None
    assert local_shape() == ((4, 6, 8), (8,))
    with jax.set_mesh(mesh):
        assert local_shape() == ((2, 6, 2), (2,))
    with mesh:  # as T5X does
        assert local_shape() == ((2, 6, 2), (2,))
    # T5X initialises through eval_shape without a mesh.
    assert jax.eval_shape(run, U, gain).shape == U.shape


def check_what_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with jax.set_mesh(mesh):
        for shape, local in [
            ((1, 3, 8), (1, 3, 4)),
            ((2, 3, 7), (1, 3, 7)),
            ((4, 3, 2), (1, 3, 1)),
            ((1, 1, 1), (1, 1, 1)),
        ]:
            seen.clear()
            out = jax.jit(run)(jnp.ones(shape), jnp.ones(shape[-1]))
            assert out.shape == shape
            assert seen[-1] == (local, local[-1:]), (shape, seen)


def check_inside_a_shard_map_everything_is_local_already():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("data")
        inner = lambda u: constrain(run(u, jnp.ones(8)), FULL)
        out = jax.jit(jax.shard_map(inner, in_specs=spec, out_specs=spec, check_vma=False))(U)
    np.testing.assert_allclose(out, np.cumsum(U, axis=1), rtol=1e-6)
    assert seen[-1] == ((1, 6, 8), (8,))


def check_state_spaces_communicate_nothing():
    from t5x_ssm.layers.gss import GSSStateSpace
    from t5x_ssm.layers.mixer import Run

    module = GSSStateSpace(state_size=3)
    params = module.init(jax.random.key(0), U, Run())["params"]
    mesh = make_mesh(MeshConfig(data=2, model=4))

    def forward(u, segment_ids):
        return module.apply({"params": params}, u, Run(segment_ids=segment_ids))[0]

    packed = np.repeat([[1, 1, 2, 2, 2, 3]], 4, axis=0)
    for segments in (None, packed):
        plain = forward(U, segments)
        with jax.set_mesh(mesh):
            place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "model"))
            compiled = (
                jax.jit(functools.partial(forward, segment_ids=segments), out_shardings=place)
                .lower(jax.device_put(U, place))
                .compile()
            )
            found = compiled(jax.device_put(U, place))
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
        text = compiled.as_text()
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in text, collective


def check_a_state_that_channels_share_is_cut_by_modes():
    from t5x_ssm.layers.mixer import Run
    from t5x_ssm.layers.s5 import S5StateSpace

    lengths = jnp.arange(4) + 2
    mesh = make_mesh(MeshConfig(data=2, model=4))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

    def write(module, params, u):
        run = Run(prefill=True, prefill_lengths=lengths)
        (prefix, _), cache = module.apply({"params": params}, u, run, mutable=["cache"])
        (token, _), cache = module.apply({"params": params, **cache}, u[:, :1], Run(decode=True), mutable=["cache"])
        return prefix, token, cache

    def gradients(module, params, u):
        weights = jnp.arange(1.0, 7.0)[:, None]
        return jax.value_and_grad(
            lambda params, u: jnp.sum(weights * jnp.sin(module.apply({"params": params}, u, Run())[0])), argnums=(0, 1)
        )(params, u)

    # Of 4 rows and 8 modes a device has 2 and 2; 6 modes cannot be cut in 4, and 8 are too few for pieces of 4 and more.
    for size, fewest, local in [(16, 1, 2), (12, 1, 6), (16, 4, 8)]:
        split_modes.FEWEST_MODES = fewest
        ways = [(write, False)] + [(gradients, False), (gradients, True)] * (local == 2)
        for function, bidirectional in ways:
            module = S5StateSpace(state_size=size, bidirectional=bidirectional)
            params = module.init(jax.random.key(0), U, Run())["params"]
            run = jax.jit(functools.partial(function, module))
            expected = run(params, U)
            with jax.set_mesh(mesh):
                found = jax.jit(functools.partial(function, module))(
                    params, jax.device_put(U, rules.batch_sharding(mesh, 3))
                )
            jax.tree.map(close, found, expected)
            if function is write:
                shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(found[2])}
                assert shapes == {(2, local)}, (size, shapes)


def check_an_embedding_moves_its_table_and_no_tokens():
    from t5x_ssm.layers.basic import Embed

    layer, tokens = Embed(64, 16), np.random.default_rng(0).integers(0, 64, (8, 12))
    table = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(8, 12, 16)).astype(np.float32)
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    gradient = jax.grad(lambda table, tokens: jnp.sum(layer.apply({"params": {"embedding": table}}, tokens) * weights))
    with jax.set_mesh(mesh):
        columns = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
        placed = jax.device_put(table, columns), jax.device_put(tokens, rules.batch_sharding(mesh))
        compiled = jax.jit(gradient, out_shardings=columns).lower(*placed).compile()
        np.testing.assert_allclose(compiled(*placed), expected, rtol=1e-5, atol=1e-5)
    moved = re.findall(r"= (\S+?)(?:\{[\d,]*\})? (all-[\w-]+|collective-permute|reduce-scatter)\(", compiled.as_text())
    assert moved and {shape for shape, _ in moved} <= {"f32[64,16]", "f32[64,4]"}, moved


def check_one_name_has_one_size():
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        try:
            run(jnp.ones((2, 3, 8)), jnp.ones(4))
        except ValueError as error:
            assert "'channels' has sizes 8 and 4" in str(error)
        else:
            raise AssertionError("sizes that differ were accepted")


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print("passed", name, flush=True)
    sys.exit(0)
