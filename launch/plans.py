"""The plans of docs/scaling.md, and the table of them: `python -m launch.plans`.

    python -m launch.plans                  compile what is not yet planned (see PLANS), then write the table
    python -m launch.plans --only=gss_7b    those whose name begins so
    python -m launch.plans --table_only     from the plans that are there

Each plan is a process of its own and a JSON file in docs/plans: an interrupted run goes on where it was. The table holds what was
compiled and nothing else; a file whose configuration has changed since is not of this table and is removed by hand.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from t5x_ssm import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "plans"
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- plans: written by launch.plans -->\n", "<!-- end of plans -->\n"

# A file of gin/models and the topology that it is planned for; the largest that matter come first.
POD = "v5p:4x4x8"
PLANS = [
    *((name, POD) for name in ("gss_7b", "transformer_7b", "gss_hybrid_7b", "spade_lm_7b", "h3_2_7b", "h3_7b")),
    *((f"{system}_{size}", POD) for size in ("13b", "30b") for system in ("gss", "gss_hybrid")),
    ("spade_lm_13b", POD),
    *((f"{system}_{size}", POD) for size in ("1_3b", "2_7b") for system in ("gss", "gss_hybrid")),
    *((name, POD) for name in ("spade_lm_1_3b", "h3_1_3b", "transformer_1_3b")),
]


def table(plans: Sequence[dict]) -> str:
    """The plans as Markdown, in order of system and size."""
    head = (
        "| model | parameters | devices | batch | HBM used | free | TFLOP/step | times passes | collectives | bound by "
        "| step | MFU | compiled in |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for plan in plans:
        predicted, size = plan["predicted"], plan["bytes"]
        seconds, used = predicted["seconds"], predicted["utilisation"]
        sent = sum(c["bytes"] for c in plan["collectives"])
        slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
        rows.append(
            f"| {plan['name']} | {plan['parameters'] / 1e9:.2f}B | {slices}{plan['topology']} | {plan['batch']} x "
            f"{plan['length']} | {size['used'] / 2**30:.1f} of {size['hbm'] / 2**30:.0f} GiB | {plan['hbm_free']:.0%} "
            f"| {plan['flops']['program'] / 1e12:.0f} | {plan['flops']['program_times_passes'] / 1e12:.0f} "
            f"| {sent / 1e9:.0f} GB | {predicted['bound_by']} | {seconds['overlapped']:.1f} to {seconds['in_turn']:.1f} s "
            f"| {used['in_turn']:.0%} to {used['overlapped']:.0%} | {plan['compile_seconds']:.0f} s |\n"
        )
    return head + "".join(rows)


def write_table() -> None:
    """Puts the table of all plans in docs/plans into docs/scaling.md."""
    plans = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    plans.sort(key=lambda plan: (plan["name"].rstrip("0123456789_b"), plan["parameters"], plan["topology"]))
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n" + table(plans) + "\n" + END + after)


def main(argv: Sequence[str]) -> int:
    """Makes the missing plans and writes the table; the status is 1 when some do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PREFIX", help="plan only models whose name begins so")
    parser.add_argument("--table_only", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    failed = []
    for name, topology in PLANS:
        if options.table_only or not name.startswith(options.only):
            continue
        arguments = [f"--gin_file=models/{name}.gin", f"--topology={topology}", f"--output_dir={FOLDER}"]
        done = subprocess.run([sys.executable, "-m", "launch.compile", *arguments], cwd=ROOT)
        if done.returncode:
            failed.append(name)
        write_table()
    write_table()
    if failed:
        print(f"without a plan: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    config_lib.run_main(main)
