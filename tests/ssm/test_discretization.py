import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.ssm import double_float, initialization
from t5x_ssm.ssm.discretization import bilinear, zoh
from t5x_ssm.ssm.powers import power, power_minus_one

RULES = {"zoh": zoh, "bilinear": bilinear}

# LegS frequencies up to 20,860 with slow, ordinary and fast decays, and time steps over the whole usual range.
MODES = 128
LOG_STEP = np.linspace(np.log(1e-3), np.log(1e-1), 9, dtype=np.float32)[:, None]
RE = -np.exp(np.linspace(-12, 3, MODES)).astype(np.float32)
IM = np.random.default_rng(0).permutation(initialization.legs_poles(MODES).imag).astype(np.float32)


def reference(rule, re, im, log_step):
    """log Ā and B̄/B in complex128 numpy, of the float32 parameters as they are."""
    poles, step = re.astype(np.float64) + 1j * im.astype(np.float64), np.exp(log_step.astype(np.float64))
    if rule == "zoh":
        return step * poles, (np.exp(step * poles) - 1) / poles
    return np.log((1 + step * poles / 2) / (1 - step * poles / 2)), step / (1 - step * poles / 2)


@pytest.mark.parametrize("rule", RULES)
def test_powers_keep_their_phase_over_65536_steps(rule):
    pole, gain = jax.jit(lambda re, im, s: RULES[rule](re, im, double_float.exp(s)))(RE, IM, LOG_STEP)
    log_a, want_gain = reference(rule, RE, IM, LOG_STEP)
    np.testing.assert_allclose(gain[0] + 1j * np.asarray(gain[1]), want_gain, rtol=1e-6)
    np.testing.assert_allclose(pole.log_decay, log_a.real, rtol=1e-6, atol=1e-15)
    for exponent, tolerance in ((1, 1e-6), (1024, 2e-6), (65536, 2e-5)):
        re, im = power(pole, jnp.asarray(exponent))
        assert re.dtype == jnp.float32
        np.testing.assert_allclose(re + 1j * np.asarray(im), np.exp(exponent * log_a), rtol=0, atol=tolerance)
        re, im = power_minus_one(pole, jnp.asarray(exponent))
        want = np.expm1((exponent * log_a).real) * np.exp(1j * (exponent * log_a).imag)
        want = want + np.exp(1j * (exponent * log_a).imag) - 1
        np.testing.assert_allclose(re + 1j * np.asarray(im), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_derivatives(rule):
    """Of a power and of the gain, against complex128 automatic differentiation of the formulas."""

    def ours(re, im, s, exponent):
        pole, gain = RULES[rule](re, im, double_float.exp(s))
        parts = *power(pole, exponent), *gain
        return sum(jnp.sum(jnp.cos(k + x)) for k, x in enumerate(parts))

    def theirs(re, im, s, exponent):
        poles, step = jax.lax.complex(re, im), jnp.exp(s)
        if rule == "zoh":
            a, gain = jnp.exp(step * poles), (jnp.exp(step * poles) - 1) / poles
        else:
            a, gain = (1 + step * poles / 2) / (1 - step * poles / 2), step / (1 - step * poles / 2)
        power = jnp.exp(exponent * jnp.log(a))
        return sum(jnp.sum(jnp.cos(k + x)) for k, x in enumerate((power.real, power.imag, gain.real, gain.imag)))

    re, im, s = RE[::8], np.linspace(0, 40, MODES // 8, dtype=np.float32), LOG_STEP
    exponent = jnp.asarray(5)
    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(re, im, s, exponent)
    with jax.enable_x64(True):
        want = jax.jit(jax.grad(theirs, argnums=(0, 1, 2)))(*(jnp.asarray(x, jnp.float64) for x in (re, im, s)), 5)
    for x, y in zip(got, want, strict=True):
        assert np.abs(x - np.asarray(y)).max() < 2e-5 * np.abs(y).max()


@pytest.mark.parametrize("rule", RULES)
def test_edges_are_finite_with_finite_derivatives(rule):
    # A mode that does not move, one that decays at once, and (bilinear) the two points that map to zero.
    re = np.array([-1e-20, -1e-8, -1e4, -2.0, 0.0], np.float32)
    im = np.array([0, 0, 1e4, 0, 1.0], np.float32)

    @jax.jit
    def total(re, im, s):
        pole, gain = RULES[rule](re, im, double_float.exp(s))
        return sum(jnp.sum(x) for x in (*power(pole, jnp.asarray(3)), *gain))

    zero = np.zeros(5, np.float32)
    assert np.isfinite(total(re, im, zero))
    for g in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(re, im, zero):
        assert np.all(np.isfinite(g))


def test_gain_of_a_mode_at_rest_is_the_step():
    _, gain = zoh(jnp.zeros(1), jnp.zeros(1), jnp.full(1, 0.25))
    np.testing.assert_allclose([gain[0][0], gain[1][0]], [0.25, 0], rtol=1e-6)


def test_separate_steps_for_the_imaginary_part():
    log_steps = [np.float32(-3.0), np.float32(-2.0)]
    pole, gain = jax.jit(lambda *s: zoh(RE, IM[:8].repeat(16), *(double_float.exp(x) for x in s)))(*log_steps)
    exponent = np.exp(-3.0) * RE.astype(float) + 1j * np.exp(-2.0) * IM[:8].repeat(16).astype(float)
    re, im = power(pole, jnp.asarray(1))
    np.testing.assert_allclose(re + 1j * np.asarray(im), np.exp(exponent), atol=1e-6)
    want = (np.exp(exponent) - 1) / (RE + 1j * IM[:8].repeat(16).astype(float))
    np.testing.assert_allclose(gain[0] + 1j * np.asarray(gain[1]), want, rtol=2e-6, atol=1e-9)


def test_a_phase_of_half_a_turn_keeps_its_side():
    """-631.46 radians are 3·10⁻⁶ beyond half a turn: over 65,536 steps that is a fifth of a turn."""
    im = np.array([-631.460144043, 631.460144043], np.float32)
    pole, _ = zoh(jnp.zeros(2), im, double_float.exp(jnp.zeros(2)))
    re, im_of_power = power(pole, jnp.asarray(65536))
    want = np.exp(65536j * im.astype(np.float64))
    np.testing.assert_allclose(re + 1j * np.asarray(im_of_power), want, rtol=0, atol=2e-5)


# On both sides of where the derivative changes its form, at rest, and far away.
SIZES = np.array([0, 1e-17, 1e-8, 1e-3, 0.0999, 0.1001, 1, 30])


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-5), (True, 2e-12)])
def test_the_gain_and_its_derivative_at_every_size(x64, tolerance):
    """Every element against the series of (e^z - 1)/z and of its derivative in extended precision; forwards and backwards."""
    angles = np.linspace(np.pi / 2, 3 * np.pi / 2, 7)
    z = (SIZES[:, None] * np.exp(1j * angles)).ravel()
    with jax.enable_x64(x64):
        re, im = jnp.asarray(z.real), jnp.asarray(z.imag)
        step = jnp.ones(())
        z = np.asarray(re, np.longdouble) + 1j * np.asarray(im, np.longdouble)
        exact = np.where(z == 0, 1, z)
        wide = np.where(z == 0, 1, (np.exp(exact) - 1) / exact)
        slope = np.where(z == 0, 0.5, (np.exp(exact) - wide) / exact)
        k = np.arange(2, 14)[:, None]
        factorials = np.cumprod(np.arange(1, 15).astype(np.longdouble))  # 1!, 2!, …
        series = 1 + z / 2 + np.sum(z**k / factorials[k], axis=0)
        series_slope = 0.5 + z / 3 + np.sum(z**k / (factorials[k - 1] * (k + 2)), axis=0)
        small = np.abs(z) < 0.5
        wide, slope = np.where(small, series, wide), np.where(small, series_slope, slope)

        def gain(re, im):
            return jnp.stack(zoh(re, im, step)[1])

        got = jax.jit(gain)(re, im)
        np.testing.assert_allclose(got[0] + 1j * np.asarray(got[1]), wide.astype(complex), rtol=tolerance)
        one, zero = jnp.ones_like(re), jnp.zeros_like(im)
        for tangents, want in (((one, zero), slope), ((zero, one), 1j * slope)):
            _, forward = jax.jvp(gain, (re, im), tangents)
            np.testing.assert_allclose(forward[0] + 1j * np.asarray(forward[1]), want.astype(complex), rtol=tolerance)
        backward = jax.grad(lambda re, im: jnp.sum(gain(re, im)[0]), argnums=(0, 1))(re, im)
        np.testing.assert_allclose(backward[0] - 1j * np.asarray(backward[1]), slope.astype(complex), rtol=tolerance)
        each = jax.vmap(jax.hessian(lambda z: gain(z[0], z[1])[0]))(jnp.stack([re, im], axis=1))
        assert np.all(np.isfinite(each))
