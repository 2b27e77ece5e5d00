"""From what a program computes, moves and sends to how long a chip needs at least: a prediction, not a measurement.

Two step times are given. `overlapped` is the longest of computing, memory, interconnect and network, as if each hid behind the
others; `in_turn` is their sum, as if nothing did. What runs lies between them, or above where kernels fall short of the peaks.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from launch.chips import Chip
from launch.costs import BETWEEN_SLICES, Costs
from t5x_ssm.errors import UserError
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models import pattern as pattern_language
from t5x_ssm.models.encoder_decoder import EncoderDecoder
from t5x_ssm.models.mixers import DEFAULT_MIXERS

# An all-reduce is a reduce-scatter and an all-gather.
TIMES_SENT = {"all-reduce": 2}


def step_seconds(costs: Costs, chip: Chip) -> dict[str, float]:
    """Seconds of one step by what bounds it, `overlapped`, and `in_turn`.

    Collectives count as rings that use all links of a chip, and between slices its whole share of the network.

    Raises:
      UserError: several slices of a chip whose share of the network is not known.
    """
    sent = {True: 0.0, False: 0.0}
    for c in costs.collectives:
        if c.group_size:
            ring = (c.group_size - 1) / c.group_size
            sent[c.axes == BETWEEN_SLICES] += TIMES_SENT.get(c.kind, 1) * c.bytes * ring
    if sent[True] and chip.network_bandwidth is None:
        raise UserError("--slices: how fast slices of these chips are joined is not published; plan one slice.")
    parts = {
        "compute": costs.passes_flops / chip.flops,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sent[False] / chip.ici_bandwidth,
        "network": sent[True] / chip.network_bandwidth if sent[True] else 0.0,
    }
    return {**parts, "overlapped": max(parts.values()), "in_turn": sum(parts.values())}


def model_flops(network: Any, params: Any, batch_shapes: Mapping[str, Any]) -> float:
    """FLOPs of a step that the model needs, without rematerialization: 6 x parameters x tokens, and attention.

    Attention takes 12 x heads x head width for each pair of a query and a key that it sees (PaLM, Chowdhery et al. 2022,
    appendix B). What state spaces compute between their projections is not counted: it is the price of mixing.

    Args:
      network: a decoder or an encoder-decoder.
      params: its parameters or their shapes; a tied embedding counts, as the output projection.
      batch_shapes: arrays or shapes [batch, length] of a batch by their names.
    """
    shape = batch_shapes["decoder_input_tokens"].shape
    size = lambda leaf: float(math.prod(leaf.shape))
    if not isinstance(network, EncoderDecoder):
        width = _attention_widths(network.pattern, network.num_layers, network.mixers, network.embed_dim, shape[1])
        return math.prod(shape) * (6 * sum(map(size, jax.tree.leaves(params))) + 12 * width)
    source = batch_shapes["encoder_input_tokens"].shape
    by_side = {"encoder": 0.0, "decoder": 0.0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        # The encoder's tokens pass its own parameters, and the keys and values that the decoder's layers make of them.
        of_encoder = names[0].startswith("encoder") or ("cross" in names and {"key", "value"} & set(names))
        by_side["encoder" if of_encoder else "decoder"] += size(leaf)
    total = 0.0
    for side, (batch, length) in (("encoder", source), ("decoder", shape)):
        pattern, layers, mixers = (getattr(network, f"{side}_{name}") for name in ("pattern", "layers", "mixers"))
        width = _attention_widths(pattern, layers, mixers, network.embed_dim, length)
        if side == "decoder":
            depth = len(pattern_language.parse(pattern, layers, {**DEFAULT_MIXERS, **mixers}))
            width += depth * _attention_width(network.cross, network.embed_dim, source[1])
        total += batch * length * (6 * by_side[side] + 12 * width)
    return total


def _attention_widths(pattern: str, depth: int | None, mixers: Mapping[str, Any], embed_dim: int, length: int) -> float:
    """`_attention_width` of all layers of a stack."""
    mixers = {**DEFAULT_MIXERS, **mixers}
    return sum(
        _attention_width(mixers[layer], embed_dim, length) for layer in pattern_language.parse(pattern, depth, mixers)
    )


def _attention_width(mixer: Any, embed_dim: int, length: int) -> float:
    """Width of all heads times the mean number of keys, of `length`, that a query sees; 0 for a mixer without attention."""
    module = mixer(parent=None)
    if isinstance(module, Spade):
        return _attention_width(module.attention, embed_dim, length)
    if not isinstance(module, Attention):
        return 0.0
    width = embed_dim if module.head_dim is None else module.num_heads * module.head_dim
    window = length if module.span == "full" else min(module.window, length)
    if module.span == "sliding":
        before = window - window * (window - 1) / (2 * length)  # itself included
        return width * (before if module.causal else 2 * before - 1)
    return width * ((window + 1) / 2 if module.causal else window)
