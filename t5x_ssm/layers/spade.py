"""SPADE's global layer: a state space beside local attention, at the bottom of a stack of local attention.

Zuo, Liu, Jiao, Charles, Manavoglu, Zhao, Gao, "Efficient Long Sequence Modeling via State Space Augmented Transformer"
(2022). The state space carries what is beyond the attention's window into one layer; the layers above need no more.

    G = SSM(X)              [L, D]   raw: convolution and skip, no activation, no projection
    A = LocalAttention(X)   [L, D]
    concat:  O = [norm(G) ; norm(A)] W + b           the paper's choice
    add:     O = s norm(G) + (1 - s) norm(A)
    stack:   O = LocalAttention(SSM(X))

X is the normalized input and the residual is added outside; a feed-forward block follows. The paper's state space is S4 with
all its structure; any of the state-space modules of this folder can take its place.
Collectives under model sharding: an all-gather of G [B, L, D], and those of the attention.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import Dense, LayerNorm
from t5x_ssm.layers.mixer import Run
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.settings import require_choice
from t5x_ssm.parallel.shard import constrain

Array = jax.Array
COMBINATIONS = ("concat", "add", "stack")


class Spade(nn.Module):
    """The SPADE mixer; see the module docstring.

    Attributes:
      state_space: builds the state space, a module called with (u [B, L, D], run) such as `S4StateSpace`. In an encoder give
        it `bidirectional=True`.
      attention: builds the local attention.
      combine: one of `COMBINATIONS`.
      global_weight: s of "add".
      frozen: no gradient flows into the state space or through it, as in the paper's encoder-decoder pretraining. Its start
        is then its whole contribution; use a frozen parameter group too, or it decays.
      norm: builds the two inner norms.
    """

    state_space: Callable[..., nn.Module] = S4StateSpace
    attention: Callable[..., nn.Module] = Attention
    combine: str = "concat"
    global_weight: float = 0.5
    frozen: bool = False
    norm: Callable[..., nn.Module] = LayerNorm
    feed_forward: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, enable_dropout: bool = True, return_state: bool = False, **call):
        run = Run(enable_dropout=enable_dropout, return_state=return_state, **call)
        require_choice("Spade.combine", self.combine, COMBINATIONS)
        if return_state or run.initial_state is not None:
            raise UserError("Spade passes its state through the decode cache (prefill=True), not initial_state.")
        hold = jax.lax.stop_gradient if self.frozen else lambda y: y
        held = constrain(hold(x), ("batch", "length", "channels"))
        far = hold(self.state_space(name="ssm")(held, run)[0]).astype(self.dtype)
        far = constrain(far, ("batch", "length", None))
        attention = self.attention(dtype=self.dtype, name="attention")
        if self.combine == "stack":
            return attention(far, enable_dropout=enable_dropout, **call)
        near = attention(x, enable_dropout=enable_dropout, **call)
        far = self.norm(dtype=self.dtype, name="global_norm")(far)
        near = self.norm(dtype=self.dtype, name="local_norm")(near)
        if self.combine == "add":
            return self.global_weight * far + (1 - self.global_weight) * near
        both = jnp.concatenate([far, near], axis=-1)
        return Dense(x.shape[-1], (None, "embed"), use_bias=True, dtype=self.dtype, name="combine")(both)
