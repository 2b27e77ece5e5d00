"""What an encoder-decoder's token costs after short and long inputs: `python -m benchmarks.generation_pairs [--repeats=5]`.

SPADE's shape at a small size, greedy, random parameters, which cost what trained ones do. The keys and values that cross-attention
makes of the encoder's output are made once; beside it, in turns, the same decoder that makes them again for every
token, as T5X's networks do, whose outputs are the same. Writes benchmarks/results/generation_pairs.json.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, timing
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.inference.encoded import EncodedNetwork, read_inputs
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models.encoder_decoder import EncoderDecoder

INPUTS = (512, 2048)
WIDTH, LAYERS, HEADS, VOCAB = 256, 4, 4, 512


class Projecting(EncodedNetwork):
    """The decoder that is given the encoder's output, float [B, S, D], at every token."""

    def apply(self, variables, tokens, targets, **call):
        given = variables["params"]
        own = {**variables, "params": given["network"]}
        return self.network.apply(own, given["encoded"], given["inputs"], tokens, targets, method="decode", **call)


def build() -> EncoderDecoder:
    """One of SPADE's layers below local ones, and a decoder as deep."""
    window = functools.partial(Attention, num_heads=HEADS, span="sliding", window=128, causal=False)
    spade = functools.partial(
        Spade, state_space=functools.partial(S4StateSpace, state_size=32, bidirectional=True), attention=window
    )
    return EncoderDecoder(
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        encoder_pattern=f"spade swa*{LAYERS - 1}",
        decoder_pattern="attn",
        decoder_layers=LAYERS,
        encoder_mixers={"spade": spade, "swa": window},
        decoder_mixers={"attn": functools.partial(Attention, num_heads=HEADS)},
        cross=functools.partial(Attention, num_heads=HEADS, cross=True, causal=False),
        mlp=functools.partial(MLP, hidden=4 * WIDTH),
    )


def seconds_a_token(generator: Generator, batch: int, tokens: int) -> tuple[float, np.ndarray]:
    """Of the writing alone, and what was written [B, T]."""
    state = jax.block_until_ready(generator.start(batch, tokens))
    began = time.perf_counter()
    written = list(generator.generate(state, tokens, eos_id=None, steps_per_call=tokens))
    return (time.perf_counter() - began) / tokens, np.stack(written, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    network = build()
    pair = jnp.ones((1, 8), jnp.int32)
    start = jax.jit(lambda key: network.init(key, pair, pair, pair, enable_dropout=False)["params"])
    params = start(jax.random.key(0))
    encode = jax.jit(lambda inputs: network.apply({"params": params}, inputs, enable_dropout=False, method="encode"))
    read = jax.jit(functools.partial(read_inputs, network, params))
    figures = {}
    for length in INPUTS:
        inputs = jnp.asarray(np.random.default_rng(0).integers(3, VOCAB, (flags.batch, length)), jnp.int32)
        kinds = {"kept": (EncodedNetwork, read), "projecting": (Projecting, encode)}
        both = {}
        for name, (kind, encoded) in kinds.items():
            one, given = (
                {"network": params, "encoded": encoded(rows), "inputs": rows} for rows in (inputs[:1], inputs)
            )
            both[name] = Generator(kind(network), one).with_params(given)
        texts = {kind: seconds_a_token(generator, flags.batch, flags.tokens)[1] for kind, generator in both.items()}
        seconds = timing.in_turns(
            both, flags.repeats, lambda generator: seconds_a_token(generator, flags.batch, flags.tokens)[0]
        )
        figures[str(length)] = {
            "same_texts": bool(np.array_equal(texts["kept"], texts["projecting"])),
            "times_faster": timing.ratios(seconds["projecting"], seconds["kept"]),
            **{f"{kind}_seconds_a_token": report.spread(values) for kind, values in seconds.items()},
        }
    report.write("generation_pairs", {"settings": vars(flags), "inputs": figures})


if __name__ == "__main__":
    main()
