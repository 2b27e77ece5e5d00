"""Several processes of one training run on this machine, just as the hosts of a pod run it.

    python -m launch.local --processes=4 --devices_per_process=2 -- --gin_file=quickstart.gin --gin.MODEL_DIR=runs/first

Process 0 speaks as if it were alone; the lines of the others carry their number, or go to files (--log_dir). SIGTERM and
Ctrl-C are passed on: all processes save the same step and leave. When a process fails, the others are stopped.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO

POLL_SECONDS = 0.1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices_per_process", type=int, default=1, help="virtual CPU devices of each")
    parser.add_argument("--log_dir", type=pathlib.Path, help="folder for process_<i>.txt of processes 1 and up")
    parser.add_argument("--module", default="t5x_ssm.train", help="what to run")
    parser.add_argument(
        "--grace_seconds", type=float, default=10.0, help="time to say what happened after another process has failed"
    )
    parser.add_argument("arguments", nargs="*", help="after --: arguments of every process")
    options = parser.parse_args(argv)
    if options.processes < 1 or options.devices_per_process < 1:
        parser.error("--processes and --devices_per_process must be at least 1.")
    return Group(options).run()


class Group:
    """The processes of a run, from their start to the end of the last."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._command = [sys.executable, "-m", options.module, *options.arguments]
        self._processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []

    def run(self) -> int:
        """Starts all and waits for them.

        Returns:
          The worst exit status, 128 + the number of a signal that ended one; those that were stopped here do not count.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        if self._options.log_dir:
            self._options.log_dir.mkdir(parents=True, exist_ok=True)
        coordinator = f"localhost:{free_port()}"
        try:
            for index in range(self._options.processes):
                self._start(index, environment(self._options, coordinator, index))
            own = self._wait()
        finally:
            self._kill()
        for reader in self._readers:
            reader.join()
        return max(own)

    def _start(self, index: int, variables: dict[str, str]) -> None:
        if index == 0:
            self._processes.append(subprocess.Popen(self._command, env=variables))
        elif self._options.log_dir:
            with (self._options.log_dir / f"process_{index}.txt").open("wb") as file:
                self._processes.append(subprocess.Popen(self._command, env=variables, stdout=file, stderr=file))
        else:
            process = subprocess.Popen(self._command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self._processes.append(process)
            self._readers.append(threading.Thread(target=_prefix, args=(index, process.stdout), daemon=True))
            self._readers[-1].start()

    def _wait(self) -> list[int]:
        """Exit statuses of those that ended by themselves; returns when all have, or may wait no longer."""
        give_up = None
        while True:
            statuses = [process.poll() for process in self._processes]
            ended = [_status(status) for status in statuses if status is not None]
            if len(ended) == len(statuses):
                return ended
            if ended and max(ended) and give_up is None:
                self._report(statuses)
                give_up = time.monotonic() + self._options.grace_seconds
            if give_up is not None and time.monotonic() > give_up:
                return ended
            time.sleep(POLL_SECONDS)

    def _report(self, statuses: list[int | None]) -> None:
        for index, status in enumerate(statuses):
            if status:
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
                print(f"launch.local: process {index} {how}; stopping the others.", file=sys.stderr, flush=True)

    def _pass_on(self, number, frame):
        del number, frame
        for process in self._processes:
            # Of a Ctrl-C the terminal tells them as well; a SIGTERM beside it changes nothing.
            process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def environment(options: argparse.Namespace, coordinator: str, index: int) -> dict[str, str]:
    """Environment of process `index`."""
    devices = f"--xla_force_host_platform_device_count={options.devices_per_process}"
    return {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(index),
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _prefix(index: int, pipe: BinaryIO) -> None:
    for line in pipe:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
