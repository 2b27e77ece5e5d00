"""Time per token after short and long prompts: `python -m benchmarks.generation_length [--tokens=64] [--repeats=7]`.

A GSS network's state has one size, so a token must cost the same after 512 tokens as after 8,192, and be made by the same
executable: both are measured, on random parameters, which cost what trained ones do. Prompts take turns within a repeat, so
that what else the machine does falls on both. Writes benchmarks/results/generation_length.json.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from t5x_ssm.inference import decoding
from t5x_ssm.inference.decoding import DecodeState, Generator
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder

PROMPTS = (512, 8192)
SIZE = {"vocab_size": 259, "embed_dim": 128, "num_layers": 4, "state_size": 64}
SAMPLING = Sampling(temperature=0.8, top_k=40, top_p=0.95)
# Tokens drawn between two looks of the host: streaming, and batch inference.
STEPS_PER_CALL = (1, 16)


def build() -> Generator:
    """A generator of the quickstart's size."""
    network = Decoder(
        vocab_size=SIZE["vocab_size"],
        embed_dim=SIZE["embed_dim"],
        num_layers=SIZE["num_layers"],
        mixers={"gss": functools.partial(GSS, state_size=SIZE["state_size"])},
    )
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = jax.jit(lambda key: network.init(key, tokens, tokens, enable_dropout=False)["params"])
    return Generator(network, init(jax.random.key(0)))


def lowered_step(generator: Generator, state: DecodeState) -> str:
    """The program of one step, as it is given to the compiler."""
    arguments = (generator.params, state, jnp.ones(1, bool), decoding.row_keys(0, 1), np.int32(1), np.int32(1))
    return generator.make_steps.lower(*arguments, sampling=SAMPLING, steps=1).as_text()


def seconds_per_token(generator: Generator, state: DecodeState, tokens: int, steps_per_call: int) -> float:
    """Draws `tokens` tokens from a copy of the state."""
    state = generator.copy(state, [0])
    jax.block_until_ready(state)
    began = time.perf_counter()
    stream = generator.generate(state, tokens, SAMPLING, eos_id=None, steps_per_call=steps_per_call)
    count = sum(1 for _ in stream)
    assert count == tokens
    return (time.perf_counter() - began) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="drawn per measurement")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    generator = build()
    random = np.random.default_rng(0)
    states, reading = {}, {}
    for length in PROMPTS:
        prompt = random.integers(3, SIZE["vocab_size"], (1, length))
        jax.block_until_ready(generator.read(generator.start(1), prompt))
        began = time.perf_counter()
        states[length] = jax.block_until_ready(generator.read(generator.start(1), prompt))
        reading[length] = (time.perf_counter() - began) / length
    short, long = (lowered_step(generator, states[length]) for length in PROMPTS)

    times = {(length, steps): [] for length in PROMPTS for steps in STEPS_PER_CALL}
    for key in times:
        seconds_per_token(generator, states[key[0]], arguments.tokens, key[1])
    for _ in range(arguments.repeats):
        for length, steps in times:
            times[length, steps].append(seconds_per_token(generator, states[length], arguments.tokens, steps))
    ratios = {
        steps: [b / a for a, b in zip(times[PROMPTS[0], steps], times[PROMPTS[1], steps], strict=True)]
        for steps in STEPS_PER_CALL
    }
    report.write(
        "generation_length",
        {
            "network": SIZE | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(generator.params))},
            "tokens_per_measurement": arguments.tokens,
            "same_program_for_both_prompts": short == long,
            "executables": {
                "reading": generator.read_piece._cache_size(),
                # One a number of steps per call, whatever the prompt.
                "steps": generator.make_steps._cache_size(),
            },
            "state_bytes": {str(n): sum(x.nbytes for x in jax.tree.leaves(states[n].cache)) for n in PROMPTS},
            "reading_seconds_per_token": {str(n): reading[n] for n in PROMPTS},
            "seconds_per_token": {
                f"prompt {length}, {steps} steps a call": report.spread(values)
                for (length, steps), values in times.items()
            },
            "long_over_short": {f"{steps} steps a call": report.spread(ratio) for steps, ratio in ratios.items()},
        },
    )


if __name__ == "__main__":
    main()
