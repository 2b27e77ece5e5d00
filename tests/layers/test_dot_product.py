"""Attention in pieces and in the TPU's kernel, run as ordinary operations: against a masked softmax in float64 numpy."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.layers import dot_product
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dot_product import Places

ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 16


def arrays(length):
    random = np.random.default_rng(0)
    q = random.normal(size=(ROWS, length, HEADS, WIDTH)).astype(np.float32)
    k, v = random.normal(size=(2, ROWS, length, KV_HEADS, WIDTH)).astype(np.float32)
    # Two documents and padding; then one document that fills the row.
    segments = np.ones((ROWS, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, -length // 5 :] = 0
    return q, k, v, segments


def written_out(q, k, v, segments, causal, weight):
    """Σ weight · attention, and its gradients, by the softmax's own derivative."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    out = np.zeros_like(q)
    gradients = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    i, j = np.indices((q.shape[1],) * 2)
    for b, h in np.ndindex(ROWS, HEADS):
        g = h * KV_HEADS // HEADS
        visible = segments[b][:, None] == segments[b][None]
        visible &= (j <= i) if causal else True
        p = np.exp(np.where(visible, q[b, :, h] @ k[b, :, g].T, -np.inf))
        p /= p.sum(-1, keepdims=True)
        out[b, :, h] = p @ v[b, :, g]
        dp = weight[b, :, h] @ v[b, :, g].T
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))
        gradients[0][b, :, h] = ds @ k[b, :, g]
        gradients[1][b, :, g] += ds.T @ q[b, :, h]
        gradients[2][b, :, g] += p.T @ weight[b, :, h]
    return out, gradients


def check(function, q, k, v, segments, causal):
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    (_, out), found = jax.jit(
        jax.value_and_grad(lambda *x: (jnp.sum(weight * (y := function(*x))), y), (0, 1, 2), has_aux=True)
    )(q, k, v)
    expected, gradients = written_out(q, k, v, segments, causal, weight)
    for got, want in zip((out, *found), (expected, *gradients), strict=True):
        assert np.abs(np.asarray(got, np.float64) - want).max() < 2e-6 * np.abs(want).max()


def visible(causal, at, to):
    same = at.segments[..., :, None] == to.segments[..., None, :]
    return same & (to.positions[..., None, :] <= at.positions[..., :, None]) if causal else same


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [32, 37])
def test_pieces(monkeypatch, length, causal):
    monkeypatch.setattr(dot_product, "DENSE_LOGITS", 0)
    monkeypatch.setattr(dot_product, "QUERIES", 8)
    q, k, v, segments = arrays(length)
    here = Places(jnp.arange(length)[None], jnp.asarray(segments))
    run = functools.partial(dot_product.attention, at=here, to=here, visible=functools.partial(visible, causal))
    check(run, q, k, v, segments, causal)
    if causal:  # keys and values as a cache has them

        def by_heads(q, k, v):
            return run(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), heads_first=True)

        check(by_heads, q, k, v, segments, causal)


def test_memory_of_pieces_grows_with_the_length_and_not_with_its_square():
    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        here = Places(jnp.arange(length)[None])
        run = lambda q, k, v: dot_product.attention(
            q, k, v, here, here, lambda at, to: visible(True, ones(at), ones(to))
        )
        ones = lambda places: places._replace(segments=jnp.ones_like(places.positions))
        gradient = jax.jit(jax.grad(lambda *x: jnp.sum(run(*x)), (0, 1, 2)))
        return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


@pytest.mark.parametrize(
    ("causal", "packed"), [(True, True), pytest.param(False, True, marks=pytest.mark.slow), (True, False)]
)
def test_kernel(monkeypatch, causal, packed):
    monkeypatch.setattr(dot_product, "KERNEL_BLOCKS", (128,))
    q, k, v, segments = arrays(256)
    given = jnp.asarray(segments) if packed else None
    run = functools.partial(dot_product._in_kernel, segments=given, causal=causal, interpret=True)
    check(run, q, k, v, segments if packed else np.ones_like(segments), causal)


