"""H3, the "hungry hungry hippos" layer.

Fu, Dao, Saab, Thomas, Rudra, Ré, "Hungry Hungry Hippos: Towards Language Modeling with State Space Models" (2023). Two state
spaces between multiplications, in the manner of linear attention: the first lets a key remember the tokens just before
it, the second carries key-value products over the whole text.

    q, k, v = X W_q + b_q, X W_k + b_k, X W_v + b_v        d channels each: d / d_h heads of d_h
    k̂ = shift SSM(k) + D_s k                               every channel its own filter of N taps
    S = diagonal SSM(k̂ vᵀ) + D k̂ vᵀ                        d_h x d_h entries a head, all through the head's one system
    O = (qᵀ S) W_o + b_o

With heads of one channel, S is d numbers and the layer is q * SSM(SSM(k) * v). A feed-forward block follows.
Collectives under model sharding: one all-reduce of the output projection; none inside.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.errors import UserError
from t5x_ssm.layers.basic import Dense, Initializer, default_kernel_init
from t5x_ssm.layers.gss import diagonal_axes
from t5x_ssm.layers.mixer import CoreAxes, Run, run_state_space
from t5x_ssm.layers.settings import require_choice, require_steps
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.ssm import diagonal, initialization, shift
from t5x_ssm.ssm.grouped import Grouped

Array = jax.Array

HEAD_LAYOUTS = ("head_major", "head_minor")


class ShiftStateSpace(nn.Module):
    """A causal filter a channel, as a state space that shifts its state: B starts as the first unit vector and is trained.

    Attributes:
      state_size: N, the number of taps.
    """

    state_size: int = 64

    @nn.compact
    def __call__(self, u: Array, run: Run):
        channels, taps = u.shape[-1], self.state_size

        def first_unit_vector(key, shape, dtype):
            del key
            return jnp.zeros(shape, dtype).at[..., 0].set(1)

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -(taps**-0.5), taps**-0.5)

        def param(name, init, shape):
            axes = ("channels", "modes")[: len(shape)]
            return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        system = shift.shift(
            b=param("b", first_unit_vector, (channels, taps)),
            c=param("c", uniform, (channels, taps)),
            d=param("d", nn.initializers.normal(1.0), (channels,)),
        )
        axes = CoreAxes(
            shift.Shift(taps=("channels", None), d=("channels",)),
            ("batch", None, "channels"),
            ("batch", "channels", None),
        )
        return run_state_space(self, shift, system, u, axes, run)


class HeadStateSpace(nn.Module):
    """H3's diagonal state space: S4D with one system a head, for all the entries of the head's key-value products.

    Attributes:
      state_size: N real dimensions, N/2 complex modes in conjugate pairs.
      discretization: "bilinear" as in the paper's models, or "zoh". Δ|A| reaches 10, where the two have little in common.
      step_min, step_max: between which Δ starts, log-uniformly.
    """

    state_size: int = 64
    discretization: str = "bilinear"
    step_min: float = 1e-3
    step_max: float = 1e-1

    @nn.compact
    def __call__(self, u: Array, run: Run):
        heads, size, modes = u.shape[-2], u.shape[-1], self.state_size // 2
        poles = initialization.lin_poles(modes)

        def param(name, init, shape=(heads, modes)):
            axes = ("channels", "modes")[: len(shape)]
            return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        def rows_of(values):
            return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), shape)

        # Real and imaginary part have a variance of 1/2 each.
        half = nn.initializers.normal(np.sqrt(0.5))
        system = diagonal.s4d(
            a_log_re=param("a_log_re", rows_of(np.log(-poles.real))),
            a_im=param("a_im", rows_of(poles.imag)),
            b_re=param("b_re", nn.initializers.ones),
            b_im=param("b_im", nn.initializers.zeros),
            c_re=param("c_re", half),
            c_im=param("c_im", half),
            log_step=param(
                "log_step",
                lambda key, shape, dtype: initialization.log_uniform(key, shape, self.step_min, self.step_max, dtype),
                (heads,),
            ),
            d=param("d", nn.initializers.normal(1.0), (heads,)),
            discretization=self.discretization,
        )
        axes = diagonal_axes(system)
        if size == 1:
            y, state = run_state_space(self, diagonal, system, u[..., 0], axes, run)
            return y[..., None], state
        grouped = CoreAxes(axes.system, ("batch", None, "channels", None), (("batch", None, "channels", None),) * 2)
        return run_state_space(self, Grouped(diagonal, size), system, u, grouped, run)


class H3(nn.Module):
    """The H3 mixer; see the module docstring.

    Attributes:
      head_dim: d_h, channels of a head.
      state_size: N of both state spaces.
      discretization, step_min, step_max: see `HeadStateSpace`.
      head_layout: where channel j of head h stands in the input of the output projection: "head_major" at h·d_h + j, as the
        heads are read from q, k and v; "head_minor" at j·H + h. Public weights with d_h > 1 were trained under one or the other.
      use_bias: biases on the four projections.
      dtype: of the projections; what lies between them is float32.
    """

    head_dim: int = 1
    state_size: int = 64
    discretization: str = "bilinear"
    step_min: float = 1e-3
    step_max: float = 1e-1
    head_layout: str = "head_major"
    use_bias: bool = True
    kernel_init: Initializer = default_kernel_init
    feed_forward: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        width, size = x.shape[-1], self.head_dim
        if size < 1 or width % size:
            raise UserError(f"H3.head_dim = {size} does not divide the width {width}.")
        if self.state_size < 2 or self.state_size % 2:
            raise UserError(f"H3.state_size = {self.state_size}; its modes are conjugate pairs: it must be even.")
        require_choice("H3.head_layout", self.head_layout, HEAD_LAYOUTS)
        require_choice("H3.discretization", self.discretization, diagonal.DISCRETIZATIONS)
        require_steps("H3", self.step_min, self.step_max)
        heads = width // size

        def project(name):
            y = Dense(width, ("embed", "channels"), self.use_bias, self.dtype, self.kernel_init, name=name)(x)
            return constrain(y, ("batch", "length", "channels"))

        q, k, v = project("query"), project("key"), project("value")
        states = run.initial_state or (None, None)
        of = lambda state: dataclasses.replace(run, initial_state=state)
        k, shift_state = ShiftStateSpace(self.state_size, name="shift_ssm")(k, of(states[0]))

        q, k, v = (
            y.reshape(*y.shape[:-1], heads, size).astype(jnp.promote_types(y.dtype, jnp.float32)) for y in (q, k, v)
        )
        products = (k[..., :, None] * v[..., None, :]).reshape(*k.shape[:-1], size * size)
        filtered, state = HeadStateSpace(
            self.state_size, self.discretization, self.step_min, self.step_max, name="ssm"
        )(products, of(states[1]))
        filtered = filtered.reshape(*k.shape, size)
        o = jnp.sum(q[..., None] * filtered, axis=-2)
        if self.head_layout == "head_minor":
            o = jnp.swapaxes(o, -1, -2)
        o = constrain(o.reshape(*x.shape).astype(self.dtype), ("batch", "length", "channels"))
        out = Dense(width, ("channels", "embed"), self.use_bias, self.dtype, self.kernel_init, name="out")(o)
        return (out, (shift_state, state)) if return_state else out
