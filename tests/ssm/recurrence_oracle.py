"""The oracle of diagonal systems: the papers' formulas in complex128 and the recurrence, one token after another.

It is written from the papers, uses complex numbers and double precision throughout, and shares nothing with the code under
test. It runs under `jax.enable_x64(True)` so that its gradients can be taken too.
"""

import jax
import jax.numpy as jnp
import numpy as np


def complex_of(re, im):
    return jax.lax.complex(re, im)


def gss(p):
    """(Ā, B̄, C, D) of the GSS parameters in dictionary p."""
    poles = complex_of(-jnp.exp(p["lambda_log_re"]), jnp.exp(p["lambda_log_im"]))
    a = jnp.exp(poles)
    return a, (a - 1) / poles, complex_of(p["c_re"], p["c_im"]), p["d"]


def gss_linear_imaginary(p):
    poles = complex_of(-jnp.exp(p["lambda_log_re"]), p["lambda_log_im"])
    a = jnp.exp(poles)
    return a, (a - 1) / poles, complex_of(p["c_re"], p["c_im"]), p["d"]


def dss(p, kind="exp", scale=True, length=None):
    re, im = p["lambda_re"], p["lambda_im"]
    poles = {
        "exp": lambda: complex_of(-jnp.exp(re), im),
        "exp-re-im": lambda: complex_of(-jnp.exp(re), jnp.exp(im)),
        "clip": lambda: complex_of(jnp.minimum(re, 1e-4), im),
        "softmax": lambda: complex_of(re, im),
    }[kind]()
    step = jnp.exp(p["log_step"])
    step_re, step_im = (step, step) if step.ndim == 1 else (step[:, 0], step[:, 1])
    exponent = complex_of(step_re[:, None] * poles.real, step_im[:, None] * poles.imag)
    a = jnp.exp(exponent)
    if kind == "softmax":
        b = 1 / (poles * jnp.sum(jnp.exp(jnp.arange(length) * exponent[..., None]), -1))
    else:
        b = (a - 1) / poles if scale else jnp.ones_like(a)
    return a, b, complex_of(p["c_re"], p["c_im"]), p["d"]


def s4d(p, discretization="zoh"):
    poles = complex_of(-jnp.exp(p["a_log_re"]), p["a_im"])
    step = jnp.exp(p["log_step"])[:, None]
    if discretization == "zoh":
        a = jnp.exp(step * poles)
        gain = (a - 1) / poles
    else:
        a = (1 + step * poles / 2) / (1 - step * poles / 2)
        gain = step / (1 - step * poles / 2)
    return a, gain * complex_of(p["b_re"], p["b_im"]), 2 * complex_of(p["c_re"], p["c_im"]), p["d"]


def recur(system, u, state=None, resets=None):
    """y [B, L, H] and the states before the first and after each token, [L + 1, B, H, N] complex."""
    a, b, c, d = system
    state = jnp.zeros((u.shape[0], *c.shape), complex) if state is None else state
    resets = jnp.zeros(u.shape[:2], bool) if resets is None else resets

    def body(x, inputs):
        token, reset = inputs
        x = a * jnp.where(reset[:, None, None], 0, x) + b * token[..., None]
        return x, (jnp.sum(c * x, -1).real + d * token, x)

    _, (y, states) = jax.lax.scan(body, state, (jnp.swapaxes(u, 0, 1), resets.T))
    return jnp.swapaxes(y, 0, 1), jnp.concatenate([state[None], states])


def toeplitz_convolution(u, kernel, anticausal=None, document=None):
    """The convolution as a dense matrix, float64 numpy: u [B, L, H], kernels [H, K], document int [B, L]."""
    u, kernel = np.asarray(u, np.float64), np.asarray(kernel, np.float64)
    length = u.shape[1]
    lag = np.arange(length)[:, None] - np.arange(length)[None]
    matrix = np.where((lag >= 0) & (lag < kernel.shape[1]), kernel[:, np.clip(lag, 0, kernel.shape[1] - 1)], 0)
    if anticausal is not None:
        ahead = -lag - 1
        taps = np.asarray(anticausal, np.float64)
        inside = (ahead >= 0) & (ahead < taps.shape[1])
        matrix = matrix + np.where(inside, taps[:, np.clip(ahead, 0, taps.shape[1] - 1)], 0)
    mask = np.ones((u.shape[0], length, length)) if document is None else document[:, :, None] == document[:, None, :]
    return np.einsum("hij,bij,bjh->bih", matrix, mask, u)
