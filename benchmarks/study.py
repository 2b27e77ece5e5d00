"""All systems at equal parameters and equal tokens: `python -m benchmarks.study [--systems=gss,h3] [--steps=300]`.

Every system is a pattern in the frame of benchmarks/study.gin: the same width, depth, vocabulary, types, optimizer, batches and
order of them. The width of the feed-forward blocks (of GSS, whose gate is one, that of the gate) is chosen so that all have as
many parameters as the Transformer with feed-forward blocks of four times the width. Training and evaluation are the engine's own
commands, `t5x_ssm.train` and `t5x_ssm.eval`, on the embedded books, code and mathematics.

What a step costs is measured apart from training, in turns within one process (`costs`), so that whatever else the machine
does falls on all systems alike; seconds to a loss are tokens to that loss at that speed.

A system that is done has its JSON file in --output_dir/study and is not trained again with the same settings; one that was
interrupted goes on from its checkpoint in --work_dir. Writes docs/results/study.md and the plots beside it
(`benchmarks.study_report`) after every system.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, study_report, timing
from t5x_ssm import config as config_lib
from t5x_ssm import train as train_lib
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.errors import UserError
from t5x_ssm.models.objectives import cross_entropy
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.training import restoring
from t5x_ssm.training.metrics import history
from t5x_ssm.training.sharded_state import abstract_parameters
from t5x_ssm.training.trainer import Trainer

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
GIN_FILE = str(pathlib.Path(__file__).with_suffix(".gin"))
# Eight layers each. Attention in H3's hybrid: the paper's second layer, and the one half the depth above it.
PATTERNS = {
    "transformer-full": "full*8",
    "transformer-sliding": "swa*8",
    "transformer-chunked": "chunk*8",
    "dss": "dss*8",
    "s4d": "s4d*8",
    "s5": "s5*8",
    "gss": "gss*8",
    "gss-hybrid": "gss*3 chunk gss*3 chunk",
    "h3": "h3*8",
    "h3-hybrid": "h3 attn h3*3 attn h3*2",
    "spade": "spade swa*7",
}
BASELINE = "transformer-full"
# Feed-forward widths are multiples of this.
MULTIPLE = 8
# Lengths of evaluation, in training lengths.
TIMES_LONGER = (1, 2, 4, 8, 16)


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What all systems share, by the names of the gin macros."""
    return {
        "EMBED_DIM": flags.width,
        "WINDOW": flags.window,
        "TASK_FEATURE_LENGTHS": {"targets": flags.length},
        "BATCH_SIZE": flags.batch,
        "TRAIN_STEPS": flags.steps,
        "WARMUP_STEPS": flags.steps // 10,
        "LEARNING_RATE": flags.learning_rate,
        "RANDOM_SEED": flags.seed,
    }


def bindings(system: str, hidden: int, settings: dict[str, Any], model_dir: str) -> list[str]:
    """gin bindings of one run, NAME=VALUE."""
    named = {**settings, "PATTERN": PATTERNS[system], "MLP_DIM": hidden, "MODEL_DIR": model_dir}
    return [f"{name}={value}" for name, value in named.items()]


