"""The synthetic languages of the H3 paper, beside its table: `python -m benchmarks.synthetics [--share=1.0]`.

Networks of two layers learn sentences that end in a token which only recall can predict (`tasks.synthetic_languages`), with the
project's own networks, objective, optimizer and train step. Accuracy is that of the answers of 500 held-out sentences.

As in the paper: width 32, feed-forward blocks of 128, layer norm, dropout 0.1 on the embeddings, AdamW at 5e-4 with weight
decay 0.1, 10 % warm-up and a cosine, 32 of 5,000 sentences a step, loss on all positions, 400 epochs of the induction head and 200 of
associative recall (or a share of them), weights that start as N(0, 0.02) as GPT-2's do; attention has one head and a dropout of 0.1
on its weights, and where it is alone learned positions, else none. Each seed has its own sentences, parameters and order. Besides:
  - GSS has no feed-forward block, for its gate is one (width 128 too); the others have one after each mixer;
  - a text begins with the no-op, and its first symbol is predicted from that.

--learning_rate and --start=own (the layers' own initial values, N(0, 1/width) for projections) are for runs that are too short for
N(0, 0.02), under which even attention stands still for thousands of steps. --dropout=text has one mask for all tokens of a sentence,
as T5 has: recall of H3 then stops short of what it reaches with a mask a token. --attention_dropout=0 is for that of attention.
Writes docs/results/synthetics.json after every network, and docs/results/synthetics.md from it.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP, LayerNorm
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.ssm import convolution
from t5x_ssm.training import optimizers, schedules
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_eval_step, make_train_step
from tasks.synthetic_languages import LANGUAGES, sentences

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
WIDTH, HIDDEN, BATCH, LEARNING_RATE, WEIGHT_DECAY, START = 32, 128, 32, 5e-4, 0.1, 0.02
ATTENTION_DROPOUT = 0.1
STARTS = ("gpt2", "own")
DROPOUTS = ("token", "text")
LONGEST = 64  # learned positions
EPOCHS = {"induction_head": 400, "associative_recall": 200}
# On sentences of another length than those it was trained on.
TRANSFER = {"associative_recall": "associative_recall_40"}
PATTERNS = {
    "s4d": "s4d",
    "dss": "dss",
    "gss": "gss",
    "s5": "s5",
    "h3": "h3",
    "h3-hybrid": "h3 attn",
    "attention": "attn",
}
MIXERS = {
    "s4d": functools.partial(S4D, feed_forward=True),
    "dss": functools.partial(DSS, output="glu", feed_forward=True),
    "gss": GSS,
    "s5": functools.partial(S5, state_size=64, feed_forward=True),
    "h3": H3,
}
# Table 1 of the paper, in percent, and its figure for sentences of twice the length.
PAPER = {
    "random": {"induction_head": 5.0, "associative_recall": 25.0},
    "s4d": {"induction_head": 35.6, "associative_recall": 86.0},
    "gss": {"induction_head": 6.8, "associative_recall": 78.0},
    "h3": {"induction_head": 100.0, "associative_recall": 99.8, "associative_recall_40": 98.4},
    "attention": {"induction_head": 100.0, "associative_recall": 100.0},
}


def network(
    system: str, vocabulary_size: int, per_token: bool = True, attention_dropout: float = ATTENTION_DROPOUT
) -> Decoder:
    """The network of one row of the table; `per_token` is of its dropout masks on the embeddings."""
    attention = functools.partial(Attention, num_heads=1, use_bias=True, dropout_rate=attention_dropout)
    return Decoder(
        vocab_size=vocabulary_size,
        embed_dim=WIDTH,
        pattern=PATTERNS[system],
        num_layers=2,
        mixers=MIXERS | {"attn": attention},
        mlp=functools.partial(MLP, hidden=HIDDEN, use_bias=True),
        norm=functools.partial(LayerNorm, epsilon=1e-5),
        embed_dropout_rate=0.1,
        embed_dropout_per_token=per_token,
        learned_positions=LONGEST if system == "attention" else None,
    )


def as_gpt2_starts(params: Any, key: jax.Array) -> Any:
    """Draws projections and embeddings from N(0, 0.02), the outputs of feed-forward blocks from that over √(2 · layers)."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)

    def draw(path, leaf, key):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not re.search(r"/(kernel|embedding)$", name):
            return leaf
        return jax.random.normal(key, leaf.shape, leaf.dtype) * (START / 2 if "/mlp/wo/" in name else START)

    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])


