"""Training on TPU slices of a GKE cluster, as a JobSet: one job a slice, one pod a host.

    python -m launch.gke --image=IMAGE --topology=v5p:4x4x8 --slices=2 --bucket=BUCKET -- \\
        --gin_file=models/gss_7b.gin --gin.MODEL_DIR=/bucket/run …

The bucket is mounted at /bucket, so that MODEL_DIR is a folder there. The image has the project in its working folder, set up
by launch/setup.sh. A pod that is preempted or fails restarts all of them together, and they go on from the newest
checkpoint. The manifest is JSON, which is YAML; `--dry_run` prints it, otherwise kubectl gets it.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch import engines

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
CHIPS_PER_HOST = 4


def main(argv: Sequence[str]) -> int:
    parser = engines.parser("python -m launch.gke", __doc__)
    parser.add_argument("--image", type=engines.word, required=True)
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x8")
    parser.add_argument("--slices", type=engines.count, default=1)
    parser.add_argument("--bucket", type=engines.word, help="Cloud Storage bucket to mount at /bucket")
    parser.add_argument("--service_account", type=engines.word, default="default", help="with access to the bucket")
    parser.add_argument("--retries", type=int, default=100, help="restarts before the JobSet fails")
    parser.add_argument("--grace_seconds", type=engines.count, default=120, help="between SIGTERM and the end of a pod")
    options = parser.parse_args(argv)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", options.topology)
    if not match or match[1] not in ACCELERATORS:
        parser.error(f"--topology={options.topology}: write CHIP:SHAPE with a chip of {', '.join(ACCELERATORS)}.")
    chips = math.prod(map(int, match[2].split("x")))
    if chips % CHIPS_PER_HOST:
        parser.error(f"--topology={options.topology} has {chips} chips, no multiple of the {CHIPS_PER_HOST} of a host.")
    text = json.dumps(manifest(options, ACCELERATORS[match[1]], match[2], chips // CHIPS_PER_HOST), indent=2) + "\n"
    if options.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "--filename=-"], input=text, text=True).returncode


def manifest(options, accelerator: str, topology: str, hosts: int) -> dict[str, Any]:
    """The JobSet."""
    container = {
        "name": "train",
        "image": options.image,
        # Kubernetes replaces $(NAME) in these words, and $$ by $.
        "command": [part.replace("$", "$$") for part in engines.command(options, ".venv/bin/python")],
        "resources": {"limits": {"google.com/tpu": CHIPS_PER_HOST}},
        "securityContext": {"privileged": True},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "serviceAccountName": options.service_account,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if options.bucket:
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "bucket", "mountPath": "/bucket"}]
        attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs"}
        pod["volumes"] = [
            {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        ]
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": template}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": options.retries},
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
