"""The causal convolution beside a plain one: `python -m benchmarks.convolution [--lengths=1024,4096,16384] [--repeats=21]`.

Forward and backward of y = k * u at batch 4 and 64 channels in float32, in turns: ours as `causal_convolution` selects it, the
textbook form in `jnp.fft` (real transforms of twice the length), and, where they are installed, PyTorch's and SciPy's FFT doing the
same (SciPy's backward pass written out by hand). Ratios above 1 say how many times faster ours is. Beside it, what a token costs at
65,536 over 4,096 tokens of the plain transform alone. Writes benchmarks/results/convolution.json.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from benchmarks import report, timing
from t5x_ssm.ssm.convolution import causal_convolution

BATCH, CHANNELS = 4, 64


def plain(u_BLH, kernel_HL):
    """y = k * u by real transforms of twice the length."""
    length = u_BLH.shape[1]
    u = jnp.fft.rfft(jnp.swapaxes(u_BLH, 1, 2), n=2 * length)
    y = jnp.fft.irfft(u * jnp.fft.rfft(kernel_HL, n=2 * length), n=2 * length)[..., :length]
    return jnp.swapaxes(y, 1, 2)


def jax_gradient(convolve: Callable) -> Callable:
    """A compiled function (u, kernel, dy) -> (y, du, dkernel) that waits for its result."""

    @jax.jit
    def run(u, kernel, dy):
        y, backward = jax.vjp(convolve, u, kernel)
        return y, *backward(dy)

    return lambda *arrays: jax.block_until_ready(run(*arrays))


def scipy_gradient(u, kernel, dy):
    """The same in SciPy, all cores."""
    length = u.shape[1]
    forward = functools.partial(scipy.fft.rfft, n=2 * length, workers=-1)
    back = lambda z: scipy.fft.irfft(z, n=2 * length, workers=-1)[..., :length]
    u_f, k_f, dy_f = (forward(x) for x in (u.swapaxes(1, 2), kernel, dy.swapaxes(1, 2)))
    return back(u_f * k_f), back(dy_f * k_f.conj()), back((dy_f * u_f.conj()).sum(0))


def torch_gradient() -> Callable | None:
    """The same in PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None

    def run(u, kernel, dy):
        length = u.shape[1]
        u, kernel = (torch.tensor(np.asarray(x)).requires_grad_() for x in (u, kernel))
        u_f = torch.fft.rfft(u.transpose(1, 2), n=2 * length)
        y = torch.fft.irfft(u_f * torch.fft.rfft(kernel, n=2 * length), n=2 * length)[..., :length].transpose(1, 2)
        y.backward(torch.tensor(np.asarray(dy)))
        return y, u.grad, kernel.grad

    return run


def inputs(length: int):
    """u, kernel and the derivative of y."""
    random = np.random.default_rng(0)
    shapes = ((BATCH, length, CHANNELS), (CHANNELS, length), (BATCH, length, CHANNELS))
    return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def at_length(length: int, repeats: int) -> dict:
    """Ratios at one length."""
    runs = {"ours": jax_gradient(causal_convolution), "plain": jax_gradient(plain), "scipy": scipy_gradient}
    if torch := torch_gradient():
        runs["torch"] = torch
    arrays = inputs(length)
    seconds = timing.in_turns({name: functools.partial(run, *arrays) for name, run in runs.items()}, repeats)
    figures = {"seconds": {name: report.spread(values) for name, values in seconds.items()}}
    for name in runs.keys() - {"ours"}:
        figures[f"times_faster_than_{name}"] = timing.ratios(seconds[name], seconds["ours"])
    return figures


def growth(repeats: int) -> dict:
    """Seconds a token at 65,536 over 4,096 tokens, for the plain transform and for ours."""
    figures = {}
    for name, convolve in (("plain", plain), ("ours", causal_convolution)):
        run = jax_gradient(convolve)
        medians = []
        for length in (4096, 65536):
            arrays = tuple(x[:1] if x.ndim == 3 else x for x in inputs(length))
            seconds = timing.in_turns({name: functools.partial(run, *arrays)}, repeats)[name]
            medians.append(report.spread(seconds)["median"] / length)
        figures[name] = medians[1] / medians[0]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    figures = {length: at_length(int(length), options.repeats) for length in options.lengths.split(",")}
    report.write("convolution", {"lengths": figures, "cost_per_token_65536_over_4096": growth(options.repeats)})


if __name__ == "__main__":
    main()
