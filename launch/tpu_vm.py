"""Training on a pod slice of Cloud TPU virtual machines, through gcloud.

    python -m launch.tpu_vm --name=gss --zone=us-east5-a --type=v5p-256 --spot -- --gin_file=models/gss_352m.gin …

Makes the slice, or takes the one of that name; copies what is committed here to all workers, sets it up and trains on all of them. The
output of worker 0 is shown here; each worker keeps its own in ~/train.log. When the slice has been preempted it is made
anew and training goes on from the newest checkpoint, so MODEL_DIR must be a folder that outlives it and that all workers
see. The slice is not deleted at the end.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from launch import engines

VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
FOLDER = "t5x_ssm"
ARCHIVE = "t5x_ssm.tar.gz"
WORKER = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"


def main(argv: Sequence[str]) -> int:
    parser = engines.parser("python -m launch.tpu_vm", __doc__)
    parser.add_argument("--zone", type=engines.word, required=True)
    parser.add_argument("--type", type=engines.word, required=True, help="such as v5p-256")
    parser.add_argument("--version", type=engines.word, help="the machines' software; known for " + ", ".join(VERSIONS))
    parser.add_argument("--project", type=engines.word, help="gcloud's own default otherwise")
    parser.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    parser.add_argument("--retries", type=int, default=100, help="how often a slice that was taken away is made anew")
    options = parser.parse_args(argv)
    if options.version is None and options.type.split("-")[0] not in VERSIONS:
        parser.error(f"--version must be given for --type={options.type}.")
    text = script(options)
    if options.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["bash", "-c", text]).returncode


def script(options) -> str:
    """The bash script that does all of it."""
    place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    version = options.version or VERSIONS[options.type.split("-")[0]]

    def line(*words: str) -> str:
        return shlex.join([*tpu, *words, *place])

    def ssh(remote: str) -> str:
        return line("ssh", options.name, "--worker=all", f"--command={remote}")

    create = line(
        "create",
        options.name,
        f"--accelerator-type={options.type}",
        f"--version={version}",
        *(["--spot"] if options.spot else []),
    )
    return f"""#!/usr/bin/env bash
{engines.LITERAL}
set -uo pipefail

trap 'rm -f {ARCHIVE}' EXIT
git archive --format=tar.gz --output={ARCHIVE} HEAD || exit
state() {{ {line("describe", options.name, "--format=value(state)")} 2>/dev/null || echo NONE; }}

for attempt in $(seq 0 {options.retries}); do
  case "$(state)" in
    READY) ;;
    NONE) {create} || exit ;;
    *)  # Preempted or terminated: such a slice only keeps its name from being used.
      {line("delete", options.name, "--quiet")}
      {create} || exit ;;
  esac
  {line("scp", "--worker=all", ARCHIVE, f"{options.name}:")} &&
    {ssh(f"mkdir -p {FOLDER} && tar -xzf {ARCHIVE} -C {FOLDER} && cd {FOLDER} && bash launch/setup.sh tpu")} &&
    {ssh(remote_command(options))} && exit 0
  status=$?
  # A slice that is still there did not cause the failure, and would meet it again.
  if [ "$(state)" = READY ]; then exit "$status"; fi
  echo "launch.tpu_vm: the slice is gone; making it anew (attempt $((attempt + 1)))." >&2
done
exit 1
"""


def remote_command(options) -> str:
    """What a worker runs. Only worker 0 shows its output; exec lets a signal reach training itself."""
    run = shlex.join(engines.command(options, ".venv/bin/python"))
    return (
        f"cd {FOLDER} || exit 1\n"
        f"worker=$(curl -s -H 'Metadata-Flavor: Google' {WORKER})\n"
        'if [ "$worker" = 0 ]; then exec > >(tee -a ~/train.log) 2>&1; else exec >> ~/train.log 2>&1; fi\n'
        f"exec {run}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
