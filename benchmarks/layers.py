"""Whole layers against the public formulation of the same: `python -m benchmarks.layers [--only=s5] [--repeats=7]`.

Forward and backward, gradients with respect to the input and all parameters, in float32; both sides in one process and in
turns. Seconds, the compiler's temporary memory and the time to compile. Writes benchmarks/results/layers_<section>.json.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from t5x_ssm.layers.s5 import S5

BATCH, CHANNELS = 4, 256
LENGTHS = (1024, 4096, 16384)


def compare(ours: Callable, baseline: Callable, parameters, lengths, repeats: int) -> dict:
    """Times two functions (parameters, u [B, L, H]) -> y of u's shape, which must agree."""
    figures = {}
    for length in lengths:
        u = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, length, CHANNELS)), jnp.float32)
        programs, row = {}, {}
        for name, function in (("ours", ours), ("baseline", baseline)):

            def loss(parameters, u, function=function):
                y = function(parameters, u)
                return jnp.mean(jnp.square(y)), y

            lowered = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(parameters, u)
            began = time.perf_counter()
            programs[name] = lowered.compile()
            row[name] = {
                "compile_seconds": time.perf_counter() - began,
                "temporary_MiB": programs[name].memory_analysis().temp_size_in_bytes / 2**20,
            }
        found, expected = (program(parameters, u)[1] for program in programs.values())
        row["largest_difference"] = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
        del found, expected
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, program in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(parameters, u))
                seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            row[name]["seconds"] = report.spread(values)
        row["times_faster"] = report.spread(
            [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["baseline"], strict=True)]
        )
        for quantity in ("compile_seconds", "temporary_MiB"):
            row[f"{quantity}_ratio"] = row["ours"][quantity] / row["baseline"][quantity]
        figures[str(length)] = row
    return figures


def associative_s5(parameters, u):
    """S5 as its public code computes it, GELU included: complex projections a token at a time, and an associative scan."""
    p = parameters["ssm"]
    poles, step = jax.lax.complex(p["lambda_re"], p["lambda_im"]), jnp.exp(p["log_step"])
    a = jnp.exp(poles * step)
    b = ((a - 1) / poles)[:, None] * jax.lax.complex(p["b_re"], p["b_im"])
    c = jax.lax.complex(p["c_re"], p["c_im"])

    def compose(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def one_row(u):
        driven = jax.vmap(lambda token: b @ token)(u)
        _, states = jax.lax.associative_scan(compose, (a * jnp.ones((len(u), 1)), driven))
        return jax.vmap(lambda x, token: 2 * (c @ x).real + p["d"] * token)(states, u)

    return jax.nn.gelu(jax.vmap(one_row)(u))


def s5(repeats: int) -> dict:
    """S5 with 128 complex modes and a GELU."""
    layer = S5(state_size=256, output="gelu")
    parameters = jax.jit(lambda key: layer.init(key, jnp.zeros((1, 2, CHANNELS)))["params"])(jax.random.key(0))
    return compare(
        lambda parameters, u: layer.apply({"params": parameters}, u), associative_s5, parameters, LENGTHS, repeats
    )


SECTIONS = {"s5": s5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    for name, section in SECTIONS.items():
        if arguments.only in (None, name):
            report.write(f"layers_{name}", section(arguments.repeats))


if __name__ == "__main__":
    main()
