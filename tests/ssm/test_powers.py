import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.ssm import powers
from t5x_ssm.ssm.powers import Pole

RNG = np.random.default_rng(0)


def make_pole(*shape):
    log_decay = -np.exp(RNG.normal(size=shape) - 4)
    turns = RNG.uniform(-0.5, 0.5, shape)
    return Pole(jnp.asarray(log_decay), jnp.asarray(turns), jnp.asarray(1e-17 * turns)), log_decay, turns


def test_fraction_of_turns_against_whole_numbers():
    """Python integers have no rounding: the phase is exactly turns + low, in units of 2⁻⁶⁰."""
    turns = np.concatenate([RNG.uniform(-0.5, 0.5, 50), [0.5, -0.5, 0.0, 1e-12, 2.0**-26]]).astype(np.float32)
    low = (turns * RNG.uniform(-3e-8, 3e-8, turns.size)).astype(np.float32)
    function = jax.jit(powers.fraction_of_turns)
    for exponent in (0, 1, 777, 65535, 65536, 2**30 + 1):
        got = function(turns, low, jnp.asarray(exponent))
        whole = [
            (int(float(t) * 2**60) + int(float(s) * 2**60)) * exponent % 2**60 for t, s in zip(turns, low, strict=True)
        ]
        error = np.asarray(got, np.float64) - np.array([w / 2**60 for w in whole])
        error -= np.round(error)
        np.testing.assert_allclose(error, 0, atol=1e-7)


def vandermonde(log_decay, turns, length):
    return np.exp(np.arange(length) * (log_decay + 2j * np.pi * turns)[..., None])


@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=["shared", "per-channel"])
@pytest.mark.parametrize("length", [1, 1100])
@pytest.mark.parametrize("limit", [1 << 22, 40], ids=["one group", "many groups"])
def test_modal_sum_and_moments_are_the_two_products_with_vandermonde(monkeypatch, shape, length, limit):
    monkeypatch.setattr(powers, "GROUP_ELEMENTS", limit)
    with jax.enable_x64(True):
        pole, log_decay, turns = make_pole(*shape)
        table = np.broadcast_to(vandermonde(log_decay, turns, length), (3, 5, length))
        w = RNG.normal(size=(2, 3, 5)) + 1j * RNG.normal(size=(2, 3, 5))
        got = jax.jit(lambda *args: powers.modal_sum(*args, length))(w.real, w.imag, pole)
        np.testing.assert_allclose(got, np.einsum("bhn,hnl->bhl", w, table).real, atol=1e-11)
        u = RNG.normal(size=(2, 3, length))
        re, im = jax.jit(lambda *args: powers.moments(*args))(u, pole)
        np.testing.assert_allclose(re + 1j * np.asarray(im), np.einsum("bhl,hnl->bhn", u, table), atol=1e-10)


def test_gradients_in_groups_are_those_of_one_group(monkeypatch):
    with jax.enable_x64(True):
        pole, _, _ = make_pole(5)
        w = jnp.asarray(RNG.normal(size=(2, 3, 5)))
        u = jnp.asarray(RNG.normal(size=(3, 1100)))

        def ours(w, pole, u):
            re, im = powers.moments(u, pole)
            return jnp.sum(jnp.cos(powers.modal_sum(w[0], w[1], pole, 1100))) + jnp.sum(jnp.cos(re + 2 * im))

        def theirs(w, pole, u):
            table = jnp.exp(jnp.arange(1100) * (pole.log_decay + 2j * jnp.pi * pole.turns)[:, None])
            y = ((w[0] + 1j * w[1]) @ table).real
            x = u @ table.T
            return jnp.sum(jnp.cos(y)) + jnp.sum(jnp.cos(x.real + 2 * x.imag))

        want = jax.jit(jax.grad(theirs, argnums=(0, 1, 2)))(w, pole, u)
        for limit in (1 << 22, 40):
            monkeypatch.setattr(powers, "GROUP_ELEMENTS", limit)
            got = jax.jit(jax.grad(lambda *args: ours(*args), argnums=(0, 1, 2)))(w, pole, u)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9 * np.abs(y).max())


def test_one_step_as_pairs_keeps_its_size_and_phase_over_65536_products():
    log_decay = np.array([-1e-6, -1e-3, -0.3], np.float32)
    turns = np.array([0.123456789, -0.4321, 0.25], np.float32)
    low = (turns * 2e-8).astype(np.float32)
    a_re, a_im = jax.jit(powers.one_step)(Pole(jnp.asarray(log_decay), jnp.asarray(turns), jnp.asarray(low)))
    a = sum(np.asarray(x, np.float64) for x in a_re) + 1j * sum(np.asarray(x, np.float64) for x in a_im)
    want = np.exp(log_decay.astype(float) + 2j * np.pi * (turns.astype(float) + low))
    np.testing.assert_allclose(a**65536, want**65536, atol=1e-5)
    # One float32 alone would be off by much more: the test would not see a lost low part otherwise.
    single = np.asarray(a_re.high, np.float64) + 1j * np.asarray(a_im.high, np.float64)
    assert np.abs(single**65536 - want**65536).max() > 1e-4


def test_gradients_of_powers_against_complex_numbers():
    random = np.random.default_rng(0)
    decay, turns = -random.uniform(0.001, 0.3, 6), random.uniform(-0.5, 0.5, 6)
    exponents, weights = np.arange(9), random.normal(size=(2, 6, 9))

    def loss(decay, turns):
        re, im = powers.power(Pole(decay, turns, jnp.zeros_like(turns)), jnp.asarray(exponents))
        return jnp.sum(weights[0] * re + weights[1] * im)

    found = jax.grad(loss, argnums=(0, 1))(jnp.float32(decay), jnp.float32(turns))
    # d/ds Re(conj(w) e^{ls}) is Re(conj(w) l e^{ls}), and the phase is in turns.
    power = np.exp(exponents * (decay + 2j * np.pi * turns)[:, None])
    of_exponent = (weights[0] - 1j * weights[1]) * exponents * power
    np.testing.assert_allclose(found[0], of_exponent.real.sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], (2j * np.pi * of_exponent).real.sum(1), rtol=1e-4, atol=1e-4)


def test_powers_keep_themselves_for_their_gradient():
    pole = Pole(*jnp.full((3, 8), -0.1))
    kept = jax.tree.leaves(jax.vjp(lambda pole: powers.power(pole, jnp.arange(20)), pole)[1])
    assert sum(leaf.size == 160 for leaf in kept) == 2
