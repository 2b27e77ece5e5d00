"""DSS layer.

Gupta, Gu, Berant, "Diagonal State Spaces are as Effective as Structured State Spaces" (2022): S4's layer with a diagonal
state space whose poles Λ are shared by all channels,

    Y = SSM(X) + D X          [L, D]      N complex modes a channel, zero-order hold, the real part of the sum
    Z = dropout(GELU(Y))      [L, D]
    O = Z W + b               [L, D]      or the gated form, see `layers.s4`

X is the normalized input and the residual is added outside.
Collectives under model sharding: an all-reduce for the projection; none inside the state space.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.layers.bidirectional import run_bidirectional
from t5x_ssm.layers.gss import diagonal_axes
from t5x_ssm.layers.mixer import Run, run_state_space
from t5x_ssm.layers.s4 import mix_channels
from t5x_ssm.layers.settings import require_choice, require_positive, require_steps, settings_of
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.ssm import diagonal, initialization

Array = jax.Array


class DSSSettings(nn.Module):
    """What `DSSStateSpace` and the mixer around it are told alike.

    Attributes:
      state_size: N, complex modes.
      kind: one of `diagonal.DSS_KINDS`: how parameters become Λ, and how modes are scaled.
      scale: False leaves out the factor (e^{ΔΛ} - 1)/Λ ("no scale").
      separate_steps: a time step for the real and one for the imaginary part of Λ, from one draw.
      kernel_length: L of "softmax", the longest input; None for the other kinds.
      step_min, step_max: between which Δ starts, log-uniformly.
      bidirectional: hears the future too, through the same Λ and Δ and another C.
    """

    state_size: int = 64
    kind: str = "exp"
    scale: bool = True
    separate_steps: bool = True
    kernel_length: int | None = None
    step_min: float = 1e-3
    step_max: float = 1e-1
    bidirectional: bool = False


class DSSStateSpace(DSSSettings):
    """The state space of DSS. Called with (u [B, L, H], run) for (y, state).

    "softmax" divides each mode by its sum over the lags of a kernel of `kernel_length`: a kernel of another length is another
    system, so it does not extrapolate, and what is behind the last lag was never trained. Longer inputs are refused. How
    far a generated text has come is known only while it runs: beyond kernel_length its outputs are NaN, never a guess.

    Its settings are those of `DSSSettings`.
    """

    @nn.compact
    def __call__(self, u: Array, run: Run):
        self._check(u.shape[1], run)
        channels, modes = u.shape[-1], self.state_size

        def param(name, init, shape, axes):
            return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        def start(name, values):
            return param(name, lambda key, shape, dtype: jnp.asarray(values, dtype), (modes,), ("modes",))

        def log_step(key, shape, dtype):
            draw = initialization.log_uniform(key, (channels, 1), self.step_min, self.step_max, dtype)
            return jnp.broadcast_to(draw, (channels, 2)) if len(shape) == 2 else draw[:, 0]

        poles = initialization.legs_poles(modes)
        exponential = self.kind in ("exp", "exp-re-im")
        normal = nn.initializers.normal(1.0)
        parameters = {
            "lambda_re": start("lambda_re", np.log(-poles.real) if exponential else poles.real),
            "lambda_im": start("lambda_im", np.log(poles.imag) if self.kind == "exp-re-im" else poles.imag),
            "log_step": param("log_step", log_step, (channels, 2), ("channels", None))
            if self.separate_steps
            else param("log_step", log_step, (channels,), ("channels",)),
            "d": param("d", normal, (channels,), ("channels",)),
        }

        def system(name):
            c = {
                f"c_{part}": param(f"{name}_{part}", normal, (channels, modes), ("channels", "modes"))
                for part in ("re", "im")
            }
            return diagonal.dss(**parameters, **c, kind=self.kind, scale=self.scale, length=self.kernel_length)

        forward = system("c")
        axes = diagonal_axes(forward)
        if self.bidirectional:
            return run_bidirectional(diagonal, forward, system("c_backward"), u, axes, run), None
        y, state = run_state_space(self, diagonal, forward, u, axes, run)
        return self._within_horizon(y, run) if self.kind == "softmax" and (run.decode or run.prefill) else y, state

    def _within_horizon(self, y: Array, run: Run) -> Array:
        """Counts the tokens of each row in the cache; y with NaN at and after token kernel_length."""
        batch, length = y.shape[:2]
        created = self.has_variable("cache", "tokens_seen")
        seen = partitioning.variable_with_axes(
            "cache", "tokens_seen", lambda: jnp.zeros((batch,), jnp.int32), axes=("batch",)
        )
        if run.decode and not created:
            return y
        before = seen.value
        seen.value = before + (length if run.prefill_lengths is None else run.prefill_lengths)
        position = before[:, None] + jnp.arange(length)
        return jnp.where((position < self.kernel_length)[..., None], y, jnp.nan)

    def _check(self, length: int, run: Run):
        require_positive("DSSStateSpace", state_size=self.state_size)
        require_choice("DSSStateSpace.kind", self.kind, diagonal.DSS_KINDS)
        require_steps("DSSStateSpace", self.step_min, self.step_max)
        if self.kind != "softmax":
            if self.kernel_length is not None:
                raise UserError(
                    f"DSSStateSpace.kernel_length = {self.kernel_length} has no meaning for kind {self.kind!r}, whose "
                    "kernel does not depend on a length: leave it None."
                )
            return
        if self.kernel_length is None or not self.scale:
            raise UserError(
                "DSSStateSpace.kind = 'softmax' normalises over the lags of its kernel: set kernel_length to the longest "
                "input, and leave scale = True."
            )
        if length > self.kernel_length:
            raise UserError(
                f"An input of {length} tokens is longer than DSSStateSpace.kernel_length = {self.kernel_length}; "
                "kind 'softmax' does not extrapolate. Train with a larger kernel_length, or with kind 'exp'."
            )
        if run.initial_state is not None:
            raise UserError(
                "DSSStateSpace.kind = 'softmax' cannot continue from initial_state, which does not say how many of its "
                "kernel_length tokens are used up."
            )


class DSS(DSSSettings):
    """The DSS mixer; see the module docstring, and `DSSSettings` for the settings of its state space.

    Attributes:
      activation: of the state space's output.
      output: "linear" or "glu".
      dropout_rate: before the output projection.
      feed_forward: whether a feed-forward block follows.
      dtype: of projections and activations; the state space runs in float32.
    """

    activation: str = "gelu"
    output: str = "linear"
    dropout_rate: float = 0.0
    feed_forward: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        y, state = DSSStateSpace(**settings_of(self, DSSSettings), name="ssm")(
            constrain(x, ("batch", "length", "channels")), run
        )
        out = mix_channels(self, y.astype(self.dtype), enable_dropout)
        return (out, state) if return_state else out
