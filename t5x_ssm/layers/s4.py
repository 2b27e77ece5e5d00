"""S4 and S4D layers.

Gu, Goel, Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022), and Gu, Gupta, Goel, Ré, "On the
Parameterization and Initialization of Diagonal State Space Models" (2022). One state space a channel, then a nonlinearity
and a projection that mixes the channels:

    Y = SSM(X) + D X                     [L, D]   S4: A is normal less rank one, bilinear; S4D: A is diagonal, zero-order hold
    Z = dropout(GELU(Y))                 [L, D]
    "linear":  O = Z W + b
    "glu":     O = (Z W + b) * sigmoid(Z W' + b')

X is the normalized input and the residual is added outside.
Collectives under model sharding: an all-reduce for each projection; none inside the state space.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.layers.activations import ACTIVATIONS, gated
from t5x_ssm.layers.basic import Dense
from t5x_ssm.layers.bidirectional import run_bidirectional
from t5x_ssm.layers.gss import diagonal_axes
from t5x_ssm.layers.mixer import CoreAxes, Run, run_state_space
from t5x_ssm.layers.settings import require_choice, require_steps, settings_of
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.ssm import diagonal, dplr, initialization
from t5x_ssm.ssm.dplr_powers import DPLR

Array = jax.Array

# For each kind of A, the starts that it can have and the rules that make it discrete, the rule of its paper first.
STARTS = {"dplr": ("legs",), "diagonal": ("legs", "lin", "inv")}
DISCRETIZATIONS = {"dplr": ("bilinear",), "diagonal": ("zoh", "bilinear")}
OUTPUTS = ("linear", "glu")


class S4Settings(nn.Module):
    """What `S4StateSpace` and the mixer around it are told alike.

    Attributes:
      kind: "dplr", A = diag(w) - p p^*, for S4; "diagonal", A = diag(w), for S4D.
      state_size: N, the real size of a state: N/2 complex modes in conjugate pairs.
      start: "legs", for a diagonal A also "lin" and "inv". B is LegS's for "dplr", ones for "diagonal".
      discretization: "bilinear", the only rule under which a DPLR A stays one, or "zoh"; None for the kind's own.
      step_min, step_max: between which Δ starts, log-uniformly.
      bidirectional: hears the future too, through the same A, B and Δ and another C.
    """

    kind: str = "dplr"
    state_size: int = 64
    start: str = "legs"
    discretization: str | None = None
    step_min: float = 1e-3
    step_max: float = 1e-1
    bidirectional: bool = False


class S4StateSpace(S4Settings):
    """The state space of S4 or S4D: a system of its own for each channel. Called with (u [B, L, H], run) for (y, state).

    Its settings are those of `S4Settings`.
    """

    @nn.compact
    def __call__(self, u: Array, run: Run):
        self._check()
        channels, modes = u.shape[-1], self.state_size // 2

        def param(name, init, shape=(channels, modes)):
            axes = ("channels", "modes")[: len(shape)]
            return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        def rows(name, values):
            return param(name, lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), shape))

        poles, p, b = self._start_of(modes)
        parameters = {
            "a_log_re": rows("a_log_re", np.log(-poles.real)),
            "a_im": rows("a_im", poles.imag),
            "b_re": rows("b_re", b.real),
            "b_im": rows("b_im", b.imag),
            "log_step": param(
                "log_step",
                lambda key, shape, dtype: initialization.log_uniform(key, shape, self.step_min, self.step_max, dtype),
                (channels,),
            ),
            "d": param("d", nn.initializers.normal(1.0), (channels,)),
        }
        if self.kind == "dplr":
            parameters |= {"p_re": rows("p_re", p.real), "p_im": rows("p_im", p.imag)}

        def system(name):
            # Real and imaginary part have a variance of 1/2 each.
            c = {f"c_{part}": param(f"{name}_{part}", nn.initializers.normal(np.sqrt(0.5))) for part in ("re", "im")}
            if self.kind == "dplr":
                return dplr.s4(**parameters, **c)
            discretization = self.discretization or DISCRETIZATIONS["diagonal"][0]
            return diagonal.s4d(**parameters, **c, discretization=discretization)

        core = dplr if self.kind == "dplr" else diagonal
        forward = system("c")
        axes = diagonal_axes(forward) if self.kind == "diagonal" else _dplr_axes(forward)
        if self.bidirectional:
            return run_bidirectional(core, forward, system("c_backward"), u, axes, run), None
        return run_state_space(self, core, forward, u, axes, run)

    def _start_of(self, modes: int):
        """(w, p, B) of the kept modes: negative frequencies for "dplr", positive ones for "diagonal", as their papers do."""
        if self.kind == "dplr":
            legs = initialization.legs_normal_plus_low_rank(2 * modes)
            return legs.poles[:modes], legs.p[:modes], legs.b[:modes]
        poles = {
            "legs": initialization.legs_poles,
            "lin": initialization.lin_poles,
            "inv": initialization.inv_poles,
        }[self.start](modes)
        return poles, None, np.ones(modes, complex)

    def _check(self):
        require_choice("S4StateSpace.kind", self.kind, STARTS)
        require_choice(f"S4StateSpace.start of kind {self.kind!r}", self.start, STARTS[self.kind])
        if self.discretization is not None:
            require_choice(
                f"S4StateSpace.discretization of kind {self.kind!r}", self.discretization, DISCRETIZATIONS[self.kind]
            )
        if self.state_size < 2 or self.state_size % 2:
            raise UserError(
                f"S4StateSpace.state_size = {self.state_size}; its modes are conjugate pairs: it must be even and positive."
            )
        require_steps("S4StateSpace", self.step_min, self.step_max)


def _dplr_axes(system: DPLR) -> CoreAxes:
    """Shardings of a DPLR bank: everything is per channel."""
    axes = jax.tree.map(lambda leaf: ("channels", None)[: leaf.ndim], system)
    return CoreAxes(axes, ("batch", None, "channels"), (("batch", "channels", None),) * 2)


class S4(S4Settings):
    """The S4 mixer; see the module docstring, and `S4Settings` for the settings of its state space.

    Attributes:
      activation: of the state space's output.
      output: "glu" or "linear".
      dropout_rate: before the output projection.
      feed_forward: whether a feed-forward block follows.
      dtype: of projections and activations; the state space runs in float32.
    """

    activation: str = "gelu"
    output: str = "glu"
    dropout_rate: float = 0.0
    feed_forward: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        y, state = S4StateSpace(**settings_of(self, S4Settings), name="ssm")(
            constrain(x, ("batch", "length", "channels")), run
        )
        out = mix_channels(self, y.astype(self.dtype), enable_dropout)
        return (out, state) if return_state else out


class S4D(S4):
    """S4 with a diagonal A; see `S4`."""

    kind: str = "diagonal"


def mix_channels(layer, y: Array, enable_dropout: bool) -> Array:
    """What follows the state space of S4 and of DSS: y [B, L, D] to O [B, L, D]. Called in the layer's compact method.

    Args:
      layer: a mixer with fields activation, dropout_rate, output and dtype.
      y: output of its state space.
      enable_dropout: whether dropout is on.
    """
    require_choice(f"{type(layer).__name__}.output", layer.output, OUTPUTS)
    width = y.shape[-1]
    z = ACTIVATIONS[layer.activation](y)
    z = nn.Dropout(layer.dropout_rate, broadcast_dims=(-2,))(z, deterministic=not enable_dropout)

    def project(name):
        return Dense(width, ("channels", "embed"), use_bias=True, dtype=layer.dtype, name=name)(z)

    return gated(project("out"), project("gate")) if layer.output == "glu" else project("out")
