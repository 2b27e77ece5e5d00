"""The GSS state space over length: `python -m benchmarks.gss [--repeats=7]`.

Time per token of the convolution (kernel generation included), forward and backward, at 2,048 and 16,384 tokens in turns,
and the compiler's temporary memory at 65,536. Writes benchmarks/results/gss.json.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, timing
from t5x_ssm.ssm import diagonal

CHANNELS, MODES = 256, 512


def core_gradient(parameters, u):
    """Gradient of a scalar of the core's output with respect to input and all parameters."""

    def loss(parameters, u):
        return jnp.sum(jnp.square(diagonal.convolve(diagonal.gss(*parameters), u)))

    return jax.grad(loss, argnums=(0, 1))(parameters, u)


def parameters():
    """GSS's own random start."""
    random = np.random.default_rng(0)
    shapes = ((MODES,), (MODES,), (CHANNELS, MODES), (CHANNELS, MODES), (CHANNELS,))
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def time_per_token(repeats: int) -> dict:
    """Seconds per token at both lengths, taking turns, and their ratio."""
    gradient = jax.jit(core_gradient)
    given = parameters()
    inputs = {length: jnp.ones((1, length, CHANNELS), jnp.float32) for length in (2048, 16384)}
    seconds = timing.in_turns({length: functools.partial(gradient, given, u) for length, u in inputs.items()}, repeats)
    seconds = {length: [s / length for s in values] for length, values in seconds.items()}
    return {
        "microseconds_per_token": {str(n): report.spread([1e6 * s for s in values]) for n, values in seconds.items()},
        "ratio_16384_over_2048": timing.ratios(seconds[16384], seconds[2048]),
    }


def temporary_memory() -> dict:
    """What the compiler takes beside arguments and results at 65,536 tokens."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters())
    u = jax.ShapeDtypeStruct((1, 65536, CHANNELS), jnp.float32)
    analysis = jax.jit(core_gradient).lower(shapes, u).compile().memory_analysis()
    return {"length": 65536, "temporary_MiB": analysis.temp_size_in_bytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    report.write(
        "gss",
        {
            "convolution": time_per_token(repeats),
            "memory": temporary_memory(),
        },
    )


if __name__ == "__main__":
    main()
