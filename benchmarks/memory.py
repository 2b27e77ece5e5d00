"""What a layer keeps for the backward pass: `python -m benchmarks.memory [--width=256] [--length=1024]`.

Networks of every mixer, with a feed-forward block of four times the width where one follows it, scanned over their layers, float32,
4 rows. What one more layer adds to the temporary memory of a compiled gradient, in numbers per token and channel, from networks of 4
and 8 layers; for every rematerialization policy. Nothing is run. Writes benchmarks/results/memory.json.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import report
from t5x_ssm.layers.basic import MLP
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.stack import REMAT_POLICIES

MIXERS = ("gss", "dss", "s4d", "s4", "s5", "h3", "swa", "attn")
ROWS, VOCABULARY = 4, 256
DEPTHS = (4, 8)


def temporary_bytes(mixer: str, policy: str, layers: int, width: int, length: int) -> int:
    """Of the gradient of a scalar of the logits."""
    mlp = functools.partial(MLP, hidden=4 * width)
    network = Decoder(VOCABULARY, width, mixer, num_layers=layers, mlp=mlp, remat_policy=policy)
    tokens = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    parameters = jax.eval_shape(
        lambda key, tokens: network.init(key, tokens, tokens)["params"], jax.random.key(0), tokens
    )

    def loss(parameters, tokens):
        return jnp.mean(jnp.square(network.apply({"params": parameters}, tokens, tokens, enable_dropout=False)))

    return jax.jit(jax.grad(loss)).lower(parameters, tokens).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    sizes = vars(parser.parse_args())
    numbers = 4 * ROWS * sizes["length"] * sizes["width"] * (DEPTHS[1] - DEPTHS[0])

    def kept(mixer, policy):
        few, many = (temporary_bytes(mixer, policy, depth, **sizes) for depth in DEPTHS)
        return round((many - few) / numbers, 2)

    figures = {mixer: {policy: kept(mixer, policy) for policy in REMAT_POLICIES} for mixer in MIXERS}
    report.write("memory", {**sizes, "rows": ROWS, "numbers_per_token_and_channel": figures})


if __name__ == "__main__":
    main()
