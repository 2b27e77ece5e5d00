import subprocess
import sys
import time

from t5x_ssm.training.watchdog import STATUS, Watchdog


def test_a_run_that_stands_still_is_ended_with_its_stacks():
    program = """
import time
from t5x_ssm.training.watchdog import Watchdog
def stuck_in_a_collective():
    time.sleep(60)
with Watchdog(1.0, "TrainerConfig.stall_seconds") as watchdog:
    for _ in range(15):
        time.sleep(0.1)
        watchdog.beat()
    print("beaten", flush=True)
    stuck_in_a_collective()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == STATUS != 0
    assert time.monotonic() - began < 50
    assert done.stdout == "beaten\n"
    assert "No step has finished for 1 s (TrainerConfig.stall_seconds)" in done.stderr
    assert "in stuck_in_a_collective" in done.stderr


def test_none_never_ends_a_process_and_leaving_ends_the_watch():
    with Watchdog(None, ""):
        time.sleep(0.05)
    with Watchdog(0.1, ""):
        pass
    time.sleep(0.3)
