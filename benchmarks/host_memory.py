"""Runs on CPUs that keep the memory they free: `python -m benchmarks.host_memory [--repeats=5]`.

The gradient of S5's layer at batch 4 and 256 channels, and the steps of the quickstart's model, each in processes of their own that
take turns: as they come, and as `training.host_memory` has the commands run. Page faults a run, and how many times faster. Writes benchmarks/results/host_memory.json.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp

from benchmarks import report, timing
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.s5 import S5
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training.host_memory import keep_freed_memory

RUNS_OF_A_PROCESS = 15
CASES = {
    **{f"s5_{length}": (S5(state_size=256, output="gelu"), (4, length, 256)) for length in (1024, 4096, 16384)},
    "gss_language_model": (
        Decoder(259, 128, "gss", num_layers=4, mixers={"gss": functools.partial(GSS, state_size=64)}),
        (8, 512),
    ),
}


def measure(case: str, kept: bool) -> dict:
    """Seconds and page faults of a run, in this process."""
    if kept and not keep_freed_memory():
        sys.exit("This allocator has no mallopt: there is nothing to measure.")
    module, shape = CASES[case]
    x = jnp.ones(shape, jnp.float32 if len(shape) == 3 else jnp.int32)
    inputs = (x,) if len(shape) == 3 else (x, x)
    parameters = jax.jit(lambda key: module.init(key, *inputs, enable_dropout=False)["params"])(jax.random.key(0))

    def loss(parameters):
        return jnp.mean(jnp.square(module.apply({"params": parameters}, *inputs, enable_dropout=False)))

    run = functools.partial(jax.jit(jax.value_and_grad(loss)).lower(parameters).compile(), parameters)
    timing.seconds_of(run)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = [timing.seconds_of(run) for _ in range(RUNS_OF_A_PROCESS)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"seconds": statistics.median(seconds), "page_faults": faults / RUNS_OF_A_PROCESS}


def compare(case: str, repeats: int) -> dict:
    def child(kept):
        command = [sys.executable, "-m", "benchmarks.host_memory", f"--child={case}", *(["--kept"] if kept else [])]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    found = timing.in_turns({name: name == "kept" for name in ("given_back", "kept")}, repeats, child)
    seconds = {name: [x["seconds"] for x in values] for name, values in found.items()}
    return {"times_faster": timing.ratios(seconds["given_back"], seconds["kept"])} | {
        name: {
            "seconds": report.spread(seconds[name]),
            "page_faults": report.spread([x["page_faults"] for x in values]),
        }
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.kept)))
    else:
        report.write("host_memory", {case: compare(case, options.repeats) for case in CASES})


if __name__ == "__main__":
    main()
