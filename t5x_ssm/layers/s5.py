"""S5 layer.

Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling" (2023). One state space that all
channels drive and read, so that it mixes them itself, then a nonlinearity:

    Y = SSM(X) + D X                             [L, D]
    "gelu":       O = GELU(Y)
    "half_glu1":  G = GELU(Y),  O = G * sigmoid(G W + b)
    "half_glu2":  G = GELU(Y),  O = Y * sigmoid(G W + b)
    "full_glu":   G = GELU(Y),  O = (G W' + b') * sigmoid(G W + b)

X is the normalized input and the residual is added outside. Dropout, one mask for all positions, is on G and on O.
Collectives under model sharding: the state space is cut by modes (`parallel.split_modes`), so its output [B, L, D] is added up over the
devices, and backwards the gradient of its input, unless its modes are few and it is whole on each; a gate gathers sigmoid(·) [B, L, D] after its product, and "full_glu" its other
factor.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.layers.activations import ACTIVATIONS, gated
from t5x_ssm.layers.basic import Dense
from t5x_ssm.layers.bidirectional import run_bidirectional
from t5x_ssm.layers.mixer import CoreAxes, Run, run_state_space
from t5x_ssm.layers.settings import require_choice, require_positive, require_steps, settings_of
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.parallel.split_modes import split_modes
from t5x_ssm.ssm import initialization, multi_input

Array = jax.Array

OUTPUTS = ("gelu", "half_glu1", "half_glu2", "full_glu")


class S5Settings(nn.Module):
    """What `S5StateSpace` and the mixer around it are told alike.

    Attributes:
      state_size: the real size of the state; P = state_size / 2 complex modes with `conj_sym`, else P = state_size.
      blocks: J, of how many LegS matrices Λ starts; state_size is a multiple of 2 J.
      conj_sym: modes are conjugate pairs of which one is kept, y = 2 Re(C x).
      discretization: "zoh" or "bilinear".
      clip_eigs: keeps Re Λ below -10⁻⁴, as generation beyond the trained length needs.
      c_init: how C starts: "lecun_normal", "trunc_standard_normal" or "complex_normal".
      step_min, step_max: between which Δ starts, log-uniformly.
      step_rescale: multiplies Δ, for input at another sampling rate than the trained one.
      bidirectional: hears the future too, through the same Λ, B and Δ and another C.
    """

    state_size: int = 64
    blocks: int = 1
    conj_sym: bool = True
    discretization: str = "zoh"
    clip_eigs: bool = False
    c_init: str = "lecun_normal"
    step_min: float = 1e-3
    step_max: float = 1e-1
    step_rescale: float = 1.0
    bidirectional: bool = False


class S5StateSpace(S5Settings):
    """The state space of S5. Called with (u [B, L, H], run) for (y, state).

    Its settings are those of `S5Settings`.
    """

    @nn.compact
    def __call__(self, u: Array, run: Run):
        self._check()
        channels = u.shape[-1]
        modes = self.state_size // 2 if self.conj_sym else self.state_size
        options = {"conj_sym": self.conj_sym, "c_init": self.c_init}

        # The two planes of a complex matrix come from one draw, so all of it is drawn once, where it is first needed.
        @functools.cache
        def start():
            return initialization.s5_start(new_key(), self.state_size, channels, self.blocks, **options)

        @functools.cache
        def backward_start():
            return initialization.s5_output(new_key(), self.state_size, channels, self.blocks, **options)

        def new_key():
            # Given parameters, Flax still asks their starts for shapes.
            return self.make_rng("params") if self.is_initializing() else jax.random.key(0)

        def param(name, init, shape, axes):
            return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        def started(name, shape, axes):
            return param(name, lambda *_: getattr(start(), name), shape, axes)

        vector = ((modes,), ("modes",))
        b, c = ((modes, channels), ("modes", "channels")), ((channels, modes), ("channels", "modes"))
        discretize = functools.partial(
            multi_input.s5,
            lambda_re=started("lambda_re", *vector),
            lambda_im=started("lambda_im", *vector),
            b_re=started("b_re", *b),
            b_im=started("b_im", *b),
            log_step=param(
                "log_step",
                lambda key, shape, dtype: initialization.log_uniform(key, shape, self.step_min, self.step_max, dtype),
                *vector,
            ),
            d=param("d", nn.initializers.normal(1.0), (channels,), ("channels",)),
            discretization=self.discretization,
            conjugate_pairs=self.conj_sym,
            clip_eigs=self.clip_eigs,
            step_rescale=self.step_rescale,
        )
        system = discretize(c_re=started("c_re", *c), c_im=started("c_im", *c))
        core, cut_modes = split_modes(multi_input, modes)
        axes = CoreAxes(_system_axes(system, cut_modes), ("batch", None, None), (("batch", cut_modes),) * 2)
        if not self.bidirectional:
            return run_state_space(self, core, system, u, axes, run)
        backward = discretize(
            c_re=param("c_backward_re", lambda *_: backward_start()[0], *c),
            c_im=param("c_backward_im", lambda *_: backward_start()[1], *c),
        )
        y = run_bidirectional(core, system, backward, u, axes, run, future_has_present=True)
        return y, None

    def _check(self):
        require_positive("S5StateSpace", state_size=self.state_size, blocks=self.blocks)
        if self.state_size % (2 * self.blocks):
            raise UserError(
                f"S5StateSpace.state_size = {self.state_size} with blocks = {self.blocks}: the modes of a block are "
                "conjugate pairs, so state_size must be a multiple of 2 * blocks."
            )
        require_choice("S5StateSpace.discretization", self.discretization, multi_input.DISCRETIZATIONS)
        require_choice("S5StateSpace.c_init", self.c_init, initialization.S5_OUTPUTS)
        require_steps("S5StateSpace", self.step_min, self.step_max)
        if not self.step_rescale > 0:
            raise UserError(f"S5StateSpace.step_rescale = {self.step_rescale}; it must be positive.")


def _system_axes(system: multi_input.MultiInput, modes: str | None) -> multi_input.MultiInput:
    of_inputs, of_outputs, of_modes = (modes, None), (None, modes), (modes,)
    return multi_input.MultiInput(
        pole=jax.tree.map(lambda _: of_modes, system.pole),
        b_re=of_inputs,
        b_im=of_inputs,
        c_re=of_outputs,
        c_im=of_outputs,
        d=(None,),
        whole_turns=None if system.whole_turns is None else of_modes,
    )


class S5(S5Settings):
    """The S5 mixer; see the module docstring, and `S5Settings` for the settings of its state space.

    Attributes:
      output: one of OUTPUTS.
      activation: the GELU; the paper's models use the tanh approximation.
      dropout_rate: see the module docstring.
      feed_forward: whether a feed-forward block follows.
      dtype: of projections and activations; the state space runs in float32.
    """

    output: str = "half_glu1"
    activation: str = "gelu_tanh"
    dropout_rate: float = 0.0
    feed_forward: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        require_choice("S5.output", self.output, OUTPUTS)
        y, state = S5StateSpace(**settings_of(self, S5Settings), name="ssm")(
            constrain(x, ("batch", "length", None)), run
        )
        y = y.astype(self.dtype)
        dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=not enable_dropout)

        def project(name):
            return Dense(x.shape[-1], ("embed", "mlp"), use_bias=True, dtype=self.dtype, name=name)(g)

        g = dropout(ACTIVATIONS[self.activation](y))
        if self.output == "gelu":
            out = g
        else:
            value = {"half_glu1": lambda: g, "half_glu2": lambda: y, "full_glu": lambda: project("out")}[self.output]()
            out = dropout(gated(value, project("gate")))
        return (out, state) if return_state else out
