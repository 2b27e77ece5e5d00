"""Causal convolution of sequences with long kernels, one kernel a channel."""

import jax.numpy as jnp

# Below this length a convolution masked by document is summed directly, lag by lag.
LEAF = 32


def causal_convolution(u_BLH, kernel_HL, *, resets=None):
    """y[b, i, h] = Σ_{j ≤ i} kernel[h, i-j] u[b, j, h].

    Args:
      u_BLH: [B, L, H] float32 (float64 under x64).
      kernel_HL: [H, K], the response at lags 0 … K-1.
      resets: bool [B, L], True where a document begins; then the sum does not reach back beyond i's document.

    Returns:
      [B, L, H].
    """
    u_BHL = jnp.swapaxes(u_BLH, 1, 2)
    if resets is None:
        y = _fft_convolution(u_BHL, kernel_HL)
    else:
        y = _packed_convolution(u_BHL, kernel_HL, jnp.cumsum(resets, axis=1)[:, None])
    return jnp.swapaxes(y, 1, 2)


def _fft_convolution(u_BHL, kernel_HL):
    length = u_BHL.shape[-1]
    size = max(2, 1 << (2 * length - 2).bit_length())
    return jnp.fft.irfft(jnp.fft.rfft(u_BHL, size) * jnp.fft.rfft(kernel_HL, size), size)[..., :length]


def _packed_convolution(u, kernel, document):
    """Masked by document: u [B, H, L], kernel [H, L], document int [B, 1, L] ascending.

    Split in the middle: both halves are the same problem, and from the first half to the second the mask factorises. A
    token of one half and a token of the other are in one document exactly when both are in the document of the second
    half's first token. So all blocks of one size take one ordinary convolution between two masks, log₂ L sizes in all.
    """
    length = u.shape[-1]
    size = max(LEAF, 1 << (length - 1).bit_length())
    pad = [(0, 0), (0, 0), (0, size - length)]
    u, document = jnp.pad(u, pad), jnp.pad(document, pad, mode="edge")
    kernel = jnp.pad(kernel[:, :length], [(0, 0), (0, max(0, size - kernel.shape[1]))])

    def blocks(x, width):
        return x.reshape(*x.shape[:2], size // width, width)

    y = _leaf_convolution(blocks(u, LEAF), kernel, blocks(document, LEAF)).reshape(u.shape)
    half = LEAF
    while half < size:
        of, where = blocks(u, 2 * half), blocks(document, 2 * half)
        same = where == where[..., half : half + 1]
        first = jnp.where(same[..., :half], of[..., :half], 0)
        spectrum = jnp.fft.rfft(first, 2 * half) * jnp.fft.rfft(kernel[:, : 2 * half])[:, None]
        second = jnp.fft.irfft(spectrum, 2 * half)[..., half:]
        second = jnp.where(same[..., half:], second, 0)
        y = y + jnp.pad(second, [(0, 0)] * 3 + [(half, 0)]).reshape(u.shape)
        half *= 2
    return y[..., :length]


def _leaf_convolution(u, kernel, document):
    y = jnp.zeros_like(u)
    for lag in range(u.shape[-1]):
        ahead = [(0, 0)] * 3 + [(lag, 0)]
        late = jnp.pad(u, ahead)[..., : u.shape[-1]]
        same = jnp.pad(document, ahead, constant_values=-1)[..., : u.shape[-1]] == document
        y = y + jnp.where(same, kernel[:, None, lag, None] * late, 0)
    return y
