"""Shortened runs of the Long Range Arena's generated tasks: S5, S4D and local attention side by side.

    python -m benchmarks.long_range_arena [--tasks=lra_listops,lra_pathfinder] [--seeds=0,1] [--steps=…] [--output=docs/results]

Same data, steps, batches, width and depth, nearly the same number of parameters; hundreds of times below the published
recipes in steps, so the accuracies say which system learns soonest, not which is best. No example is seen twice. Accuracy is over
the first examples of the test split, after the last step; chance is the share of their most frequent class. Writes a table and a
JSON file.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks import report
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.batch_norm import BatchNorm
from t5x_ssm.layers.s4 import S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.models.classifier import Classifier, SequenceEncoder
from t5x_ssm.models.objectives import Classification
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.training import optimizers, parameter_groups, schedules, trainer
from tasks.long_range_arena import generated, listops

WIDTH, DEPTH, BATCH, TEST_EXAMPLES = 32, 2, 16, 512
# (length, classes, vocabulary or None for pixels, steps)
TASKS = {"lra_listops": (2048, 10, listops.VOCABULARY_SIZE, 120), "lra_pathfinder": (1024, 2, None, 240)}
SYSTEMS: dict[str, dict[str, Any]] = {
    "S5": {
        "mixer": functools.partial(S5, state_size=48, blocks=4, bidirectional=True, output="half_glu2"),
        "norm": BatchNorm,
        "groups": functools.partial(parameter_groups.s5_groups, "BfastandCdecay", 3.0),
        "learning_rate": 3e-3,
    },
    "S4D": {
        "mixer": functools.partial(S4D, state_size=32, bidirectional=True),
        "norm": BatchNorm,
        "groups": parameter_groups.s4_groups,
        "learning_rate": 3e-3,
    },
    "local attention": {
        "mixer": functools.partial(Attention, num_heads=4, span="sliding", window=32, causal=False, rotary=True),
        "mlp": functools.partial(MLP, hidden=WIDTH),
        "final_norm": True,
        "groups": parameter_groups.default_groups,
        "learning_rate": 1e-3,
    },
}


def examples(name: str, split: str, count: int, length: int) -> dict[str, np.ndarray]:
    """The first examples of a split, padded, as arrays of a batch."""
    inputs, lengths, targets = (
        np.zeros((count, length), np.int32),
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
    )
    for i in range(count):
        example = generated.example(name, split, i)
        lengths[i] = len(example["inputs"])
        inputs[i, : lengths[i]] = example["inputs"]
        targets[i] = example["targets"][0]
    return {"inputs": inputs, "input_lengths": lengths, "targets": targets, "weights": np.ones(count, np.int32)}


def batch_of(data: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    return {name: array[step * BATCH : (step + 1) * BATCH] for name, array in data.items()}


def objective(settings: dict[str, Any], classes: int, vocabulary: int | None) -> Classification:
    """A classifier of one system."""
    shared = {name: settings[name] for name in ("norm", "mlp", "final_norm") if name in settings}
    encoder = functools.partial(
        SequenceEncoder,
        embed_dim=WIDTH,
        pattern="mixer",
        num_layers=DEPTH,
        mixers={"mixer": settings["mixer"]},
        vocab_size=vocabulary,
        **shared,
    )
    pixels = {} if vocabulary else {"feature_scale": 2 / 255, "feature_offset": -1.0}
    return Classification(Classifier(classes, encoder), **pixels)


def run(name: str, system: str, seeds: list[int], steps: int, data: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Trains one system on one task from each seed."""
    length, classes, vocabulary, _ = TASKS[name]
    settings = SYSTEMS[system]
    rate = schedules.warmup_cosine(settings["learning_rate"], max(1, steps // 10), steps, 0.0)
    optimizer = optimizers.adamw(rate, weight_decay=0.05, groups=settings["groups"]())
    shapes = {n: jax.ShapeDtypeStruct((BATCH, *a.shape[1:]), a.dtype) for n, a in data["train"].items()}
    mesh = make_mesh(MeshConfig())
    accuracies, losses, seconds = [], [], []
    for seed in seeds:
        training = trainer.Trainer(objective(settings, classes, vocabulary), optimizer, mesh, shapes, seed=seed)
        order = np.random.default_rng(seed).permutation(steps)
        state, recent = training.initial_state(), []
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        with jax.set_mesh(mesh):
            compiled = training.train_step.lower(state, training.to_device(batch_of(data["train"], 0))).compile()
            began = time.perf_counter()
            for step in order:
                state, metrics = compiled(state, training.to_device(batch_of(data["train"], int(step))))
                recent.append(metrics)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
        tail = recent[-max(1, steps // 10) :]
        losses.append(sum(float(m["loss"]) for m in tail) / sum(float(m["weights"]) for m in tail))
        test = trainer.Evaluation("test", lambda: (batch_of(data["test"], i) for i in range(TEST_EXAMPLES // BATCH)))
        accuracies.append(training.evaluate(state, test)["accuracy"])
        print(f"{name} {system} seed {seed}: accuracy {accuracies[-1]:.3f}, {seconds[-1]:.0f} s", flush=True)
    return {
        "task": name,
        "length": length,
        "system": system,
        "parameters": parameters,
        "steps": steps,
        "accuracy": accuracies,
        "mean_accuracy": statistics.mean(accuracies),
        "last_training_loss": losses,
        "training_seconds": seconds,
    }


def table(rows: list[dict[str, Any]], chances: dict[str, float]) -> str:
    """The rows as Markdown, and what they show."""
    lines = [
        "| task | system | parameters | steps | accuracy, mean (range) | chance | training loss, last tenth | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = min(row["accuracy"]), max(row["accuracy"])
        lines.append(
            f"| {row['task']} | {row['system']} | {row['parameters']:,} | {row['steps']} | {row['mean_accuracy']:.3f} "
            f"({low:.3f}–{high:.3f}) | {chances[row['task']]:.3f} | {statistics.mean(row['last_training_loss']):.3f} | "
            f"{statistics.mean(row['training_seconds']):.0f} |"
        )
    notes = []
    for name, chance in chances.items():
        own = [row for row in rows if row["task"] == name]
        # Three standard deviations of a proportion over the test examples.
        noise = 3 * (chance * (1 - chance) / TEST_EXAMPLES) ** 0.5
        above = [row["system"] for row in own if min(row["accuracy"]) > chance + noise]
        verdict = (
            f"above chance by more than {noise:.3f} from every seed: {', '.join(above)}"
            if above
            else (
                f"nothing is above chance by more than {noise:.3f} from every seed: at this size there is no separation"
            )
        )
        notes.append(f"{name}: {verdict}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=None, help="of every run; each task has its own otherwise")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    rows, chances = [], {}
    for name in flags.tasks.split(","):
        length, _, _, steps = TASKS[name]
        steps = flags.steps or steps
        began = time.perf_counter()
        counts = {"train": steps * BATCH, "test": TEST_EXAMPLES}
        data = {split: examples(name, split, count, length) for split, count in counts.items()}
        made = sum(counts.values()) / (time.perf_counter() - began)
        print(f"{name}: {made:.0f} examples a second generated", flush=True)
        chances[name] = float(np.bincount(data["test"]["targets"]).max() / TEST_EXAMPLES)
        rows += [run(name, system, seeds, steps, data) for system in SYSTEMS]
    command = f"python -m benchmarks.long_range_arena --tasks={flags.tasks} --seeds={flags.seeds}"
    command += f" --steps={flags.steps}" if flags.steps else ""
    settings = {"width": WIDTH, "depth": DEPTH, "batch": BATCH, "test_examples": TEST_EXAMPLES, "seeds": seeds}
    figures = {"command": command, "machine": report.machine(), **settings, "chance": chances, "runs": rows}
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "long_range_arena.json").write_text(json.dumps(figures, indent=1) + "\n")
    machine = report.machine()
    about = f"`{command}` on {machine['cores']} cores ({machine['processor']}), jax {machine['jax']}."
    text = f"# Long Range Arena, shortened\n\n{about}\n\n{table(rows, chances)}"
    (flags.output / "long_range_arena.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
