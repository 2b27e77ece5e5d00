"""Causal and bidirectional convolution of sequences with long kernels, one kernel a channel.

All of it is one operation, multiplication by a Toeplitz matrix of size L:

    y[i] = Σ_{j ≤ i} below[i-j] u[j] + Σ_{j > i} above[L+i-j] u[j]

A causal convolution fills the lower triangle and a bidirectional one both. A convolution that must not cross document
boundaries takes a hierarchy of square blocks, and one with a kernel shorter than the sequence takes blocks of its size.

A Toeplitz matrix is usually embedded in a circulant one of size 2L, which means padding with zeros and real transforms of
size 2L. Here the sequence is multiplied by w^l with w = e^{2πi/(4L)} instead. Then w^L = i, so what a cyclic convolution
of size L wraps around arrives multiplied by i: the real part of w^-l z[l] is the lower triangle's sum, and with the kernel
below - i·above it is the whole. One complex transform of size L takes the place of a real one of size 2L: the same
arithmetic and half the memory traffic. (In other words, the Fourier transform at the frequencies (k - 1/4)/L.)

Implementations with one signature, which `select_method` chooses between:
  "direct"  a sum over the lags, for kernels of few;
  "fft"     the backend's complex FFT;
  "matmul"  the transform as two matrix products with a twiddle between, in real planes (Bailey's four steps; the Monarch
            factorisation of FlashConv), for accelerators whose matrix units outrun their FFT; products of float32
            precision, six passes of bfloat16 on a TPU
  "matmul_high"  the same in three passes: half the time in the matrix unit and an error of 7e-6 instead of 5e-7 of the
            output's size (benchmarks/convolution_precision.py). Chosen where jax_default_matmul_precision is "high".
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

METHODS = ("direct", "fft", "matmul", "matmul_high")

# A sum over up to this many lags is written out: fewer operations than any transform needs. A CPU passes over memory for
# every lag and would be faster with the FFT from 8 lags on, but XLA's CPU compiler gives FFTs of such kernels on a cut length
# layouts that its runtime then refuses (seen in float64).
DIRECT_LAGS = 32

# The smallest blocks of a convolution masked by documents; their sums are written out (measured on a CPU, forward and backward:
# 8 takes twice as long).
LEAF_LENGTH = 4

# Complex elements of the spectra that are alive at once. A few MiB stay in a CPU's cache (measured: up to 1.7 times faster
# than all channels at once); on accelerators the bound is there for memory alone.
CPU_GROUP_ELEMENTS = 1 << 18
GROUP_ELEMENTS = 1 << 24

# Beyond this many elements the spectra are made again in the backward pass rather than kept.
KEPT_ELEMENTS = 1 << 23


@functools.partial(jax.jit, static_argnames="method")
def causal_convolution(u_BLH, kernel_HL, *, anticausal_HL=None, resets=None, method: str | None = None):
    """y[b, i, h] = Σ_{j ≤ i} kernel[h, i-j] u[b, j, h], and optionally the future's part.

    Args:
      u_BLH: [B, L, H] float32 (float64 under x64).
      kernel_HL: [H, K], the response at lags 0 … K-1; what is beyond L is not used, what is missing is zero.
      anticausal_HL: [H, K], adds Σ_{j > i} anticausal[h, j-i-1] u[b, j, h]: lag 0 belongs to the first kernel alone.
      resets: bool [B, L], True where a document begins; then neither sum reaches beyond i's document.
      method: one of METHODS; None to let `select_method` choose.

    Returns:
      [B, L, H].

    Raises:
      ValueError: for an unknown method, or for "direct" with more than DIRECT_LAGS lags.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"unknown convolution method {method!r}; choose method from {', '.join(METHODS)} or None")
    length = u_BLH.shape[1]
    document = None if resets is None else jnp.cumsum(resets, axis=1)[:, None]
    kernels = (kernel_HL,) if anticausal_HL is None else (kernel_HL, anticausal_HL)
    kernels = tuple(k[:, :length] for k in kernels)
    lags = max(k.shape[1] for k in kernels)
    if method == "direct" and lags > DIRECT_LAGS:
        raise ValueError(f"method 'direct' writes out at most {DIRECT_LAGS} lags, not {lags}: choose method 'fft'")

    def run(platform):
        chosen = select_method(platform, lags) if method is None else method
        convolve = _sum_over_lags if chosen == "direct" else functools.partial(_convolve, TOEPLITZ[chosen])
        elements = CPU_GROUP_ELEMENTS if platform == "cpu" else GROUP_ELEMENTS
        return functools.partial(_in_channel_groups, functools.partial(convolve, document), elements)

    if method == "direct" or lags <= DIRECT_LAGS:
        return run("cpu")(u_BLH, *kernels)
    return lax.platform_dependent(u_BLH, *kernels, cpu=run("cpu"), tpu=run("tpu"), default=run("cuda"))


