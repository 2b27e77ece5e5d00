"""Joining the processes of one run: one a host on TPU pods, one a GPU under SLURM, any number on one machine.

Every process runs the same command. Which of them it is comes, in this order, from flags, from the environment, or from
the platform that started it:

| flag              | environment               | meaning                                    |
|-------------------|---------------------------|--------------------------------------------|
| `--coordinator`   | `JAX_COORDINATOR_ADDRESS` | HOST:PORT of process 0, free on that host  |
| `--num_processes` | `JAX_NUM_PROCESSES`       | processes of the run; 1 joins nothing      |
| `--process_id`    | `JAX_PROCESS_ID`          | this one, from 0                           |

Without any of them JAX is asked where a pod of TPUs or a SLURM step shows itself, and elsewhere there is one process.
"""

import argparse
import dataclasses
import glob
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import jax

from t5x_ssm.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of a run this is.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: this one, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator`, `--num_processes` and `--process_id`."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 of a run of several processes")
    parser.add_argument("--num_processes", type=int, metavar="N", help="processes of the run")
    parser.add_argument("--process_id", type=int, metavar="I", help="this process, from 0")


def place(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Place | None:
    """What flags and environment say about this process; None when they name no run of several processes.

    Raises:
      UserError: they say it in part, or what cannot be; names the flag.
    """
    given = {
        "--coordinator": options.coordinator or environment.get(COORDINATOR),
        "--num_processes": _number("--num_processes", options.num_processes, environment.get(NUM_PROCESSES)),
        "--process_id": _number("--process_id", options.process_id, environment.get(PROCESS_ID)),
    }
    count, index = given["--num_processes"], given["--process_id"]
    if count == 1:
        return None
    # A coordinator alone, or nothing, leaves the rest to the platform.
    if count is None and index is None:
        return None
    missing = [flag for flag, value in given.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given as well, for every process of the run.")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"--process_id={index} of --num_processes={count}: ids are 0 to --num_processes - 1.")
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={given['--coordinator']} must be HOST:PORT, the address of process 0.")
    return Place(given["--coordinator"], count, index)


def _number(flag: str, given: int | None, variable: str | None) -> int | None:
    if given is not None or variable is None:
        return given
    if not variable.isdigit():
        raise UserError(f"{flag} is {variable!r} in the environment; it must be a number.")
    return int(variable)


def join(options: argparse.Namespace) -> None:
    """Connects this process with the others of its run, if there are any. Call it before anything touches a device.

    Returns when all of them are there.

    Raises:
      UserError: as in `place`, or the others cannot be reached.
    """
    here = place(options)
    alone = here is None and (_says_one(options) or not _platform_has_several())
    if alone or jax.distributed.is_initialized():
        return
    # JAX's own service would take SIGTERM for itself; `training.preemption` answers it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if here is None:
            jax.distributed.initialize(coordinator_address=options.coordinator)
        else:
            jax.distributed.initialize(
                here.coordinator, here.num_processes, here.process_id, cluster_detection_method="deactivate"
            )
    except (RuntimeError, ValueError) as e:
        where = f"the coordinator at {here.coordinator}" if here else "the processes of this run"
        raise UserError(
            f"Cannot join {where}: {e}. Start all of them with the same --coordinator, or --num_processes=1 to train alone."
        ) from e


def _says_one(options: argparse.Namespace) -> bool:
    return 1 in (options.num_processes, _number("--num_processes", None, os.environ.get(NUM_PROCESSES)))


def _platform_has_several() -> bool:
    """Whether JAX can find the other processes by itself."""
    if (
        int(os.environ.get("SLURM_NTASKS", 1)) > 1
        and "SLURM_PROCID" in os.environ
        and "SLURM_STEP_NODELIST" in os.environ
    ):
        return True
    if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def leave(status: int) -> NoReturn:
    """Ends this process.

    After a failure in a run of several processes it ends at once: exit functions would wait for the others, which wait
    in a collective that this process will not join, or are gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status and jax.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)
