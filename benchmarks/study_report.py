"""Table and plots of the study from its JSON files, of as many systems as there are; see `benchmarks.study`.

`python -m benchmarks.study_report` makes them anew from docs/results/study/.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
from typing import Any

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
# Perplexity on OpenWebText at 125M parameters and 50 billion tokens: Fu et al. 2023, "Hungry Hungry Hippos".
OPENWEBTEXT = {
    "h3-hybrid": 19.6,
    "gss-hybrid": 19.8,
    "transformer-full": 20.6,
    "h3": 21.0,
    "gss": 24.0,
    "s4d": 24.9,
}
DOMAINS = ("books", "code", "math")


def load(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of each system that is done, and what their steps cost (empty before that was measured)."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    measured = found.pop("costs", {"systems": {}})
    return found, measured["systems"]


def by_domain(figures: dict[str, Any], length: int) -> dict[str, float]:
    """Held-out bits per byte of each domain, in windows of `length`."""
    tasks = figures["evaluation"][str(length)]
    return {domain: tasks[f"embedded_{domain}"]["bits_per_byte"] for domain in DOMAINS}


def mean(figures: dict[str, Any], length: int) -> float:
    """Their mean over the domains."""
    return statistics.mean(by_domain(figures, length).values())


def by_position(figures: dict[str, Any], length: int) -> tuple[list[float], list[float]]:
    """(tokens before, bits per byte), a mean over the domains, in windows of `length`."""
    curves = [task["by_position"] for task in figures["evaluation"][str(length)].values()]
    return curves[0]["position"], [
        statistics.mean(values) for values in zip(*(c["bits_per_byte"] for c in curves), strict=True)
    ]


def train_length(systems: dict[str, Any]) -> int:
    return next(iter(systems.values()))["asked"]["settings"]["TASK_FEATURE_LENGTHS"]["targets"]


def common_loss(systems: dict[str, Any]) -> float:
    """The lowest training loss that every system reached, rounded up to hundredths of a bit."""
    return math.ceil(100 * max(min(loss for _, loss in found["curve"]) for found in systems.values())) / 100


def tokens_to(curve: list[list[float]], loss: float) -> int | None:
    """Tokens seen when the training loss was first at or below `loss`."""
    return next((tokens for tokens, value in curve if value <= loss), None)


def order_of_openwebtext(scores: dict[str, float]) -> tuple[int, list[str]]:
    """How the order of our scores compares with the paper's.

    Args:
      scores: bits per byte, of some of the paper's systems.

    Returns:
      (number of pairs, those ordered the other way here, as 'better here / better there').
    """
    pairs = list(itertools.combinations([name for name in OPENWEBTEXT if name in scores], 2))
    turned = [f"{worse} / {better}" for better, worse in pairs if scores[worse] < scores[better]]
    return len(pairs), turned


def table(systems: dict[str, Any], measured: dict[str, Any]) -> str:
    """The Markdown page, systems in the order of their mean bits per byte."""
    length = train_length(systems)
    longest = max(int(n) for found in systems.values() for n in found["evaluation"])
    loss = common_loss(systems)
    scores = {name: mean(found, length) for name, found in systems.items()}
    lines = [
        f"| system | layers | parameters | books | code | math | mean | mean at {longest // length}x | "
        f"tokens/s | times Transformer | MiB | tokens to {loss:.2f} | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(systems, key=scores.get):
        found, cost = systems[name], measured.get(name)
        tokens = tokens_to(found["curve"], loss)
        speed = cost and cost["tokens_per_second"]["median"]
        relative = cost and cost["times_baseline"]
        cells = [
            name,
            f"`{found['asked']['pattern']}`",
            f"{found['parameters']:,}",
            *(f"{value:.3f}" for value in by_domain(found, length).values()),
            f"**{scores[name]:.3f}**",
            f"{mean(found, longest):.3f}",
            f"{speed:,.0f}" if cost else "–",
            f"{relative['median']:.2f}" if relative else "–",
            f"{cost['total_MiB']:.0f}" if cost else "–",
            f"{tokens:,}",
            f"{tokens / speed:.0f}" if cost else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    settings = next(iter(systems.values()))["asked"]["settings"]
    sizes = [found["parameters"] for found in systems.values()]
    machine = next(iter(systems.values()))["machine"]
    dates = sorted({found["date"] for found in systems.values()})
    count, turned = order_of_openwebtext(scores)
    flags = (
        f"--width={settings['EMBED_DIM']} --length={length} --window={settings['WINDOW']} --batch={settings['BATCH_SIZE']} "
        f"--steps={settings['TRAIN_STEPS']} --learning_rate={settings['LEARNING_RATE']:g} --seed={settings['RANDOM_SEED']}"
    )
    notes = [
        "Held-out bits per byte (lower is better) of the three domains of the embedded corpus in windows of the training length,",
        f"{length} bytes, and in longer ones of running text. Parameters differ by {max(sizes) / min(sizes) - 1:.1%} at most;",
        f"every system saw the same {settings['TRAIN_STEPS'] * settings['BATCH_SIZE'] * length:,} bytes in the same order, once from one seed.",
    ]
    details = [
        f"- Command: `python -m benchmarks.study {flags}`, {' to '.join(sorted({dates[0], dates[-1]}))}, {machine['cores']} cores "
        f"({machine['processor']}), jax {machine['jax']}.",
        "- tokens/s: the median of train steps that took turns in one process, beside the Transformer's in the same turn. Seconds are",
        "  the tokens to a training loss at that speed: the lowest loss that all systems reached. MiB: parameters, optimizer state, batch",
        "  and temporaries of the train step, by the compiler.",
        f"- The H3 paper's OpenWebText perplexities order {count} pairs of these systems; {count - len(turned)} have the same order here"
        + (f". The other way round (better here / better there): {', '.join(turned)}." if turned else "."),
    ]
    plots = [f"![{title}](study_{name}.svg)" for name, (title, *_) in PLOTS.items() if series(name, systems, measured)]
    return "\n".join(["# All systems at equal size", "", *notes, "", *lines, "", *details, "", *plots, ""])


PLOTS = {
    "loss_by_tokens": ("Training loss against tokens", "tokens", "bits per byte, training"),
    "loss_by_time": ("Training loss against time", "seconds of train steps", "bits per byte, training"),
    "positions": ("Bits per byte by position", "bytes before, in the longest windows", "bits per byte, held out"),
    "lengths": ("Bits per byte by length", "length of windows over that of training", "bits per byte, held out"),
}


def series(name: str, systems: dict[str, Any], measured: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """(x, y) of every system in one plot; of those that have it."""
    length = train_length(systems)
    curves = {}
    for system, found in systems.items():
        tokens, losses = zip(*found["curve"], strict=True)
        lengths = sorted(int(n) for n in found["evaluation"])
        if name == "loss_by_tokens":
            curves[system] = (list(tokens), list(losses))
        elif name == "loss_by_time" and system in measured:
            speed = measured[system]["tokens_per_second"]["median"]
            curves[system] = ([t / speed for t in tokens], list(losses))
        elif name == "positions":
            curves[system] = by_position(found, lengths[-1])
        elif name == "lengths":
            curves[system] = ([n / length for n in lengths], [mean(found, n) for n in lengths])
    return curves


def plot(name: str, curves: dict[str, tuple[list[float], list[float]]], length: int, path: pathlib.Path) -> None:
    """Draws what `series` gave as SVG; `length` is that of training."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot

    title, x_label, y_label = PLOTS[name]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, (system, (x, y)) in enumerate(sorted(curves.items())):
        axes.plot(x, y, label=system, linewidth=1.2, linestyle=("-", "--")[number // 10], color=f"C{number % 10}")
    if name in ("positions", "lengths"):
        axes.set_xscale("log", base=2)
        if name == "positions":
            axes.axvline(length, color="black", linewidth=0.6)
    # What a system says of text far longer than it was trained on may be far above all others.
    values = sorted(min(y[len(y) // 2 :]) for _, y in curves.values())
    axes.set_ylim(values[0] - 0.15, values[len(values) // 2] + 1.5)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(output_dir: pathlib.Path) -> None:
    """Writes study.md and the plots from the files of study/."""
    systems, measured = load(output_dir / "study")
    (output_dir / "study.md").write_text(table(systems, measured))
    for name in PLOTS:
        if curves := series(name, systems, measured):
            plot(name, curves, train_length(systems), output_dir / f"study_{name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=pathlib.Path, default=RESULTS)
    write(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
