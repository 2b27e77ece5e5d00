"""Training on GPUs of a SLURM cluster, one process a GPU.

    python -m launch.slurm --nodes=8 --gpus_per_node=8 --time=48:00:00 -- --gin_file=models/gss_352m.gin …

Submits a batch job from this folder, whose .venv all nodes must see. Two minutes before its time is over, and when it is
preempted, the job gets SIGTERM and saves; it is queued again after a preemption or the failure of a node, and the same
command goes on by hand after the end of its time. Each process writes <name>-<job>-<process>.txt.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from launch import engines


def main(argv: Sequence[str]) -> int:
    parser = engines.parser("python -m launch.slurm", __doc__)
    parser.add_argument("--nodes", type=engines.count, required=True)
    parser.add_argument("--gpus_per_node", type=engines.count, default=8)
    parser.add_argument("--cpus_per_gpu", type=engines.count, default=8)
    parser.add_argument("--time", type=engines.word, required=True, help="limit, as HH:MM:SS or D-HH:MM:SS")
    parser.add_argument("--partition", type=engines.word)
    parser.add_argument("--account", type=engines.word)
    options = parser.parse_args(argv)
    text = script(options)
    if options.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["sbatch"], input=text, text=True).returncode


def script(options) -> str:
    """The batch script."""
    directives = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_gpu,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": "TERM@120",
        "output": "%x-%j.txt",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    run = shlex.join(engines.command(options, ".venv/bin/python"))
    if options.engine == "t5x":  # It does not look for the other processes by itself.
        flags = (
            "--multiprocess_gpu --coordinator_address=$COORDINATOR "
            "--process_count=$SLURM_NTASKS --process_index=$SLURM_PROCID"
        )
        run = f"bash -c 'exec \"$@\" {flags}' bash {run}"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "#SBATCH --requeue",
            engines.LITERAL,
            "set -euo pipefail",
            'cd "$SLURM_SUBMIT_DIR"',
            'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            'COORDINATOR="${hosts[0]}:$((61000 + SLURM_JOB_ID % 4096))"',
            "export COORDINATOR",
            "# A process that fails takes the others with it: alone they could only wait.",
            f"srun --kill-on-bad-exit=1 --output=%x-%j-%t.txt {run}",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