def test_dropout_of_pieces_takes_its_share_and_keeps_the_mean(monkeypatch):
    monkeypatch.setattr(dot_product, "DENSE_LOGITS", 0)
    monkeypatch.setattr(dot_product, "QUERIES", 16)
    length = 64
    q, v = jnp.zeros((1, length, 1, 1)), jnp.eye(length)[None, :, None]
    here = Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    weights = dot_product.attention(
        *(q, q, v, here, here, functools.partial(visible, False)), dropout_rate=0.25, dropout_key=jax.random.key(0)
    )[0, :, 0]
    # Four standard deviations of 4,096 draws.
    assert abs(np.mean(weights == 0) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / length**2)
    np.testing.assert_allclose(weights[weights != 0], 1 / (0.75 * length), rtol=1e-6)
    # Pieces have masks of their own.
    assert len({tuple(row) for row in np.asarray(weights == 0)}) == length


def lowered(platform, length=1024, **fields):
    layer = Attention(num_heads=2, num_kv_heads=1, **fields)
    x = jnp.zeros((1, length, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rngs = {"dropout": jax.random.key(1)}
    run = jax.jit(lambda params, x: layer.apply({"params": params}, x, enable_dropout=True, rngs=rngs))
    return run.trace(params, x).lower(lowering_platforms=(platform,)).as_text()


def test_who_runs_the_kernel():
    assert "splash_mqa_fwd" in lowered("tpu", rotary=True)
    for platform in ("cpu", "cuda"):
        assert "splash" not in lowered(platform, rotary=True)
    for other in (
        {"length": 1000},
        {"relative_bias": True},
        {"dropout_rate": 0.1},
        {"span": "sliding", "window": 256},
        {"span": "sliding", "window": 2048},
    ):
        assert "splash" not in lowered("tpu", **other), other


@pytest.mark.aot
@pytest.mark.parametrize(("head_dim", "length"), [(64, 4096), (128, 1152)])
def test_the_tpu_compiler_takes_it_without_a_collective_inside(head_dim, length):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (the extra aot)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1))
    mesh = jax.sharding.Mesh(
        np.array(topology.devices).reshape(2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec
    of = lambda dtype, axes, *shape: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec(*axes))
    )
    heads = ("data", None, "model", None)
    q = of(jnp.bfloat16, heads, 2, length, 4, head_dim)
    k = of(jnp.bfloat16, heads, 2, length, 2, head_dim)
    segments = of(jnp.int32, ("data", None), 2, length)

    def loss(q, k, v, segments):
        here = Places(jnp.arange(length)[None], segments)
        out = dot_product.attention(q, k, v, here, here, functools.partial(visible, True), in_order="causal")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile().as_text()
    assert {name for name in ("fwd", "dq", "dkv") if f"splash_mqa_{name}" in text} == {"fwd", "dq", "dkv"}
    assert not any(kind in text for kind in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("))


def test_dense_attention_keeps_its_weights_once():
    """What one more of scanned layers of attention adds to the memory of a compiled gradient."""
    length, layers = 128, (2, 6)
    q, k, v, segments = arrays(length)
    here = Places(jnp.arange(length)[None], jnp.asarray(segments))

    def loss(q, k, v, scales):
        def layer(q, scale):
            return scale * dot_product.attention(q, k, v, here, here, functools.partial(visible, True)), None

        return jnp.sum(jax.lax.scan(layer, q, scales)[0])

    def temporary_bytes(layers):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, jnp.ones(layers)).compile()
        return program.memory_analysis().temp_size_in_bytes

    weights = 4 * ROWS * HEADS * length**2
    added = (temporary_bytes(layers[1]) - temporary_bytes(layers[0])) / (layers[1] - layers[0])
    assert weights < added < 1.5 * weights