def select_method(platform: str, lags: int) -> str:
    """The implementation that `causal_convolution` uses by default on this platform for kernels of so many lags."""
    if lags <= DIRECT_LAGS:
        return "direct"
    if platform != "tpu":
        return "fft"
    return "matmul_high" if jax.config.jax_default_matmul_precision in ("high", "bfloat16_3x") else "matmul"


def _in_channel_groups(function, elements, u_BLH, *kernels):
    """Applies function(u_BHL, *kernels) to some channels at a time, about `elements` numbers in each group."""
    batch, length, channels = u_BLH.shape
    wanted = max(4, elements // (batch * length))
    group = max(g for g in range(1, channels + 1) if channels % g == 0 and g <= wanted)

    def run(u_BLG, *kernels):
        return jnp.swapaxes(function(jnp.swapaxes(u_BLG, 1, 2), *kernels), 1, 2)

    if group == channels:
        return run(u_BLH, *kernels)
    if u_BLH.size > KEPT_ELEMENTS:
        run = jax.checkpoint(run)
    u = jnp.moveaxis(u_BLH.reshape(batch, length, channels // group, group), 2, 0)
    kernels = [k.reshape(channels // group, group, k.shape[1]) for k in kernels]
    y = lax.map(lambda inputs: run(*inputs), (u, *kernels))
    return jnp.moveaxis(y, 0, 2).reshape(u_BLH.shape)


def _sum_over_lags(document, u, kernel, anticausal=None):
    """A convolution written out: u [..., L], kernels [..., lags], document int [..., L] or None."""

    def padded(x, *width):
        return jnp.pad(x, [(0, 0)] * (u.ndim - 1) + [width])

    y = kernel[..., :1] * u
    for lag in range(1, kernel.shape[-1]):
        late = kernel[..., lag, None] * u[..., :-lag]
        if document is not None:
            late = jnp.where(document[..., lag:] == document[..., :-lag], late, 0)
        y = y + padded(late, lag, 0)
    for lag in range(1, 1 if anticausal is None else min(anticausal.shape[-1] + 1, u.shape[-1])):
        early = anticausal[..., lag - 1, None] * u[..., lag:]
        if document is not None:
            early = jnp.where(document[..., lag:] == document[..., :-lag], early, 0)
        y = y + padded(early, 0, lag)
    return y


def _convolve(toeplitz, document, u, kernel, anticausal=None):
    """u [B, H, L], kernels [H, up to L], document int [B, 1, L] or None."""
    length = u.shape[-1]
    if document is not None:
        y = _packed(toeplitz, u, kernel, document)
        if anticausal is not None:
            # The same backwards in time, where the lag 0 that belongs to the first kernel is zero.
            lags = jnp.pad(anticausal, [(0, 0), (1, 0)])[:, :length]
            y = y + _packed(toeplitz, u[..., ::-1], lags, document[..., ::-1])[..., ::-1]
        return y
    if anticausal is not None:
        size = _power_of_two(length)
        return toeplitz(_pad(u, size), _pad(kernel, size), _pad(anticausal, size)[:, ::-1])[..., :length]
    # A kernel shorter than the sequence reaches from a block of its size into the next block and no further.
    block = _power_of_two(kernel.shape[1])
    blocks = -(-length // block)
    if blocks <= 2:
        size = _power_of_two(length)
        return toeplitz(_pad(u, size), _pad(kernel, size))[..., :length]
    u = _grid(_pad(u, blocks * block), blocks)
    previous = jnp.pad(u[..., :-1, :], [(0, 0), (0, 0), (1, 0), (0, 0)])
    return _ungrid(toeplitz(u, _pad(kernel, block)[:, None], previous=previous))[..., :length]


def _power_of_two(length):
    return 1 << (length - 1).bit_length()


def _pad(x, length):
    """x with zeros behind, up to `length` along the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


# ---------------------------------------------------------------------------------------------------------------------
# Multiplication by a Toeplitz matrix of size L, a power of two. Arrays are [..., L] with leading axes that broadcast:
#   u         the sequence;  previous  the L numbers before it, so that Σ_{j > i} below[L+i-j] previous[j] is added
#   below     lags 0 … L-1;  above     the upper triangle, None for zero
# ---------------------------------------------------------------------------------------------------------------------


def _toeplitz_fft(u, below, above=None, previous=None):
    # From a few thousand points on, two transforms of half the size, which stay in cache, are faster than one. The
    # butterfly between them is part of the multiplication by w^l and costs no pass over memory.
    radix = 2 if u.shape[-1] >= 4096 else 1
    spectra = zip(_spectrum(u, previous, radix), _spectrum(below, above, radix), strict=True)
    return _from_spectrum([a * b for a, b in spectra])


def _quarter_tables(length, radix, dtype):
    """Factors of e^{-2πi n f/L} at f = r + radix·k - 1/4 and n = q·(L/radix) + m.

    Returns:
      mixing [q, r] (complex numpy), and the twiddle of the remaining transform over m as cosine and sine [r, m].
    """
    q, m = np.arange(radix), np.arange(length // radix)
    offset = 0.25 - np.arange(radix)
    mixing = np.exp(2j * np.pi / radix * q[:, None] * offset)
    twiddle = np.exp(2j * np.pi / length * offset[:, None] * m)
    return mixing, twiddle.real.astype(dtype), twiddle.imag.astype(dtype)


def _weighted_sum(weights, arrays):
    """Σ weight·array over floats that are not zero; None for an empty sum."""
    terms = [array if w == 1 else w * array for w, array in zip(weights, arrays, strict=True) if abs(w) > 1e-12]
    return sum(terms[1:], terms[0]) if terms else None


def _spectrum(re, minus_im, radix):
    """Transforms of re - i·minus_im at the quarter-offset frequencies: a list with one array [..., L/radix] per residue r."""
    length = re.shape[-1]
    mixing, cosine, sine = _quarter_tables(length, radix, re.dtype)
    blocks = [jnp.split(x, radix, axis=-1) for x in (re,) + (() if minus_im is None else (minus_im,))]
    spectra = []
    for r in range(radix):
        real, imaginary = [float(z) for z in mixing[:, r].real], [float(z) for z in mixing[:, r].imag]
        x, y = _weighted_sum(real, blocks[0]), _weighted_sum(imaginary, blocks[0])
        if minus_im is not None:
            x = _add(x, _weighted_sum(imaginary, blocks[1]))
            y = _add(y, _weighted_sum([-z for z in real], blocks[1]))
        c, s = cosine[r], sine[r]
        rotated = (x * c, x * s) if y is None else (x * c - y * s, x * s + y * c)
        spectra.append(jnp.fft.fft(lax.complex(*rotated)))
    return spectra


def _add(x, y):
    return y if x is None else x if y is None else x + y


def _from_spectrum(spectra):
    """The real part of the inverse of `_spectrum`."""
    radix, length = len(spectra), len(spectra) * spectra[0].shape[-1]
    mixing, cosine, sine = _quarter_tables(length, radix, spectra[0].real.dtype)
    planes = []
    for r in range(radix):
        z = jnp.fft.ifft(spectra[r])
        planes.append((z.real * cosine[r] + z.imag * sine[r], z.imag * cosine[r] - z.real * sine[r]))
    blocks = []
    for q in range(radix):
        real, imaginary = ([float(z) / radix for z in part] for part in (mixing[q].real, mixing[q].imag))
        blocks.append(
            _add(_weighted_sum(real, [p[0] for p in planes]), _weighted_sum(imaginary, [p[1] for p in planes]))
        )
    return blocks[0] if radix == 1 else jnp.concatenate(blocks, axis=-1)


def _toeplitz_matmul(u, below, above=None, previous=None, precision=lax.Precision.HIGHEST):
    length = u.shape[-1]
    # L = R·M with n = q·M + m and f = r + R·k - 1/4: products over q, twiddles at (r, m), products over m.
    radix = 1 << (length.bit_length() // 2)
    mixing, cosine, sine = _quarter_tables(length, radix, u.dtype)
    steps = np.arange(length // radix)
    inner = np.exp(-2j * np.pi * (np.outer(steps, steps) % len(steps)) / len(steps))
    outer_re, outer_im, inner_re, inner_im = (
        x.astype(u.dtype) for x in (mixing.real, mixing.imag, inner.real, inner.imag)
    )
    inner_planes = np.block([[inner_re, inner_im], [-inner_im, inner_re]])  # row vectors (re, im) times this

    def product(equation, x, table):
        return jnp.einsum(equation, x, jnp.asarray(table), precision=precision)

    def spectrum(re, minus_im):
        x_re, x_im = (product("...qm,qr->...rm", _grid(re, radix), t) for t in (outer_re, outer_im))
        if minus_im is not None:
            y_re, y_im = (product("...qm,qr->...rm", _grid(minus_im, radix), t) for t in (outer_re, outer_im))
            x_re, x_im = x_re + y_im, x_im - y_re
        planes = jnp.concatenate([x_re * cosine - x_im * sine, x_re * sine + x_im * cosine], axis=-1)
        return jnp.split(product("...rm,mk->...rk", planes, inner_planes), 2, axis=-1)

    (a_re, a_im), (b_re, b_im) = spectrum(u, previous), spectrum(below, above)
    planes = jnp.concatenate([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], axis=-1)
    z_re, z_im = jnp.split(product("...rk,mk->...rm", planes, inner_planes / length), 2, axis=-1)
    x_re, x_im = z_re * cosine + z_im * sine, z_im * cosine - z_re * sine
    return _ungrid(product("...rm,qr->...qm", x_re, outer_re) + product("...rm,qr->...qm", x_im, outer_im))


def _grid(x, radix):
    return x.reshape(*x.shape[:-1], radix, x.shape[-1] // radix)


def _ungrid(x):
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


TOEPLITZ = {
    "fft": _toeplitz_fft,
    "matmul": _toeplitz_matmul,
    "matmul_high": functools.partial(_toeplitz_matmul, precision=lax.Precision.HIGH),
}


# ---------------------------------------------------------------------------------------------------------------------
# Packed documents
# ---------------------------------------------------------------------------------------------------------------------


def _packed(toeplitz, u, kernel, document):
    """A causal convolution that does not cross documents: u [B, H, L], kernel [H, L], document int [B, 1, L], in runs.

    Split in the middle: both halves are the same problem, and from the first half to the second the mask factorises. A
    token of one half and a token of the other are in one document exactly when both are in the document of the second
    half's first token. So all blocks of one size take one Toeplitz product between two masks: log₂ L sizes in all. What
    is masked is exactly zero before the transform, so nothing of one document is in another's outputs.
    """
    length = u.shape[-1]
    leaf = min(LEAF_LENGTH, _power_of_two(length))
    block = max(leaf, _power_of_two(kernel.shape[1]))
    size = block * -(-length // block)
    u, kernel = _pad(u, size), _pad(kernel, block)
    document = jnp.pad(document, [(0, 0), (0, 0), (0, size - length)], mode="edge")
    y = _ungrid(_sum_over_lags(_grid(document, size // leaf), _grid(u, size // leaf), kernel[:, None, :leaf]))
    half = leaf
    while half < block:
        u_halves, same = _grid(u, size // (2 * half)), _grid(document, size // (2 * half))
        same = same == same[..., half : half + 1]
        first = jnp.where(same[..., :half], u_halves[..., :half], 0)
        second = toeplitz(first, kernel[:, None, half : 2 * half], kernel[:, None, :half])
        second = jnp.where(same[..., half:], second, 0)
        y = y + _ungrid(jnp.pad(second, [(0, 0)] * 3 + [(half, 0)]))
        half *= 2
    if block < size:  # the kernel is shorter than the sequence: every block also hears the one before it
        where = _grid(document, size // block)
        heard = where[..., :-1, :] == where[..., 1:, :1]
        previous = jnp.where(heard, _grid(u, size // block)[..., :-1, :], 0)
        tail = toeplitz(previous, jnp.zeros_like(kernel)[:, None], kernel[:, None])
        tail = jnp.where(where[..., 1:, :] == where[..., 1:, :1], tail, 0)
        y = y + _ungrid(jnp.pad(tail, [(0, 0), (0, 0), (1, 0), (0, 0)]))
    return y[..., :length]
