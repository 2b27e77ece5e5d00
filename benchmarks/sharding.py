"""What a mesh adds to the work of a layer, and processes to the time of a step: `python -m benchmarks.sharding [--only=work]`.

Work, by the compiler: forward and backward of every mixer on 8 virtual CPU devices. FLOPs of matrix products and bytes moved of one
device are divided by an eighth of those of the unsharded layer: 1 is a perfect split, and what is beyond is done more than once. The
bytes that a device sends stand beside it. Work and not time, because the devices share one machine's cores.

Time: the training command with eight devices in one process and in two processes of four, which take turns; the ratio of their
steps' times is what Gloo and the processes cost here. Writes benchmarks/results/sharding.json.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report, timing
from launch.costs import of_program
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.parallel import rules
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh

DEVICES = 8
BATCH, LENGTH, WIDTH = 8, 2048, 256
MIXERS = {
    "gss": GSS,
    "dss": DSS,
    "s4d": S4D,
    "s4": S4,
    "s5": functools.partial(S5, state_size=WIDTH),
    "h3": H3,
    "sliding attention": functools.partial(Attention, span="sliding", window=256),
    "full attention": functools.partial(Attention, rotary=True),
}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "model 8": MeshConfig(data=1, model=8),
    "sequence 8": MeshConfig(data=1, sequence=8),
    "data 2, fsdp 2, model 2": MeshConfig(data=2, fsdp=2, model=2),
}
RUN = {
    "TASK_FEATURE_LENGTHS": {"targets": 512},
    "BATCH_SIZE": 8,
    "WARMUP_STEPS": 1,
    "EVAL_PERIOD": 0,
    "EVAL_STEPS": 1,
    "decoder.Decoder.embed_dim": 128,
    "trainer.TrainerConfig.log_period": 1,
    "trainer.TrainerConfig.tensorboard": False,
}
# Of a run; those before are compiling and warming up.
COUNTED_STEPS, FIRST_STEPS = 10, 3


def work(layer, mesh) -> dict[str, float]:
    """FLOPs of products, bytes moved and bytes sent of one device in values and gradients of a layer; mesh None is one device."""
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    variables = jax.eval_shape(functools.partial(layer.init, enable_dropout=False), jax.random.key(0), x)
    params = variables["params"]

    def loss(params, x):
        return jnp.sum(jnp.square(layer.apply({"params": params}, x, enable_dropout=False)))

    def placed(shapes, shardings):
        return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)

    gradient = jax.grad(loss, argnums=(0, 1))
    if mesh is None:
        text, axes = jax.jit(gradient).lower(params, x).compile().as_text(), {"data": 1}
    else:
        with jax.set_mesh(mesh):
            params = placed(params, rules.parameter_shardings(params, variables["params_axes"], mesh))
            x = placed(x, rules.batch_sharding(mesh, 3))
            text, axes = jax.jit(gradient).lower(params, x).compile().as_text(), mesh.shape
    costs = of_program(text, axes)
    sent = sum(collective.bytes for collective in costs.collectives)
    return {"flops": costs.flops, "bytes": costs.hbm_bytes, "sent_bytes": sent}


def of_mixer(make) -> dict[str, dict[str, float]]:
    """By mesh: work of a device over an eighth of the unsharded layer's, and MB that it sends."""
    whole = work(make(), None)
    found = {}
    for label, config in MESHES.items():
        part = work(make(), make_mesh(config))
        ratios = {key: DEVICES * part[key] / whole[key] for key in ("flops", "bytes")}
        found[label] = {**ratios, "sent_MB": part["sent_bytes"] / 1e6}
    return found


def step_seconds(processes: int, folder: pathlib.Path) -> float:
    """Median seconds of a step of the training command on eight devices."""
    settings = RUN | {"MODEL_DIR": folder, "TRAIN_STEPS": FIRST_STEPS + COUNTED_STEPS}
    given = ["--gin_file=quickstart.gin", *(f"--gin.{name}={value}" for name, value in settings.items())]
    each = DEVICES // processes
    command = ["launch.local", f"--processes={processes}", f"--devices_per_process={each}", "--", *given]
    module = command if processes > 1 else ["t5x_ssm.train", *given]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={each}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", *module], env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = RUN["BATCH_SIZE"] * RUN["TASK_FEATURE_LENGTHS"]["targets"]
    speeds = [line["time/tokens_per_second"] for line in lines if "time/tokens_per_second" in line]
    return tokens / statistics.median(speeds[FIRST_STEPS:])


def of_all_meshes() -> dict[str, Any]:
    """The figures of work."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    return {
        "shape": {"batch": BATCH, "length": LENGTH, "width": WIDTH, "devices": DEVICES},
        "work_of_a_device_over_an_eighth": {name: of_mixer(make) for name, make in MIXERS.items()},
    }


def of_processes(repeats: int) -> dict[str, Any]:
    """The figures of time."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for processes, times in seconds.items():
                times.append(step_seconds(processes, pathlib.Path(folder) / f"{repeat}_{processes}"))
    return {
        "step_seconds_of_one_process": report.spread(seconds[1]),
        "step_of_two_processes_over_one": timing.ratios(seconds[2], seconds[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("work", "time"), help="one of the two; the other's figures stay as they are")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    path = report.RESULTS / "sharding.json"
    figures = json.loads(path.read_text()) if arguments.only and path.exists() else {}
    if arguments.only != "time":
        figures |= of_all_meshes()
    if arguments.only != "work":
        figures |= of_processes(arguments.repeats)
    figures.pop("machine", None)
    report.write("sharding", figures)


if __name__ == "__main__":
    main()
