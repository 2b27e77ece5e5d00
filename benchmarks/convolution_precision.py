"""What the block FFT's error is at each precision of its products: `python -m benchmarks.convolution_precision`.

Against float64, as the largest difference over the largest output. "matmul_high" is three passes of bfloat16 on a TPU, which are
written out here, because a CPU multiplies float32 in one. Writes benchmarks/results/convolution_precision.json.
"""

from unittest import mock

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from t5x_ssm.ssm import convolution

EINSUM = jnp.einsum


def three_passes(equation, x, y, precision):
    """An einsum as Precision.HIGH has it: both factors as two bfloat16 numbers, and three of the four products."""
    del precision

    def split(z):
        high = z.astype(jnp.bfloat16).astype(jnp.float32)
        return high, (z - high).astype(jnp.bfloat16).astype(jnp.float32)

    (x_high, x_low), (y_high, y_low) = split(x), split(y)
    return EINSUM(equation, x_high, y_high) + EINSUM(equation, x_high, y_low) + EINSUM(equation, x_low, y_high)


def main() -> None:
    figures = {}
    for length in (1024, 4096, 8192):
        random = np.random.default_rng(0)
        u = random.normal(size=(2, length, 8)).astype(np.float32)
        kernel = (random.normal(size=(8, length)) * np.exp(-5 * np.arange(length) / length)).astype(np.float32)
        spectra = (np.fft.rfft(x.astype(np.float64), n=2 * length) for x in (u.swapaxes(1, 2), kernel))
        expected = np.fft.irfft(np.prod(np.broadcast_arrays(*spectra), axis=0), n=2 * length)[..., :length].swapaxes(
            1, 2
        )
        row = {}
        for method, einsum in (("matmul", EINSUM), ("matmul_high", three_passes)):
            with mock.patch.object(convolution.jnp, "einsum", einsum):
                found = convolution.causal_convolution.__wrapped__(jnp.asarray(u), jnp.asarray(kernel), method=method)
            row[method] = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
        figures[str(length)] = row
    report.write("convolution_precision", {"largest_error": figures})


if __name__ == "__main__":
    main()
