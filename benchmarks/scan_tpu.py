"""S5's scan on a TPU, as a kernel and as a loop, by the TPU compiler: `python -m benchmarks.scan_tpu`.

Needs libtpu (the extra `aot`) and no TPU. Compiles forward and backward of S5's state space (batch 4, 256 channels, 128 complex
modes, float32) for one v5e chip, once with the kernel of `ssm/pallas_scan.py`, which TPUs run, and once with the loop of `ssm/diagonal_scan.py`.
From each program it reads the bytes to and from HBM, loops counted as often as they run, and how many steps one has to start after
another: what a loop of small programs costs most. What the kernel does inside is not in the compiler's count. Writes
benchmarks/results/scan_tpu.json.
"""

import argparse
import unittest.mock

import jax
import jax.numpy as jnp

from benchmarks import report, tpu_target
from launch import costs, hlo
from t5x_ssm.ssm import multi_input

BATCH, CHANNELS, MODES = 4, 256, 128


def compiled(length: int, device, kernel: bool) -> dict:
    """What one program moves."""
    place = jax.sharding.SingleDeviceSharding(device)

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def loss(parameters, u):
        return jnp.sum(jnp.square(multi_input.convolve(multi_input.s5(**parameters), u)))

    def only_the_loop(*arrays, tpu, default):
        return default(*arrays)

    parameters = {name: shaped(MODES) for name in ("lambda_re", "lambda_im", "log_step")}
    parameters |= {name: shaped(MODES, CHANNELS) for name in ("b_re", "b_im")}
    parameters |= {name: shaped(CHANNELS, MODES) for name in ("c_re", "c_im")} | {"d": shaped(CHANNELS)}
    inputs = parameters, shaped(BATCH, length, CHANNELS)
    lower = jax.jit(jax.grad(loss, argnums=(0, 1))).lower
    if kernel:
        lowered = lower(*inputs)
    else:
        with unittest.mock.patch.object(jax.lax, "platform_dependent", only_the_loop):
            lowered = lower(*inputs)
    program = lowered.compile()
    text = program.as_text()
    return {
        "hbm_MiB": costs.of_program(text, {}).hbm_bytes / 2**20,
        "temporary_MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
        "operations_one_after_another": sum(times for _, times, fused in hlo.Program(text).run() if not fused),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,4096,16384")
    lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
    chip = tpu_target.one_chip()
    figures = {}
    for length in lengths:
        row = {name: compiled(length, chip, name == "kernel") for name in ("kernel", "loop")}
        row["kernel_over_loop"] = {
            key: value / row["loop"][key] for key, value in row["kernel"].items() if row["loop"][key]
        }
        row["array_MiB"] = BATCH * length * 2 * MODES * 4 / 2**20
        figures[str(length)] = row
    report.write("scan_tpu", {"target": tpu_target.NAME, "lengths": figures})


if __name__ == "__main__":
    main()
