"""Mixers over a length that is cut over devices, in processes with 8 virtual devices; see `sequence_programs`."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("sequence_programs.py")

# Two groups, so that two workers share them.
QUICK = ("gss", "swa")
BOTH_WAYS = ("s4 both ways", "s4d both ways", "dss both ways", "s5 both ways")
REST = ("h3", "h3 heads", "s4", "s4d", "dss", "s5", "s5op", "both ways", "chunk", "even chunk", "attn")


def run(check, names, **environment):
    command = [sys.executable, str(PROGRAMS), check, *names]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^passed (.+)$", done.stdout, re.MULTILINE) == list(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", [QUICK, REST], ids=["quick", "rest"])
def test_values_and_gradients_are_those_of_one_device(names):
    run("values_and_gradients", names)


@pytest.mark.slow
def test_state_spaces_that_hear_the_future_are_those_of_one_device():
    run("values_and_gradients", BOTH_WAYS, JAX_ENABLE_X64="1")


@pytest.mark.slow
@pytest.mark.parametrize("names", [QUICK, (*REST, "s4d both ways")], ids=["quick", "rest"])
def test_communication_does_not_grow_with_the_length(names):
    run("communication_does_not_grow_with_the_length", names)


@pytest.mark.slow
def test_a_state_comes_in_and_goes_out():
    run("a_state_comes_in_and_goes_out", ("gss", "h3", "s4", "s5"))


@pytest.mark.slow
def test_mistakes_name_their_settings():
    run("mistakes_name_their_settings", ("all",))
