"""Pair arithmetic must stay small once compiled: the CPU compiler fuses, and then repeats, chains of small operations."""

import jax
import jax.numpy as jnp

from t5x_ssm.ssm import diagonal, double_float
from t5x_ssm.ssm.discretization import zoh


def test_discretising_inside_a_larger_program_stays_small():
    """Parameters drawn in the same program, as an initialisation does: this once ran for hours."""

    def program(key):
        a, b, c, d = (jax.random.normal(k, (8,)) for k in jax.random.split(key, 4))
        return diagonal.kernel(diagonal.gss(a, b, c[None], d[None], jnp.ones(1)), 4)

    lowered = jax.jit(program).lower(jax.random.key(0))
    assert bool(jnp.all(jnp.isfinite(lowered.compile()(jax.random.key(0)))))


def test_the_exponential_stays_small():
    program = jax.jit(double_float.exp).lower(jnp.ones(8)).as_text()
    assert program.count("\n") < 200


def test_a_discretisation_and_its_gradient_stay_small():
    """What shares a long chain must not each have a copy of it: with copies this has 1,953 instructions, without 467.

    And every fusion is a program of its own to LLVM, however small: in pairs of arrays there are 23, in planes 15.
    """

    def program(re, im, log_step):
        (pole, gain), transpose = jax.vjp(lambda *x: zoh(*x[:2], double_float.exp(x[2])), re, im, log_step)
        return (pole, gain), transpose((pole, gain))

    compiled = jax.jit(program).lower(*jnp.ones((3, 8))).compile().as_text()
    assert compiled.count(" = ") < 600
    assert compiled.count(" fusion(") < 20
