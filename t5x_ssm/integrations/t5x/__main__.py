"""Starts T5X's programs with the project's networks, on one host or on every host of a pod.

    python -m t5x_ssm.integrations.t5x train --gin_file=t5x/models/gss_192m.gin --gin_file=t5x/pretrain.gin --gin.MODEL_DIR=\\"…\\" …
    python -m t5x_ssm.integrations.t5x eval|infer …

What `python -m t5x.train|eval|infer` does not do by itself is done first: the processes of a pod are joined (the flags
and variables are those of `parallel.processes`), and the project's gin files are found from any folder. All other
arguments are T5X's own.
"""

import argparse
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import processes

PACKAGE = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ("train", "eval", "infer")


def gin_folder() -> pathlib.Path:
    """Where the project's gin files are: inside the package in a wheel, beside it in a clone."""
    inside = PACKAGE / "gin"
    return inside if inside.is_dir() else PACKAGE.parent / "gin"


def start(argv: Sequence[str]) -> None:
    """Joins the run's processes and hands over to T5X, which ends the process itself."""
    parser = argparse.ArgumentParser(
        prog="python -m t5x_ssm.integrations.t5x", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("program", choices=PROGRAMS, help="the program of T5X to start")
    parser.add_argument("--gin_search_paths", default=".", metavar="A,B", help="folders to look for gin files in first")
    processes.add_flags(parser)
    options, rest = parser.parse_known_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    processes.join(options)
    # As a module of that name, because T5X's gin files import `__main__`.
    sys.argv = [f"t5x.{options.program}", f"--gin_search_paths={options.gin_search_paths},{gin_folder()}", *rest]
    runpy.run_module(f"t5x.{options.program}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    try:
        start(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
