"""A whole train step on meshes of several axes, in a process with 8 virtual devices; see `train_step_programs`."""

import pathlib
import re
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("train_step_programs.py")


@pytest.mark.slow
def test_parameters_moments_and_metrics_are_those_of_one_device():
    done = subprocess.run([sys.executable, str(PROGRAMS)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^passed (.+)$", done.stdout, re.MULTILINE) == [
        "data 2 fsdp 2 model 2",
        "fsdp 2 sequence 2 model 2",
    ]
