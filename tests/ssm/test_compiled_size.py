"""Pair arithmetic must stay small once compiled: the CPU compiler fuses, and then repeats, chains of small operations."""

import jax
import jax.numpy as jnp

from t5x_ssm.ssm import diagonal, double_float


def test_discretising_inside_a_larger_program_stays_small():
    """Parameters drawn in the same program, as an initialisation does: this once ran for hours."""

    def program(key):
        a, b, c, d = (jax.random.normal(k, (8,)) for k in jax.random.split(key, 4))
        return diagonal.kernel(diagonal.gss(a, b, c[None], d[None], jnp.ones(1)), 4)

    lowered = jax.jit(program).lower(jax.random.key(0))
    assert bool(jnp.all(jnp.isfinite(lowered.compile()(jax.random.key(0)))))


def test_the_exponential_stays_small():
    program = jax.jit(double_float.exp).lower(jnp.ones(8)).as_text()
    assert program.count("\n") < 400
