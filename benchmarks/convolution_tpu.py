"""The block FFT beside XLA's own on a TPU, by the TPU compiler: `python -m benchmarks.convolution_tpu`.

Needs libtpu (the extra `aot`) and no TPU. Compiles forward and backward of a causal convolution, at batch 4 and 256 channels in
float32, for one v5e chip, and reads from the compiled programs what they compute and move: the textbook form (real transforms of
twice the length), the quarter-offset form with the compiler's FFT ("fft"), and the same as matrix products ("matmul", what
`causal_convolution` selects on TPU). The compiler counts a product once whatever its precision. Writes
benchmarks/results/convolution_tpu.json.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import report, tpu_target
from benchmarks.convolution import plain
from t5x_ssm.ssm.convolution import causal_convolution

BATCH, CHANNELS = 4, 256


def compiled(method: str, length: int, device) -> dict:
    """What the compiler says of one program."""

    def loss(u, kernel, weight):
        y = plain(u, kernel) if method == "plain" else causal_convolution(u, kernel, method=method)
        return jnp.sum(y * weight)

    place = jax.sharding.SingleDeviceSharding(device)
    u, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape in ((BATCH, length, CHANNELS), (CHANNELS, length))
    )
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(u, kernel, u).compile()
    cost = program.cost_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,4096,8192")
    lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
    chip = tpu_target.one_chip()
    figures = {}
    for length in lengths:
        programs = {method: compiled(method, length, chip) for method in ("plain", "fft", "matmul")}
        ratios = {key: programs["matmul"][key] / programs["plain"][key] for key in ("flops", "bytes")}
        figures[str(length)] = {**programs, "matmul_over_plain": ratios}
    report.write("convolution_tpu", {"target": tpu_target.NAME, "lengths": figures})


if __name__ == "__main__":
    main()
