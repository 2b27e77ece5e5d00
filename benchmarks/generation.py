"""Tokens a second of H3's hybrid and of a Transformer of equal size: `python -m benchmarks.generation [--batch=8]`.

The H3 paper's setting: prompts of 512, 1,024 and 1,536 tokens, 128 new ones, greedily, for a whole batch. The hybrid has two layers
of full attention; its other layers keep a state of fixed size, the Transformer keys and values of every token. The Transformer's
feed-forward blocks are widened until it has the hybrid's number of parameters. Both decode with the project's own `Generator`, in
turns within one process, on random parameters, which cost what trained ones do. The paper's figures for 1.3B, batch 64, on an A100
are 1980/1580/1240 tokens/s of the hybrid over 1340/770/520 of the Transformer: ratios of 1.5, 2.1 and 2.4.

On an accelerator (1.3B): --layers=24 --width=2048 --heads=16 --vocab=50264 --batch=64 --dtype=bfloat16 --steps_per_call=128
Writes benchmarks/results/generation.json.
"""

import argparse
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, timing
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.h3 import H3
from t5x_ssm.models.decoder import Decoder

# Tokens a second of the paper at each prompt: (hybrid, Transformer).
PAPER = {512: (1980, 1340), 1024: (1580, 770), 1536: (1240, 520)}


def build(kind: str, flags: argparse.Namespace, hidden: int) -> Decoder:
    """The "hybrid" or the "transformer", with feed-forward blocks of this width."""
    # The paper's second layer, and the one half the depth above it.
    attention = (1, 1 + flags.layers // 2) if kind == "hybrid" else range(flags.layers)
    pattern = " ".join("attn" if i in attention else "h3" for i in range(flags.layers))
    return Decoder(
        vocab_size=flags.vocab,
        embed_dim=flags.width,
        pattern=pattern,
        mixers={"h3": H3, "attn": functools.partial(Attention, num_heads=flags.heads, rotary=True, use_bias=True)},
        mlp=functools.partial(MLP, hidden=hidden, use_bias=True),
        # Unrolled, so that no layer's cache is copied out of and into one array over the layers.
        scan_layers=False,
        dtype=flags.dtype,
    )


def initial(network: Decoder) -> Any:
    """A function of a key that draws the network's parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: network.init(key, tokens, tokens, enable_dropout=False)["params"]


def size(network: Decoder) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(initial(network), jax.random.key(0))))


def generators(flags: argparse.Namespace) -> dict[str, Generator]:
    """Both, with as many parameters as each other to a thousandth."""
    own = 4 * flags.width
    missing = size(build("hybrid", flags, own)) - size(build("transformer", flags, own))
    wider = own + 8 * round(missing / (8 * flags.layers * (2 * flags.width + 1)))
    networks = {"hybrid": build("hybrid", flags, own), "transformer": build("transformer", flags, wider)}

    def stored(path, leaf):
        # Weights are read once a token: in the type of the activations, but for state spaces.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if re.search(r"(^|/)(\w+_)?ssm/", name) else leaf.astype(flags.dtype)

    def draw(network):
        start = initial(network)
        return jax.jit(lambda key: jax.tree_util.tree_map_with_path(stored, start(key)))(jax.random.key(0))

    return {kind: Generator(network, draw(network)) for kind, network in networks.items()}


def seconds(generator: Generator, prompts: np.ndarray, flags: argparse.Namespace) -> dict[str, float]:
    """Of reading the prompts and of drawing the new tokens."""
    state = jax.block_until_ready(generator.start(flags.batch, prompts.shape[1] + flags.new_tokens))
    began = time.perf_counter()
    state = jax.block_until_ready(generator.read(state, prompts))
    read = time.perf_counter() - began
    began = time.perf_counter()
    stream = generator.generate(state, flags.new_tokens, eos_id=None, steps_per_call=flags.steps_per_call)
    drawn = sum(1 for _ in stream)
    assert drawn == flags.new_tokens
    return {"read": read, "write": time.perf_counter() - began}


def bytes_a_sequence(generator: Generator, batch: int, length: int) -> int:
    """What the cache of a text of this length takes."""
    state = jax.eval_shape(lambda: generator.start(batch, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache)) // batch


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both at every prompt, their ratios, and the bytes that a sequence takes."""
    both = generators(flags)
    random = np.random.default_rng(0)
    lengths = [int(length) for length in flags.prompts.split(",")]
    prompts = {n: random.integers(3, flags.vocab, (flags.batch, n)).astype(np.int32) for n in lengths}
    figures: dict[str, Any] = {}
    for length, prompt in prompts.items():
        speeds: dict[str, dict[str, list[float]]] = {kind: {"writing": [], "all": []} for kind in both}
        memory = {}
        for kind, generator in both.items():
            memory[kind] = bytes_a_sequence(generator, flags.batch, length + flags.new_tokens)
            seconds(generator, prompt, flags)  # compiles
        for _ in range(flags.repeats):
            for kind, generator in both.items():
                took = seconds(generator, prompt, flags)
                tokens = flags.batch * flags.new_tokens
                speeds[kind]["writing"].append(tokens / took["write"])
                speeds[kind]["all"].append(tokens / (took["read"] + took["write"]))
        row: dict[str, Any] = {"bytes_a_sequence": memory}
        for what in ("writing", "all"):
            pair = [speeds[kind][what] for kind in ("hybrid", "transformer")]
            row[f"tokens_per_second_{what}"] = {kind: report.spread(of[what]) for kind, of in speeds.items()}
            row[f"times_transformer_{what}"] = timing.ratios(*pair)
        if length in PAPER:
            row["times_transformer_paper"] = PAPER[length][0] / PAPER[length][1]
        figures[str(length)] = row
        print(f"prompt {length}: {row['times_transformer_writing']['median']:.2f} times the Transformer", flush=True)
    return {
        "settings": {**vars(flags), "patterns": {kind: g.network.pattern for kind, g in both.items()}},
        "parameters": {kind: sum(leaf.size for leaf in jax.tree.leaves(g.params)) for kind, g in both.items()},
        "prompts": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=259)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", default=",".join(map(str, PAPER)))
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--steps_per_call", type=int, default=16, help="tokens drawn between two looks of the host")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    report.write("generation", measure(parser.parse_args()))


if __name__ == "__main__":
    main()
