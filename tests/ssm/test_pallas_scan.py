"""The scan kernel of TPUs, run as ordinary operations: against a loop over complex numbers in double precision."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.ssm import diagonal_scan, pallas_scan
from t5x_ssm.ssm.powers import Pole


def poles(modes):
    """Slow and fast modes: (Pole, Ā of its rounded fields in double precision)."""
    random = np.random.default_rng(0)
    decay = -np.geomspace(1e-5, 0.5, modes).astype(np.float32)
    turns = random.uniform(-0.5, 0.5, modes).astype(np.float32)
    pole = Pole(jnp.asarray(decay), jnp.asarray(turns), jnp.zeros(modes))
    return pole, np.exp(decay.astype(np.float64) + 2j * np.pi * turns.astype(np.float64))


def arrays(batch, length, modes):
    random = np.random.default_rng(1)
    v, y = random.normal(size=(2, batch, length, 2, modes)).astype(np.float32)
    state = random.normal(size=(batch, 2, modes)).astype(np.float32)
    return v, y, state, random.random((batch, length)) < 0.05


def as_complex(planes):
    planes = np.asarray(planes, np.float64)
    return planes[..., 0, :] + 1j * planes[..., 1, :]


def loop(a, v, y, state, barriers, reverse):
    """States after every token, and Σ conj(y[l]) x' over the states x' that enter."""
    v, y, x = as_complex(v), as_complex(y), as_complex(state)
    states, products = np.zeros_like(v), 0
    for l in reversed(range(v.shape[1])) if reverse else range(v.shape[1]):
        if barriers is not None:
            x = np.where(barriers[:, l, None], 0, x)
        products = products + (np.conj(y[:, l]) * x).sum(0)
        x = a * x + v[:, l]
        states[:, l] = x
    return states, products


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_barriers", [False, True])
@pytest.mark.parametrize(("batch", "length", "modes"), [(2, 50, 5), pytest.param(1, 64, 130, marks=pytest.mark.slow)])
def test_kernel_is_the_recurrence(monkeypatch, batch, length, modes, with_barriers, reverse):
    monkeypatch.setattr(pallas_scan, "LONGEST_BLOCK", 16)  # several blocks, and a last one that is not full
    pole, a = poles(modes)
    v, y, state, barriers = arrays(batch, length, modes)
    barriers = barriers if with_barriers else None
    got, products = pallas_scan.scan(pallas_scan.powers(pole), v, state, barriers, reverse, y, interpret=True)
    want, want_products = loop(a, v, y, state, barriers, reverse)
    assert np.abs(as_complex(got) - want).max() < 1e-6 * np.abs(want).max()
    assert np.abs(products[0] + 1j * np.asarray(products[1]) - want_products).max() < 1e-6 * np.abs(want_products).max()


@pytest.mark.slow
def test_roundings_do_not_add_up_over_a_long_sequence():
    pole, a = poles(8)
    v, y, state, _ = arrays(1, 16384, 8)
    got, _ = pallas_scan.scan(pallas_scan.powers(pole), v, state, interpret=True)
    want, _ = loop(a, v, y, state, None, False)
    # The slowest mode remembers 100,000 tokens. Without what Ā⁸'s rounding left over, its error would be 7e-5.
    assert np.abs(as_complex(got) - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_through_the_kernel(monkeypatch, reverse):
    def in_kernel(*arrays, block, reverse):
        del block
        return diagonal_scan._run_in_kernel(*arrays, reverse=reverse, interpret=True)

    pole, _ = poles(5)
    v, weight, state, barriers = arrays(2, 40, 5)

    def loss(pole, v, state):
        return jnp.sum(weight * diagonal_scan.states(pole, v, state, jnp.asarray(barriers), reverse))

    # What cuts is the reset of the later of two neighbours.
    cuts = np.pad(barriers[:, 1:], ((0, 0), (0, 1))) if reverse else barriers

    @jax.jit
    def written_out(parts, v, state):
        a = jnp.exp(parts[0] + 2j * jnp.pi * parts[1])

        def step(x, inputs):
            v, w, cut = inputs
            x = a * jnp.where(cut[:, None], 0, x) + (v[:, 0] + 1j * v[:, 1])
            return x, jnp.sum(w[:, 0] * x.real + w[:, 1] * x.imag)

        inputs = [jnp.moveaxis(jnp.asarray(x), 1, 0) for x in (v, weight, cuts)]
        return jnp.sum(jax.lax.scan(step, state[:, 0] + 1j * state[:, 1], inputs, reverse=reverse)[1])

    monkeypatch.setattr(diagonal_scan, "_run_in_blocks", in_kernel)
    found = jax.grad(loss, argnums=(0, 1, 2))(pole, v, state)
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(x), jnp.float64) for x in (pole.log_decay, pole.turns, v, state)]
        expected = jax.grad(written_out, argnums=(0, 1, 2))(tuple(double[:2]), *double[2:])
    for got, want in zip((found[0][0], found[0][1], *found[1:]), (*expected[0], *expected[1:]), strict=True):
        assert np.abs(np.asarray(got, np.float64) - want).max() < 2e-6 * np.abs(want).max()


def lowered(platform):
    pole, _ = poles(5)
    v, _, state, _ = arrays(2, 40, 5)
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.square(diagonal_scan.states(*x))), argnums=(0, 1, 2)))
    return gradient.trace(pole, v, state).lower(lowering_platforms=(platform,)).as_text()


def test_tpus_run_the_kernel_and_others_the_loop():
    assert lowered("tpu").count("tpu_custom_call") == 2  # forward and backward
    for platform in ("cpu", "cuda"):
        assert "custom_call @tpu" not in lowered(platform)
        assert "stablehlo.while" in lowered(platform)


@pytest.mark.aot
@pytest.mark.parametrize(("batch", "length", "modes"), [(4, 4096, 128), (2, 1000, 20), (1, 512, 1024)])
def test_the_tpu_compiler_takes_it(batch, length, modes):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (the extra aot)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1))
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def loss(pole, v, state, resets):
        return sum(jnp.sum(jnp.square(diagonal_scan.states(pole, v, state, resets, way))) for way in (False, True))

    inputs = (Pole(*[shaped(modes)] * 3), shaped(batch, length, 2, modes), shaped(batch, 2, modes))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    program = gradient.lower(*inputs, shaped(batch, length, dtype=jnp.bool_)).compile()
    assert program.as_text().count("diagonal_scan") >= 4
