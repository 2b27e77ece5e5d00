"""Cores on the shards of 8 virtual devices, in a process of their own because JAX fixes its devices at the start."""

import pathlib
import re
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("shard_programs.py")


@pytest.mark.slow
def test_shard_programs():
    done = subprocess.run([sys.executable, str(PROGRAMS)], capture_output=True, text=True, timeout=300)
    passed = re.findall(r"^passed (\w+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert passed == re.findall(r"^def (check_\w+)", PROGRAMS.read_text(), re.MULTILINE)
