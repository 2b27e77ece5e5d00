import os
import signal
import subprocess
import sys

import pytest

from t5x_ssm.training.preemption import StopRequest


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_is_noted_for_the_loop(number):
    with StopRequest() as stop:
        stop.hold()
        stop.hold()
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.signal_name == number.name


def test_sigterm_may_come_twice():
    with StopRequest() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_the_first_step_acts_as_ever():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_before_the_first_step_ends_the_process_though_python_does_not_run():
    # Like a compiler, this call lets other threads run and comes back to Python only when it is done.
    program = """
import ctypes, os, signal
from t5x_ssm.training.preemption import StopRequest
sleep = ctypes.CDLL(None).sleep
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        sleep(3600)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stderr.startswith("SIGTERM: stopped before this start took a step")
