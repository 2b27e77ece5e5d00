"""The gated operator of S5's language model: Hyena's recurrence of order 2 with a state space for the long filter.

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models" (2023), definition 3.1, with the filter of
Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling" (2023). At order 2 it is H3 with one
filter that mixes the channels in the place of one filter a channel:

    [G, K, V] = shortconv(X W + b) + b'       3 D channels, each its own causal filter of 3 taps
    Y = SSM(dropout(V * K)) + D (V * K)       [L, D]   S5
    O = (Y * G) W' + b''                      [L, D]

X is the normalized input; the residual is added outside and a feed-forward block follows.
Collectives under model sharding: an all-gather of V * K before the state space, whose output is added up where it is cut by modes
(see `layers.s5`), and an all-reduce of the output projection; none inside the short convolution.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from t5x_ssm.layers.activations import ACTIVATIONS
from t5x_ssm.layers.basic import Dense, Initializer, default_kernel_init
from t5x_ssm.layers.mixer import CoreAxes, Run, run_state_space
from t5x_ssm.layers.s5 import S5StateSpace
from t5x_ssm.layers.settings import require_positive
from t5x_ssm.parallel.shard import constrain
from t5x_ssm.ssm import shift

Array = jax.Array

BRANCHES = ("gate", "key", "value")


class ShortConvolution(nn.Module):
    """A causal filter of a few taps and a bias for each channel: u [B, L, H] and run to (y, state).

    Its state is its last inputs, which is the state of a shift system.

    Attributes:
      width: number of taps.
    """

    width: int = 3

    @nn.compact
    def __call__(self, u: Array, run: Run):
        channels = u.shape[-1]
        # As a layer of convolution starts: every output has `width` inputs.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
        taps = partitioning.param_with_axes(
            "kernel", init, (channels, self.width), jnp.float32, axes=("channels", "modes")
        )
        bias = partitioning.param_with_axes("bias", nn.initializers.zeros, (channels,), jnp.float32, axes=("channels",))
        axes = CoreAxes(
            shift.Shift(taps=("channels", None), d=("channels",)),
            ("batch", None, "channels"),
            ("batch", "channels", None),
        )
        y, state = run_state_space(self, shift, shift.Shift(taps, jnp.zeros_like(bias)), u, axes, run)
        return y + bias.astype(y.dtype), state


class GatedOperator(nn.Module):
    """The gated operator as a mixer; see the module docstring.

    Attributes:
      short_filter_width: taps of the short convolution; 1 leaves only a factor a channel.
      state_space: builds the long filter, called like `S5StateSpace`; that of the published model when None.
      filter_activation: of the filter's output, as in the published model.
      dropout_rate: of what enters the filter.
      kernel_init: of the projection in.
      out_kernel_init: of the projection out.
      feed_forward: whether a feed-forward block follows.
      dtype: of projections and activations; the state space runs in float32.
    """

    short_filter_width: int = 3
    state_space: Any = functools.partial(
        S5StateSpace, state_size=128, blocks=32, conj_sym=False, clip_eigs=True, c_init="complex_normal"
    )
    filter_activation: str = "gelu"
    dropout_rate: float = 0.0
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer = default_kernel_init
    feed_forward: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        require_positive("GatedOperator", short_filter_width=self.short_filter_width)
        width = x.shape[-1]
        *short_states, long_state = run.initial_state or (None,) * (len(BRANCHES) + 1)

        def branch(name, state):
            u = Dense(width, ("embed", "channels"), True, self.dtype, self.kernel_init, name=name)(x)
            u = constrain(u, ("batch", "length", "channels"))
            short = ShortConvolution(self.short_filter_width, name=f"{name}_short")
            return short(u, dataclasses.replace(run, initial_state=state))

        branches = [branch(name, state) for name, state in zip(BRANCHES, short_states, strict=True)]
        (gate, key, value), short_states = zip(*branches, strict=True)
        product = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(value * key, deterministic=not enable_dropout)
        product = constrain(product, ("batch", "length", None))
        y, state = self.state_space(name="ssm")(product, dataclasses.replace(run, initial_state=long_state))
        y = ACTIVATIONS[self.filter_activation](y.astype(self.dtype)) * gate
        y = constrain(y, ("batch", "length", "channels"))
        out = Dense(width, ("channels", "embed"), True, self.dtype, self.out_kernel_init, name="out")(y)
        return (out, (*short_states, state)) if return_state else out
