"""Gated state space (GSS) layer.

Mehta, Gupta, Cutkosky, Neyshabur, "Long Range Language Modeling via Gated State Spaces" (2022). A gated unit in the manner
of GAU whose long-range mixing is a diagonal state space (a simplified DSS) run at a quarter of the model's width:

    U = GELU(X W1)            [L, F]      the gate, and the layer's feed-forward capacity
    V = norm(GELU(X W2))      [L, H]      the reduced width
    Y = SSM(V) + D V          [L, H]
    O = ((Y W3) * U) W4       [L, E]

X is the normalized input and the residual is added outside. There is no separate feed-forward block.
Collectives under model sharding: an all-gather of Y [B, L, H] before W3 and an all-reduce of O [B, L, E], besides the
statistics of the inner norm; none inside the state space.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.layers.activations import ACTIVATIONS
from t5x_ssm.layers.basic import Dense, LayerNorm
from t5x_ssm.layers.mixer import CoreAxes, Run, run_state_space
from t5x_ssm.layers.settings import require_positive
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.ssm import diagonal

Array = jax.Array


class GSSStateSpace(nn.Module):
    """The state space of GSS: one random diagonal Λ shared by all channels, B = 1 and Δ = 1 frozen, ZOH.

    Attributes:
      state_size: N, complex modes per channel.
      exponential_imaginary: Im Λ = exp(q), as in the paper's pseudocode; otherwise q itself.
    """

    state_size: int = 512
    exponential_imaginary: bool = True

    @nn.compact
    def __call__(self, v: Array, run: Run):
        channels, modes = v.shape[-1], self.state_size
        normal = nn.initializers.normal(1.0)

        def param(name, shape, axes):
            return partitioning.param_with_axes(name, normal, shape, jnp.float32, axes=axes)

        system = diagonal.gss(
            lambda_log_re=param("lambda_log_re", (modes,), ("modes",)),
            lambda_log_im=param("lambda_log_im", (modes,), ("modes",)),
            c_re=param("c_re", (channels, modes), ("channels", "modes")),
            c_im=param("c_im", (channels, modes), ("channels", "modes")),
            d=param("d", (channels,), ("channels",)),
            exp_imaginary=self.exponential_imaginary,
        )
        return run_state_space(self, diagonal, system, v, diagonal_axes(system), run)


def diagonal_axes(system: diagonal.Diagonal) -> CoreAxes:
    """Shardings of a diagonal bank: everything per channel is independent."""

    def names(leaf):
        return {0: (), 1: (None,), 2: ("channels", None)}[leaf.ndim]

    axes = jax.tree.map(names, system)
    if system.d is not None:
        axes = axes._replace(d=("channels",))
    return CoreAxes(axes, ("batch", None, "channels"), (("batch", "channels", None),) * 2)


class GSS(nn.Module):
    """The GSS mixer; see the module docstring.

    Attributes:
      hidden: F, width of the gate; 4 E when None.
      channels: H, the reduced width that the state space sees; E / 4 when None.
      state_size: N.
      activation: of both branches.
      dropout_rate: on the gated product.
      norm_epsilon: of the inner norm.
      dtype: of projections and activations; the state space runs in float32.
    """

    hidden: int | None = None
    channels: int | None = None
    state_size: int = 512
    activation: str = "gelu"
    exponential_imaginary: bool = True
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    feed_forward: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        width = x.shape[-1]
        hidden = 4 * width if self.hidden is None else self.hidden
        channels = width // 4 if self.channels is None else self.channels
        require_positive("GSS", hidden=hidden, channels=channels, state_size=self.state_size)
        activation = ACTIVATIONS[self.activation]

        u = activation(Dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="gate")(x))
        v = activation(Dense(channels, ("embed", "channels"), dtype=self.dtype, name="reduce")(x))
        v = LayerNorm(epsilon=self.norm_epsilon, axis="channels", dtype=self.dtype, name="norm")(v)
        v = constrain(v, ("batch", "length", "channels"))
        y, state = GSSStateSpace(self.state_size, self.exponential_imaginary, name="ssm")(v, run)
        # H is a sixteenth of F: gathering Y costs far less than reducing Y W3.
        y = constrain(y.astype(self.dtype), ("batch", "length", None))
        gated = Dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="expand")(y) * u
        gated = constrain(gated, ("batch", "length", "mlp"))
        gated = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(gated, deterministic=not enable_dropout)
        out = Dense(width, ("mlp", "embed"), dtype=self.dtype, name="out")(gated)
        return (out, state) if return_state else out
