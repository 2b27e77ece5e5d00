"""What mixers send over the `model` axis, in a process with 8 virtual devices; see `model_axis_programs`."""

import pathlib
import re
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("model_axis_programs.py")


@pytest.mark.slow
def test_each_mixer_sends_over_the_model_axis_what_its_formulas_need():
    done = subprocess.run([sys.executable, str(PROGRAMS)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    mixers = re.findall(r'^    "([\w ]+)": \(', PROGRAMS.read_text(), re.MULTILINE)
    assert re.findall(r"^passed (.+)$", done.stdout, re.MULTILINE) == mixers and len(mixers) == 12
