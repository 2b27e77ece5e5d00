"""Causal convolution of sequences with long kernels, one kernel a channel."""

import jax.numpy as jnp


def causal_convolution(u_BLH, kernel_HL):
    """y[b, i, h] = Σ_{j ≤ i} kernel[h, i-j] u[b, j, h].

    Args:
      u_BLH: [B, L, H] float32 (float64 under x64).
      kernel_HL: [H, K], the response at lags 0 … K-1.

    Returns:
      [B, L, H].
    """
    length = u_BLH.shape[1]
    kernel_HL = kernel_HL[:, :length]
    size = 1 << (length + kernel_HL.shape[1] - 2).bit_length() if length > 1 else 2
    u_BHL = jnp.swapaxes(u_BLH, 1, 2)
    y = jnp.fft.irfft(jnp.fft.rfft(u_BHL, size) * jnp.fft.rfft(kernel_HL, size), size)[..., :length]
    return jnp.swapaxes(y, 1, 2)
