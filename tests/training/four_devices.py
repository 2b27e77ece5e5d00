"""Running a program of a test with four CPU devices, which a process must be given before it starts."""

import os
import pathlib
import subprocess
import sys
import textwrap

TESTS = pathlib.Path(__file__).resolve().parent.parent


def printed(program: str, *xla_flags: str) -> str:
    """What the program prints; AssertionError, with its errors, if it fails. It may import the modules of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(["--xla_force_host_platform_device_count=4", *xla_flags]),
            "PYTHONPATH": os.pathsep.join(map(str, [TESTS / "training", TESTS, TESTS.parent])),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