def configured(system: str, hidden: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the configuration of a run gives `t5x_ssm.train.train`."""
    config_lib.load([GIN_FILE], bindings(system, hidden, settings, "unused"))
    config_lib.check(train_lib.train)
    return gin.get_bindings(train_lib.train)


def count_parameters(system: str, hidden: int, settings: dict[str, Any]) -> int:
    """Parameters of a system whose feed-forward blocks have this width."""
    run = configured(system, hidden, settings)
    shapes = train_lib.batch_shapes(run["train_dataset_cfg"])
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(run["model"], shapes, mesh)))


def matched_width(system: str, target: int, settings: dict[str, Any]) -> int:
    """The feed-forward width that brings a system nearest to `target` parameters; their number is linear in it.

    Raises:
      UserError: without any feed-forward block the system already has more.
    """
    few, many = MULTIPLE, 2 * MULTIPLE
    least, more = (count_parameters(system, hidden, settings) for hidden in (few, many))
    width = few + (target - least) * (many - few) / (more - least)
    width = MULTIPLE * round(width / MULTIPLE)
    if width < MULTIPLE:
        raise UserError(f"{system} has {least:,} parameters at the least, not {target:,}: choose a larger --width.")
    return width


def matched_widths(systems: list[str], settings: dict[str, Any]) -> dict[str, int]:
    """Feed-forward widths of all systems, for the baseline's number of parameters."""
    own = 4 * settings["EMBED_DIM"]
    target = count_parameters(BASELINE, own, settings)
    return {name: own if name == BASELINE else matched_width(name, target, settings) for name in systems}


def train(system: str, hidden: int, settings: dict[str, Any], model_dir: pathlib.Path) -> dict[str, Any]:
    """One system through the engine's training command.

    Returns:
      curve: [[tokens seen, bits per byte of the steps since the last], …]; skipped_steps; wall_seconds of the command, starting
      and compiling included.
    """
    flags = [f"--gin.{binding}" for binding in bindings(system, hidden, settings, str(model_dir))]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "t5x_ssm.train", f"--gin_file={GIN_FILE}", *flags], check=True)
    seconds = time.perf_counter() - began
    lines = history(model_dir / "metrics.jsonl", split="train")
    return {
        "curve": [[int(line["tokens_total"]), round(line["bits_per_byte"], 5)] for line in lines],
        "skipped_steps": int(lines[-1]["skipped_total"]),
        "wall_seconds": round(seconds, 1),
    }


