"""The GSS state space over length: `python -m benchmarks.gss [--repeats=7]`.

Time per token of the convolution (kernel generation included), forward and backward, at 2,048 and 16,384 tokens in turns;
the compiler's temporary memory at 65,536; and the time per token of generation after short and long prompts.
Writes benchmarks/results/gss.json.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
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
    for u in inputs.values():
        jax.block_until_ready(gradient(given, u))
    seconds: dict[int, list[float]] = {length: [] for length in inputs}
    for _ in range(repeats):
        for length, u in inputs.items():
            began = time.perf_counter()
            jax.block_until_ready(gradient(given, u))
            seconds[length].append((time.perf_counter() - began) / length)
    ratios = [long / short for short, long in zip(seconds[2048], seconds[16384], strict=True)]
    return {
        "microseconds_per_token": {str(n): report.spread([1e6 * s for s in values]) for n, values in seconds.items()},
        "ratio_16384_over_2048": report.spread(ratios),
    }


def temporary_memory() -> dict:
    """What the compiler takes beside arguments and results at 65,536 tokens."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters())
    u = jax.ShapeDtypeStruct((1, 65536, CHANNELS), jnp.float32)
    analysis = jax.jit(core_gradient).lower(shapes, u).compile().memory_analysis()
    return {"length": 65536, "temporary_MiB": analysis.temp_size_in_bytes / 2**20}


def generation(repeats: int, new_tokens: int = 64) -> dict:
    """Seconds per generated token after prompts of 512 and 8,192 tokens, and whether both used the same executable."""
    network = Decoder(
        vocab_size=259, embed_dim=256, num_layers=4, mixers={"gss": functools.partial(GSS, state_size=128)}
    )
    tokens = jnp.ones((1, 8), jnp.int32)
    params = jax.jit(network.init, static_argnames="enable_dropout")(
        jax.random.key(0), tokens, tokens, enable_dropout=False
    )["params"]
    generator = Generator(network, params)
    states = {n: generator.read(generator.start(1), np.full((1, n), 70, np.int32)) for n in (512, 8192)}
    seconds: dict[int, list[float]] = {n: [] for n in states}
    for repeat in range(repeats + 1):
        for n, state in states.items():
            stream = generator.generate(generator.copy(state, [0]), new_tokens, eos_id=None)
            began = time.perf_counter()
            count = sum(1 for _ in stream)
            if repeat:
                seconds[n].append((time.perf_counter() - began) / count)
    return {
        "milliseconds_per_token": {str(n): report.spread([1e3 * s for s in values]) for n, values in seconds.items()},
        "ratio_8192_over_512": report.spread([b / a for a, b in zip(seconds[512], seconds[8192], strict=True)]),
        "decode_executables": generator.make_steps._cache_size(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    report.write(
        "gss",
        {
            "convolution": time_per_token(repeats),
            "memory": temporary_memory(),
            "generation": generation(repeats),
        },
    )


if __name__ == "__main__":
    main()
