import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm.double_float import Double, double

RNG = np.random.default_rng(0)
X = RNG.normal(size=512).astype(np.float32)
Y = RNG.normal(size=512).astype(np.float32)
Y_LOW = (Y * RNG.uniform(-2e-8, 2e-8, 512)).astype(np.float32)


def value(pair):
    return np.asarray(pair.high, np.float64) + np.asarray(pair.low, np.float64)


def exact(high, low=0):
    return high.astype(np.float64) + low


# The compiler contracts and reassociates only what it compiles together, so both ways are tested.
@pytest.fixture(params=[False, True], ids=["eager", "jit"])
def call(request):
    return lambda f, *args: value((jax.jit(f) if request.param else f)(*args))


def test_sums_and_products_keep_twice_the_digits(call):
    y = Double(jnp.asarray(Y), jnp.asarray(Y_LOW))
    np.testing.assert_allclose(call(double_float.add, X, y), exact(X) + exact(Y, Y_LOW), rtol=0, atol=1e-13)
    np.testing.assert_allclose(call(double_float.multiply, X, y), exact(X) * exact(Y, Y_LOW), rtol=1e-13)


def test_exponential(call):
    x = RNG.uniform(-44, 44, 20000).astype(np.float32)
    np.testing.assert_allclose(call(double_float.exp, x), np.exp(exact(x)), rtol=2e-12)


def test_exponential_outside_its_range_is_the_plain_one(call):
    x = np.array([-np.inf, -200, -88, -44, 44, 88, 100, np.inf], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(call(double_float.exp, x), np.exp(x), rtol=2e-7, atol=1e-37)


def test_cosine_and_sine(call):
    turns = RNG.uniform(-1, 1, 2000).astype(np.float32)
    low = (turns * 1e-8).astype(np.float32)
    angle = 2 * np.pi * exact(turns, low)
    for part, function in enumerate((np.cos, np.sin)):
        got = call(lambda t, low, part=part: double_float.cosine_and_sine(Double(t, low))[part], turns, low)
        np.testing.assert_allclose(got, function(angle), rtol=0, atol=2e-11)


def test_angle_of_a_vector(call):
    got = call(lambda x, y, low: double_float.turns_of(double(x), Double(y, low)), X, Y, Y_LOW)
    np.testing.assert_allclose(got, np.arctan2(exact(Y, Y_LOW), exact(X)) / (2 * np.pi), rtol=0, atol=1e-11)


def test_turns_are_reduced_exactly(call):
    turns = (Y * 1000).astype(np.float32)
    got = call(lambda t, low: double_float.reduce_turns(Double(t, low)), turns, Y_LOW)
    want = exact(turns, Y_LOW)
    np.testing.assert_allclose(got, want - np.round(exact(turns)), rtol=0, atol=1e-12)


def test_reduced_turns_stay_within_half_a_turn(call):
    """Where the high part alone is half a turn, the low part decides to which side."""
    turns = np.array([-100.5, 100.5, -0.5, 0.5, 332.5, -332.5], np.float32)[:, None]
    low = np.array([-1e-5, -3e-6, 0, 3e-6, 1e-5], np.float32)
    turns, low = np.broadcast_arrays(turns, low)
    low = np.where(np.abs(turns) < 1, low * 1e-3, low).astype(np.float32)
    got = call(lambda t, low: double_float.reduce_turns(Double(t, low)), turns, low)
    assert np.abs(got.astype(np.float32)).max() <= 0.5
    off = got - exact(turns, low)
    np.testing.assert_allclose(off, np.round(off), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (lambda x: double_float.exp(x).high, jnp.exp),
        (lambda x: double_float.multiply(double_float.exp(x), x).high, lambda x: jnp.exp(x) * x),
        (lambda x: double_float.cosine_and_sine(double(x))[1].high, lambda x: jnp.sin(2 * np.pi * x)),
        (lambda x: double_float.turns_of(double(x), double(1 + x)).high, lambda x: jnp.arctan2(1 + x, x) / (2 * np.pi)),
        (lambda x: double_float.reduce_turns(double_float.multiply(x, x)).high, lambda x: x * x),
    ],
    ids=["exp", "product", "sine", "angle", "reduction"],
)
def test_derivatives_are_those_of_the_plain_functions(function, reference):
    x = jnp.asarray(np.clip(X, -0.9, 0.9))
    got = jax.jit(jax.grad(lambda x: function(x).sum()))(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: reference(x).sum())(x), rtol=1e-5, atol=1e-6)


def test_float64_goes_through_unharmed():
    with jax.enable_x64(True):
        x = jnp.asarray(np.linspace(-1, 1, 101))
        np.testing.assert_allclose(value(double_float.exp(x)), np.exp(np.asarray(x)), rtol=1e-15)
        cosine, sine = double_float.cosine_and_sine(double(x))
        np.testing.assert_allclose(value(sine), np.sin(2 * np.pi * np.asarray(x)), atol=1e-15)
        np.testing.assert_allclose(value(cosine), np.cos(2 * np.pi * np.asarray(x)), atol=1e-15)
        angle = double_float.turns_of(cosine, sine)
        np.testing.assert_allclose(np.exp(2j * np.pi * value(angle)), np.exp(2j * np.pi * np.asarray(x)), atol=1e-14)