def evaluate(
    system: str, hidden: int, settings: dict[str, Any], model_dir: pathlib.Path, tokens: int
) -> dict[str, dict[str, Any]]:
    """Held-out bits per byte of a trained system, in windows of running text.

    Args:
      system, hidden, settings: as it was trained.
      model_dir: its run folder.
      tokens: of each domain: the same first ones at every length.

    Returns:
      {length: {task: {bits_per_byte, tokens, by_position: {position, bits_per_byte}}}}
    """
    run = configured(system, hidden, settings)
    model, cfg = run["model"], run["train_eval_dataset_cfg"]
    own = cfg.task_feature_lengths[feed_lib.TARGETS]
    mesh = make_mesh(MeshConfig())
    params = None

    @jax.jit
    def costs_by_position(params, batch):
        _, nats, _ = cross_entropy(model.logits(params, batch), batch["decoder_target_tokens"])
        weights = batch["decoder_loss_weights"].astype(nats.dtype)
        return jnp.sum(nats * weights, axis=0), jnp.sum(weights, axis=0)

    results: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        for length in (own * times for times in TIMES_LONGER):
            windows = dataclasses.replace(
                cfg,
                task_feature_lengths={feed_lib.TARGETS: length},
                batch_size=max(1, own * cfg.batch_size // length),
            )
            if params is None:
                shapes = train_lib.batch_shapes(windows)
                params = restoring.restore_parameters(str(model_dir), abstract_parameters(model, shapes, mesh)).params
            results[str(length)] = found = {}
            for task, feed in feed_lib.open_evaluation(windows).items():
                batches = min(len(feed), max(1, tokens // (windows.batch_size * length)))
                sums = [costs_by_position(params, batch) for batch in itertools.islice(feed, batches)]
                nats, weights = (np.sum([np.asarray(s[i], np.float64) for s in sums], axis=0) for i in (0, 1))
                bits_a_nat = feed.num_tokens(batches) / feed.num_bytes(batches) / math.log(2)
                found[task] = {
                    "bits_per_byte": float(nats.sum() / weights.sum() * bits_a_nat),
                    "tokens": int(weights.sum()),
                    "by_position": curve_of(nats * bits_a_nat, weights),
                }
    return results


def curve_of(costs: np.ndarray, weights: np.ndarray) -> dict[str, list[float]]:
    """Means over ranges of positions that double: {position: middles of the ranges, bits_per_byte}."""
    length = len(costs)
    edges = [0, *(2**i for i in range(3, length.bit_length()) if 2**i < length), length]
    curve: dict[str, list[float]] = {"position": [], "bits_per_byte": []}
    for low, high in itertools.pairwise(edges):
        if weight := weights[low:high].sum():
            curve["position"].append((low + high) / 2)
            curve["bits_per_byte"].append(float(costs[low:high].sum() / weight))
    return curve


def costs(widths: dict[str, int], settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Speed and memory of the train steps of several systems, compiled one after another and then run in turns.

    Returns:
      For each system tokens_per_second and times_baseline (of the same round; medians and ranges), and of the compiled
      program temporary_MiB and total_MiB, the latter with parameters, optimizer state and batch.
    """
    programs: dict[str, Any] = {}
    for system, hidden in widths.items():
        run = configured(system, hidden, settings)
        cfg = run["train_dataset_cfg"]
        feed = feed_lib.open_feed(cfg)
        training = Trainer(run["model"], run["optimizer"], make_mesh(MeshConfig()), train_lib.batch_shapes(cfg))
        state, batch = training.initial_state(), training.to_device(feed.next())
        feed.close()
        with jax.set_mesh(training.mesh):
            # Whole in this process, before the next configuration replaces this one.
            compiled = training.train_step.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        found = {
            "temporary_MiB": memory.temp_size_in_bytes / 2**20,
            "total_MiB": (total - memory.alias_size_in_bytes) / 2**20,
        }
        state, _ = jax.block_until_ready(compiled(state, batch))
        programs[system] = [compiled, state, batch, found]
        print(f"compiled {system}: {found['temporary_MiB']:.0f} MiB of temporaries", flush=True)
    tokens = settings["BATCH_SIZE"] * settings["TASK_FEATURE_LENGTHS"]["targets"]
    speeds: dict[str, list[float]] = {system: [] for system in programs}
    for _ in range(rounds):
        for system, program in programs.items():
            compiled, state, batch, _ = program
            began = time.perf_counter()
            program[1], _ = jax.block_until_ready(compiled(state, batch))
            speeds[system].append(tokens / (time.perf_counter() - began))
    base = speeds.get(BASELINE)
    return {
        system: {
            "tokens_per_second": report.spread(values),
            "times_baseline": timing.ratios(values, base) if base else None,
            **programs[system][3],
        }
        for system, values in speeds.items()
    }


def keep(path: pathlib.Path, figures: dict[str, Any]) -> None:
    """Writes whole files only, so that what exists is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    partial.rename(path)


def done(path: pathlib.Path, asked: dict[str, Any]) -> bool:
    """Whether a file answers this question."""
    return path.exists() and json.loads(path.read_text())["asked"] == asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(PATTERNS))
    parser.add_argument(
        "--width", type=int, default=48, help="of the residual stream; a multiple of 3 heads of even width"
    )
    parser.add_argument("--length", type=int, default=128, help="of training")
    parser.add_argument("--window", type=int, default=16, help="of sliding and chunked attention")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval_tokens", type=int, default=16384, help="of each held-out domain, at every length")
    parser.add_argument("--rounds", type=int, default=9, help="of timed steps; 0 leaves speed and memory out")
    parser.add_argument("--work_dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "t5x_ssm_study")
    parser.add_argument("--output_dir", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args()
    systems = flags.systems.split(",")
    if unknown := sorted(set(systems) - set(PATTERNS)):
        parser.error(f"--systems: {', '.join(unknown)}; there are {', '.join(PATTERNS)}")
    train_lib.use_compilation_cache()
    settings = settings_of(flags)
    widths = matched_widths(systems, settings)
    folder = flags.output_dir / "study"
    for system, hidden in widths.items():
        asked = {
            "settings": settings,
            "pattern": PATTERNS[system],
            "hidden": hidden,
            "eval_tokens": flags.eval_tokens,
        }
        path = folder / f"{system}.json"
        if not done(path, asked):
            model_dir = flags.work_dir / system
            figures = train(system, hidden, settings, model_dir)
            figures["evaluation"] = evaluate(system, hidden, settings, model_dir, flags.eval_tokens)
            about = {
                "system": system,
                "parameters": count_parameters(system, hidden, settings),
                "date": time.strftime("%Y-%m-%d"),
                "machine": report.machine(),
            }
            keep(path, {"asked": asked, **about, **figures})
        study_report.write(flags.output_dir)
    asked = {"settings": settings, "widths": widths, "rounds": flags.rounds}
    if flags.rounds and not done(folder / "costs.json", asked):
        figures = costs(widths, settings, flags.rounds)
        keep(folder / "costs.json", {"asked": asked, "machine": report.machine(), "systems": figures})
        study_report.write(flags.output_dir)
    print((flags.output_dir / "study.md").read_text())


if __name__ == "__main__":
    main()
