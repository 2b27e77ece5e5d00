"""Layer equations in float64 numpy, written from the papers' formulas and not from the code under test."""

import math

import numpy as np
from scipy import special


def numpy_tree(tree):
    """Parameters as float64 numpy arrays in nested dicts."""
    if hasattr(tree, "items"):
        return {k: numpy_tree(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)


def gelu(x):
    """The exact GELU, x Φ(x)."""
    return x * 0.5 * (1 + special.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    """The tanh approximation of GELU."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return special.expit(x)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def layer_norm(p, x, epsilon=1e-6, center=True):
    if center:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return y * p.get("scale", 1.0) + p.get("bias", 0.0)


def recurrence(a, b, c, u, real=False):
    """y[l] = Re(C x[l]) of x[l] = Ā x[l-1] + B̄ u[l], per channel.

    Args:
      a, b, c: complex, [H, N] or what broadcasts to it.
      u: [B, L, H].
      real: leave out the real part (everything is real).
    """
    state = np.zeros((u.shape[0], *np.broadcast_shapes(a.shape, b.shape, c.shape)), complex)
    out = np.zeros(u.shape)
    for l in range(u.shape[1]):
        state = a * state + b * u[:, l, :, None]
        out[:, l] = (c * state).sum(-1).real
    return out


def zoh(lam, step):
    return np.exp(lam * step), (np.exp(lam * step) - 1) / lam


def bilinear(lam, step):
    return (1 + step * lam / 2) / (1 - step * lam / 2), step / (1 - step * lam / 2)


def relative_bucket(relative, num_buckets, max_distance, bidirectional):
    """T5's bucket of one relative position (key minus query), in exact scalar arithmetic."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        if relative > 0:
            offset = num_buckets
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    # The tiny term is T5's own: it decides ties at powers.
    far = exact + int(math.log(distance / exact + 1.2e-7) / math.log(max_distance / exact) * (num_buckets - exact))
    return offset + min(far, num_buckets - 1)


def rotary(x, positions):
    """Rotary embedding of x [L, heads, D] as a product with complex phases; dimension i pairs with i + D/2."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(p, x, visible, *, num_heads, num_kv_heads=None, source=None, bias=None, positions=None, scale=None):
    """Dense masked attention of one example.

    Args:
      p: parameters of `layers.attention.Attention`.
      x: [L, D].
      visible: bool [L, S].
      source: [S, D], where keys and values come from; x itself when None.
      bias: [heads, L, S], or None.
      positions: rotary positions [L], or None.
    """
    source = x if source is None else source
    kv_heads = num_kv_heads or num_heads
    q = dense(p["query"], x).reshape(len(x), num_heads, -1)
    k, v = (dense(p[n], source).reshape(len(source), kv_heads, -1) for n in ("key", "value"))
    if positions is not None:
        q, k = rotary(q, positions), rotary(k, positions)
    heads = []
    for h in range(num_heads):
        g = h * kv_heads // num_heads
        logits = q[:, h] @ k[:, g].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            logits = logits + bias[h]
        heads.append(softmax(np.where(visible, logits, -np.inf)) @ v[:, g])
    return dense(p["out"], np.concatenate(heads, axis=-1))
