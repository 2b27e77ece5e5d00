"""The plans of docs/scaling.md, and the tables of them: `python -m launch.plans`.

    python -m launch.plans                          compile what is not yet planned (see PLANS), then write the tables
    python -m launch.plans --only=gss_7b            those whose name begins so
    python -m launch.plans --weak_scaling=gss_7b    this model at 8,192 tokens a chip, over ever more chips
    python -m launch.plans --table_only             from the plans that are there

Each plan is a process of its own and a JSON file in docs/plans: an interrupted run goes on where it was, and a plan whose program
the code has changed is made anew. The tables hold what was compiled and nothing else; a file whose configuration has changed since
is not of this table and is removed by hand.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from t5x_ssm import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "plans"
WEAK_FOLDER = FOLDER / "weak_scaling"
DOCUMENT = ROOT / "docs" / "scaling.md"


@dataclasses.dataclass(frozen=True)
class Question:
    """What to compile: a file of gin/models, for which slices, and bindings of macros beside it."""

    name: str
    topology: str
    slices: int = 1
    bindings: tuple[str, ...] = ()


# Of each size the quickest to compile come first.
POD = "v5p:4x4x8"
PLANS = [
    *(Question(f"{name}_1_3b", POD) for name in ("gss", "h3", "transformer", "gss_hybrid", "spade_lm")),
    *(Question(f"{name}_2_7b", POD) for name in ("gss", "h3", "gss_hybrid")),
    Question("spade_base", POD),
    Question("spade_large", POD),
    *(Question(f"{name}_7b", POD) for name in ("gss", "transformer", "gss_hybrid", "h3", "spade_lm")),
    # Other generations; a v5e holds 16 GiB, so there are more of them.
    *(Question("gss_7b", topology) for topology in ("v4:4x4x8", "v5e:16x16", "v6e:8x16")),
    Question("spade_3b", POD),
    *(Question(f"{name}_13b", POD) for name in ("gss", "gss_hybrid", "spade_lm")),
    Question("spade_11b", POD),
    *(Question(f"{name}_30b", POD) for name in ("gss", "gss_hybrid")),
    Question("gss_hybrid_1_3b_1m", "v5p:4x4x4"),
]

WEAK_TOPOLOGIES = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
WEAK_ROWS = 2  # of 4,096 tokens on each chip
# Of the peak: what is predicted below it is explained.
HALF = 0.5


def weak_scaling(name: str) -> list[Question]:
    """The same work on every chip of ever larger slices, and of two and four."""
    shapes = [*((shape, 1) for shape in WEAK_TOPOLOGIES), ("4x4x4", 2), ("4x4x4", 4)]
    questions = []
    for shape, slices in shapes:
        devices = slices * math.prod(map(int, shape.split("x")))
        bindings = (f"BATCH_SIZE={WEAK_ROWS * devices}", f"mesh.MeshConfig.data={slices}")
        questions.append(Question(name, f"v5p:{shape}", slices, bindings))
    return questions


def table(plans: Sequence[dict]) -> str:
    """The plans as Markdown, in order of system and size."""
    head = (
        "| model | parameters | devices | batch | HBM used | free | TFLOP/step | times passes | collectives | bound by "
        "| step | MFU | compiled in |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for plan in sorted(plans, key=_order):
        predicted, size = plan["predicted"], plan["bytes"]
        seconds, used = predicted["seconds"], predicted["utilisation"]
        rows.append(
            f"| {_name(plan)} | {plan['parameters'] / 1e9:.2f}B | {_slices(plan)} | {plan['batch']} x "
            f"{plan['length']} | {size['used'] / 2**30:.1f} of {size['hbm'] / 2**30:.0f} GiB | {plan['hbm_free']:.0%} "
            f"| {plan['flops']['program'] / 1e12:.0f} | {plan['flops']['program_times_passes'] / 1e12:.0f} "
            f"| {_sent(plan) / 1e9:.0f} GB | {predicted['bound_by']} | {seconds['overlapped']:.1f} to {seconds['in_turn']:.1f} s "
            f"| {used['in_turn']:.0%} to {used['overlapped']:.0%} | {_compiled_in(plan)} |\n"
        )
    return head + "".join(rows)


def bounds_table(plans: Sequence[dict]) -> str:
    """Of plans under half of the peak where nothing overlaps: where the seconds of a step go, as Markdown; '' for none.

    The model's own arithmetic is what utilisation counts. What else is computed is that of rematerialization, of state spaces
    between their projections, and of passes of the matrix unit beyond one.
    """
    parts = {"hbm": "memory traffic", "interconnect": "interconnect", "network": "network"}
    rows = []
    for plan in sorted(plans, key=_order):
        seconds, used = plan["predicted"]["seconds"], plan["predicted"]["utilisation"]
        if used["in_turn"] >= HALF:
            continue
        own = used["in_turn"] * seconds["in_turn"]
        beside = {
            "more arithmetic": seconds["compute"] - own,
            **{text: seconds.get(key, 0.0) for key, text in parts.items()},
        }
        most = max(beside, key=beside.get)
        if used["overlapped"] < HALF:
            most += ", however well it overlaps"
        columns = [_name(plan), _slices(plan), f"{used['in_turn']:.0%} to {used['overlapped']:.0%}"]
        columns += [f"{value:.2f} s" for value in (own, *beside.values())]
        rows.append(f"| {' | '.join([*columns, most])} |\n")
    if not rows:
        return ""
    head = ["model", "devices", "MFU", "the model's arithmetic", "more arithmetic", *parts.values(), "most of the rest"]
    return f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n" + "".join(rows)


def weak_table(plans: Sequence[dict]) -> str:
    """Plans of weak scaling as Markdown, by model and number of chips."""
    head = (
        "| model | devices | chips | tokens a chip | TFLOP a chip | collectives a chip | of them all-reduce "
        "| HBM used | compiled in |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        f"| {plan['name']} | {_slices(plan)} | {plan['devices']} | {plan['batch'] * plan['length'] // plan['devices']} "
        f"| {plan['flops']['program'] / 1e12:.1f} | {_sent(plan) / 1e9:.2f} GB | {_sent(plan, 'all-reduce') / 1e9:.2f} GB "
        f"| {plan['bytes']['used'] / 2**30:.1f} GiB | {_compiled_in(plan)} |\n"
        for plan in sorted(plans, key=lambda plan: (plan["name"], plan["devices"], plan["slices"]))
    ]
    return head + "".join(rows)


def _name(plan: dict) -> str:
    """Plans that do not say of which program they are may be of an earlier one."""
    return plan["name"] if "program" in plan else f"{plan['name']} †"


def _order(plan: dict) -> tuple:
    return plan["name"].rstrip("0123456789_bm"), plan["parameters"], plan["topology"]


def _slices(plan: dict) -> str:
    return f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]


def _sent(plan: dict, kind: str | None = None) -> float:
    """Bytes of one device's collectives in a step."""
    return sum(c["bytes"] for c in plan["collectives"] if kind in (None, c["kind"]))


