"""A stack of layers from a pattern: residual blocks, scanned over the repeating period, with rematerialization."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from flax.struct import dataclass as pytree

from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import ENCODED
from t5x_ssm.layers.basic import LayerNorm
from t5x_ssm.layers.batch_norm import BatchNorm
from t5x_ssm.models import pattern as pattern_language
from t5x_ssm.parallel.shard import constrain

Array = jax.Array
Factory = Callable[..., nn.Module]

# What the backward pass may keep of a layer's forward pass.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@pytree
class Context:
    """Arrays that every layer of a stack sees beside the activations; see `layers.mixer.Run`."""

    segment_ids: Array | None = None
    positions: Array | None = None
    padding_mask: Array | None = None
    encoded: Array | None = None
    encoded_mask: Array | None = None
    encoded_segment_ids: Array | None = None
    bias_table: Array | None = None
    prefill_lengths: Array | None = None


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a stack is run; static, because each mode is another program."""

    enable_dropout: bool = True
    decode: bool = False
    prefill: bool = False


def refuse_batch_norm(norm: Factory) -> None:
    """Raises UserError where a network that generates is to have batch norms: their statistics contain the future."""
    if isinstance(norm(parent=None), BatchNorm):
        raise UserError("norm = BatchNorm sees later tokens: it is for classifiers; choose LayerNorm or RMSNorm.")


def apply_norm(norm: nn.Module, mask: Array | None, training: bool) -> Callable[[Array], Array]:
    """The norm as a function of the activations alone; a batch norm also sees what is real and whether this is training."""
    return functools.partial(norm, mask=mask, training=training) if isinstance(norm, BatchNorm) else norm


class Block(nn.Module):
    """One layer: norm, mixer, residual; then the same for cross-attention, and for the feed-forward block.

    Attributes:
      mixer: builds the mixer; its field `feed_forward` says whether a feed-forward block follows.
      mlp: builds the feed-forward block.
      cross: builds the cross-attention of an encoder-decoder's decoder; None where there is no encoder.
      norm: builds a norm.
      pre_norm: normalize the input of each sublayer; otherwise the sum after it (post-norm).
      dropout_rate: on each sublayer's output before it joins the residual stream.
    """

    mixer: Factory
    mlp: Factory | None
    mode: Mode
    cross: Factory | None = None
    norm: Factory = LayerNorm
    pre_norm: bool = True
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        mode = self.mode
        dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

        def sublayer(x, name, function):
            norm = self.norm(dtype=self.dtype, name=f"{name}_norm")
            norm = apply_norm(norm, context.padding_mask, mode.enable_dropout)
            y = function(norm(x) if self.pre_norm else x)
            x = x + dropout(y, deterministic=not mode.enable_dropout)
            x = x if self.pre_norm else norm(x)
            return constrain(x, ("batch", "length", "embed"))

        mixer = self.mixer(dtype=self.dtype, name="mixer")
        arrays = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
        call = arrays | dataclasses.asdict(mode)
        x = sublayer(x, "mixer", lambda x: mixer(x, **call))
        if self.cross is not None:
            cross = self.cross(dtype=self.dtype, name="cross")
            x = sublayer(x, "cross", lambda x: cross(x, **call))
        if mixer.feed_forward:
            if self.mlp is None:
                raise UserError(
                    f"{type(mixer).__name__} is followed by a feed-forward block, but the network has no mlp."
                )
            mlp = self.mlp(dtype=self.dtype, name="mlp")
            x = sublayer(x, "mlp", lambda x: mlp(x, enable_dropout=mode.enable_dropout))
        return x


class Period(nn.Module):
    """One repetition of a segment: its blocks in order. The body of a scan."""

    blocks: tuple[Factory, ...]

    @nn.compact
    def __call__(self, x: Array, context: Context):
        for i, block in enumerate(self.blocks):
            x = block(name=f"block_{i}")(x, context)
        return x, None


# Settings of a network that are its stacks' as well, by the same names.
SHARED_SETTINGS = ("mlp", "norm", "pre_norm", "dropout_rate", "remat_policy", "scan_layers", "dtype")


def shared_settings(network: nn.Module) -> dict[str, Any]:
    """What a network passes on to each `Stack` that it is made of."""
    return {name: getattr(network, name) for name in SHARED_SETTINGS}


class Stack(nn.Module):
    """All layers of an encoder or decoder.

    Parameters are under `segment_<i>/block_<j>`; with `scan_layers` every leaf, of parameters and of the cache, has a
    leading axis over the repetitions of its segment, segments of a single repetition included: T5X shifts the batch axis of
    all cache leaves alike.

    Attributes:
      pattern: see `models.pattern`.
      num_layers: depth; the pattern's length when None.
      mixers: from the pattern's names to mixer factories.
      mlp, cross, norm, pre_norm, dropout_rate: see `Block`.
      remat_policy: a key of `REMAT_POLICIES`.
      scan_layers: compile each segment once and scan; otherwise unroll (`segment_<i>_<repetition>`).
    """

    pattern: str
    mixers: Mapping[str, Factory]
    num_layers: int | None = None
    mlp: Factory | None = None
    cross: Factory | None = None
    norm: Factory = LayerNorm
    pre_norm: bool = True
    dropout_rate: float = 0.0
    remat_policy: str = "none"
    scan_layers: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Context, mode: Mode) -> Array:
        if self.remat_policy not in REMAT_POLICIES:
            raise UserError(f"remat_policy = {self.remat_policy!r}; it is one of {', '.join(REMAT_POLICIES)}.")
        layers = pattern_language.parse(self.pattern, self.num_layers, self.mixers)

        def block(kind):
            def build(name):
                return Block(
                    mixer=self.mixers[kind],
                    mlp=self.mlp,
                    mode=mode,
                    cross=self.cross,
                    norm=self.norm,
                    pre_norm=self.pre_norm,
                    dropout_rate=self.dropout_rate,
                    dtype=self.dtype,
                    name=name,
                )

            return build

        body = Period
        if self.remat_policy != "none" and not (mode.decode or mode.prefill):
            body = partitioning.remat(
                Period, prevent_cse=not self.scan_layers, policy=REMAT_POLICIES[self.remat_policy]
            )
        for i, segment in enumerate(pattern_language.segments(layers)):
            blocks = tuple(block(kind) for kind in segment.period)
            if self.scan_layers:
                scanned = partitioning.scan_with_axes(
                    body,
                    variable_axes={"params": 0, "cache": 0, "batch_stats": 0, ENCODED: 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=nn.broadcast,
                    length=segment.repeats,
                    axis_name="layers",
                )
                x, _ = scanned(blocks, name=f"segment_{i}")(x, context)
            else:
                for repetition in range(segment.repeats):
                    x, _ = body(blocks, name=f"segment_{i}_{repetition}")(x, context)
        return x