def batch_of(sentences_BL: jax.Array, answers_only: bool) -> dict[str, jax.Array]:
    """A batch under seqio's names: loss on everything, or on the last token."""
    weights = jnp.ones(sentences_BL.shape, jnp.float32)
    if answers_only:
        weights = weights.at[:, :-1].set(0)
    return {
        "decoder_input_tokens": jnp.pad(sentences_BL[:, :-1], [(0, 0), (1, 0)]),
        "decoder_target_tokens": sentences_BL,
        "decoder_loss_weights": weights,
    }


def corpora(name: str, split: str, seeds: list[int]) -> jax.Array:
    """Sentences of every seed, int32 [S, n, L]."""
    return jnp.asarray(np.stack([sentences(LANGUAGES[name], split, seed) for seed in seeds]))


def train(
    system: str,
    name: str,
    seeds: list[int],
    epochs: int,
    rate: float = LEARNING_RATE,
    start_as: str = STARTS[0],
    per_token: bool = True,
    attention_dropout: float = ATTENTION_DROPOUT,
) -> dict[str, Any]:
    """Trains one network of each seed side by side.

    Returns:
      accuracy: {language: percent of each seed at the end}; curve: [(epoch, nats a token in training, percent), …], means over
      the seeds; seconds of all epochs and of compilation, parameters.
    """
    model = LanguageModel(network(system, LANGUAGES[name].vocabulary_size, per_token, attention_dropout))
    texts = corpora(name, "train", seeds)
    steps = texts.shape[1] // BATCH
    optimizer = optimizers.adamw(
        schedules.warmup_cosine(rate, warmup_steps=steps * epochs // 10, total_steps=steps * epochs),
        b2=0.999,
        weight_decay=WEIGHT_DECAY,
        clip_global_norm=None,
    )

    def start(key):
        shapes = {"decoder_input_tokens": jax.ShapeDtypeStruct((1, texts.shape[2]), jnp.int32)}
        params = model.init(key, shapes)["params"]
        if start_as == "gpt2":
            params = as_gpt2_starts(params, jax.random.fold_in(key, 1))
        return TrainState.create(params, optimizer)

    def epoch(state, key, texts):
        dropout, order = jax.random.split(key)
        step = make_train_step(model, optimizer, rng=dropout)
        order = jax.random.permutation(jax.random.fold_in(order, state.step), texts.shape[0])

        def one(state, rows):
            state, metrics = step(state, batch_of(texts[rows], answers_only=False))
            return state, metrics["nats"] / metrics["weights"]

        state, nats = jax.lax.scan(one, state, order[: steps * BATCH].reshape(steps, BATCH))
        return state, nats.mean()

    def percent_right(params, texts):
        sums = make_eval_step(model)(params, batch_of(texts, answers_only=True))
        return 100 * sums["correct"] / sums["weights"]

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    states = jax.jit(jax.vmap(start))(keys)
    began = time.perf_counter()
    run = jax.jit(jax.vmap(epoch), donate_argnums=0).lower(states, keys, texts).compile()
    compiled = time.perf_counter() - began
    measure = jax.jit(jax.vmap(percent_right))
    held_out = corpora(name, "validation", seeds)
    curve = []
    began = time.perf_counter()
    for number in range(1, epochs + 1):
        states, nats = run(states, keys, texts)
        if number == epochs or number % max(1, epochs // 20) == 0:
            percent = measure(states.params, held_out)
            curve.append([number, *(round(float(jnp.mean(x)), 4) for x in (nats, percent))])
            print(f"{system} {name} epoch {number}: {curve[-1][1:]} {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    tested = {name: held_out}
    if name in TRANSFER:
        tested[TRANSFER[name]] = corpora(TRANSFER[name], "validation", seeds)
    return {
        "epochs": epochs,
        "accuracy": {n: [round(float(x), 2) for x in measure(states.params, t)] for n, t in tested.items()},
        "curve": curve,
        "seconds": round(seconds, 1),
        "compile_seconds": round(compiled, 1),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(states.params)) // len(seeds),
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown page of the results."""
    columns = ("induction_head", "associative_recall", "associative_recall_40")

    def ours(system, column):
        for run in results["systems"].get(system, {}).values():
            if column in run["accuracy"]:
                values = run["accuracy"][column]
                return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        return "–"

    def paper(system, column):
        return f"{PAPER[system][column]:.1f}" if column in PAPER.get(system, {}) else "–"

    lines = [
        "| system | induction head | paper | associative recall | paper | recall, 20 → 40 | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in ("random", *PATTERNS):
        cells = [cell for column in columns for cell in (ours(system, column), paper(system, column))]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    runs = [run for of in results["systems"].values() for run in of.values()]
    machine = results["machine"]

    def how(name):
        """Lines on how a language was trained: which systems, for each command."""
        trained: dict[tuple[str, int], list[str]] = {}
        for system in PATTERNS:
            if run := results["systems"].get(system, {}).get(name):
                trained.setdefault((run["command"], run["epochs"]), []).append(system)
        if not trained:
            return [f"- {name}: not trained yet; the command with --languages={name} adds it to the table."]
        lines = []
        for (command, epochs), systems in trained.items():
            share = f"{epochs} epochs of the paper's {EPOCHS[name]}, the schedule shortened with them"
            if epochs == EPOCHS[name]:
                share = f"{epochs} epochs, as many as in the paper"
            lines.append(f"- {name}, {', '.join(systems)}: {share}. `{command}`")
        return lines

    return "\n".join(
        [
            "# Synthetic languages",
            "",
            "Percent of the answers of 500 held-out sentences: the mean of three seeds (the least – the largest), beside Table 1 of",
            "Fu et al. 2022. `python -m benchmarks.synthetics` says what was trained and how; each figure is that of the last epoch.",
            "",
            *lines,
            "",
            *(line for name in EPOCHS for line in how(name)),
            f"- Seeds {', '.join(map(str, results['seeds']))}.",
            "- A schedule shorter than the paper's ends before a network has learnt what it can: a figure below the paper's is then no",
            "  evidence against it. What `--learning_rate`, `--start` and the two of dropout change is not the paper's either.",
            f"- {sum(run['seconds'] for run in runs):,.0f} seconds of training on {machine['cores']} cores ({machine['processor']}), "
            f"jax {machine['jax']}. Curves, seconds and parameter counts of each: [synthetics.json](synthetics.json).",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the paper's epochs")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--start", choices=STARTS, default=STARTS[0], help="how weights start")
    parser.add_argument("--dropout", choices=DROPOUTS, default=DROPOUTS[0], help="what has a mask of its own")
    parser.add_argument("--attention_dropout", type=float, default=ATTENTION_DROPOUT, help="on the attention weights")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--systems", default=",".join(PATTERNS))
    parser.add_argument("--languages", default=",".join(EPOCHS))
    parser.add_argument("--output_dir", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    # These arrays are too small for a second thread, and so short that on a CPU transforms beat written-out sums in training.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    convolution.DIRECT_LAGS = 8
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path, page = arguments.output_dir / "synthetics.json", arguments.output_dir / "synthetics.md"
    results: dict[str, Any] = {"seeds": seeds, "machine": report.machine(), "systems": {}}
    if path.exists():
        # What other calls have trained from the same seeds stays.
        before = json.loads(path.read_text())
        if before["seeds"] == seeds:
            results["systems"] = before["systems"]
    for name in arguments.languages.split(","):
        for system in arguments.systems.split(","):
            epochs = max(1, round(arguments.share * EPOCHS[name]))
            per_token = arguments.dropout == "token"
            run = train(
                system,
                name,
                seeds,
                epochs,
                arguments.learning_rate,
                arguments.start,
                per_token,
                arguments.attention_dropout,
            )
            command = (
                f"python -m benchmarks.synthetics --languages={name} --share={arguments.share:g} --seeds={arguments.seeds} "
                f"--learning_rate={arguments.learning_rate:g} --start={arguments.start} --dropout={arguments.dropout} "
                f"--attention_dropout={arguments.attention_dropout:g}"
            )
            results["systems"].setdefault(system, {})[name] = {"command": command, **run}
            path.write_text(json.dumps(results, indent=1) + "\n")
            page.write_text(table(results))
    print(page.read_text())


if __name__ == "__main__":
    main()