def _compiled_in(plan: dict) -> str:
    return f"{plan['compile_seconds']:.0f} s"


# What is written into the document: the name of a pair of comments, the plans, and how they become text.
TABLES = (("plans", FOLDER, table), ("bounds", FOLDER, bounds_table), ("weak scaling", WEAK_FOLDER, weak_table))


def write_tables(document: pathlib.Path = DOCUMENT) -> None:
    """Puts the tables of all plans that are there between their comments in docs/scaling.md."""
    text = document.read_text()
    for name, folder, make in TABLES:
        plans = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        begin, end = f"<!-- {name}: written by launch.plans -->\n", f"<!-- end of {name} -->\n"
        before, after = text.split(begin)[0], text.split(end)[1]
        made = make(plans) if plans else ""
        text = before + begin + (f"\n{made}\n" if made else "") + end + after
    document.write_text(text)


def main(argv: Sequence[str]) -> int:
    """Makes the missing plans and writes the tables; the status is 1 when some do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PREFIX", help="plan only models whose name begins so")
    parser.add_argument("--weak_scaling", metavar="MODEL", help="plan this model at a fixed number of tokens a chip")
    parser.add_argument("--table_only", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    questions, folder = PLANS, FOLDER
    if options.weak_scaling:
        questions, folder = weak_scaling(options.weak_scaling), WEAK_FOLDER
    failed = []
    for question in questions:
        if options.table_only or not question.name.startswith(options.only):
            continue
        command = [sys.executable, "-m", "launch.compile", f"--gin_file=models/{question.name}.gin"]
        command += [f"--topology={question.topology}", f"--slices={question.slices}", f"--output_dir={folder}"]
        command += [f"--gin.{binding}" for binding in question.bindings]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(f"{question.name} on {question.slices} x {question.topology}")
        write_tables()
    write_tables()
    if failed:
        print(f"without a plan: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    config_lib.run_main(main)
