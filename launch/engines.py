"""What the launchers share: the command that every process runs, and the options that choose it."""

import argparse
import re

MODULES = {"native": "t5x_ssm.train", "t5x": "t5x.train"}
# Stands at the head of the scripts, for those who check them with shellcheck.
LITERAL = "# shellcheck disable=SC2016  # Single quotes are meant: what is in them reaches each process as it is."


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options of every launcher; arguments of training follow after `--`."""
    made = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--engine", choices=sorted(MODULES), default="native", help="which program trains")
    made.add_argument("--dry_run", action="store_true", help="print what would be run, and run nothing")
    made.add_argument("--name", type=name, default="t5x-ssm", help="of the job: a-z, 0-9 and '-'")
    made.add_argument("arguments", nargs="+", help="after --: arguments of training")
    return made


def name(text: str) -> str:
    """`text`, if every scheduler accepts it as a name."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be of a-z, 0-9 and '-', begin with a letter and be under 41 long"
        )
    return text


def word(text: str) -> str:
    """`text`, if it can stand in a script's directives and in resource names as it is."""
    if not re.fullmatch(r"[\w./:@=+,-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must not have spaces or special characters")
    return text


def count(text: str) -> int:
    """`text` as a positive number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def command(options: argparse.Namespace, python: str) -> list[str]:
    """The command of a process, as a list of words."""
    return [python, "-m", MODULES[options.engine], *options.arguments]
