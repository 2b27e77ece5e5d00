"""From what a program computes, moves and sends to how long a chip needs at least: a prediction, not a measurement.

Two step times are given. `overlapped` is the longest of computing, memory and interconnect, as if each hid behind the others;
`in_turn` is their sum, as if nothing did. What runs lies between them, or above where kernels fall short of the peaks.
"""

from typing import Any

from launch.chips import Chip
from launch.hlo import Costs
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models import pattern as pattern_language
from t5x_ssm.models.mixers import DEFAULT_MIXERS

# An all-reduce is a reduce-scatter and an all-gather.
TIMES_SENT = {"all-reduce": 2}


def step_seconds(costs: Costs, chip: Chip) -> dict[str, float]:
    """Seconds of one step by what bounds it, `overlapped`, and `in_turn`.

    Collectives count as rings that use all links of a chip; those between slices count as if they had the same links.
    """
    sent = sum(
        TIMES_SENT.get(c.kind, 1) * c.bytes * (c.group_size - 1) / c.group_size
        for c in costs.collectives
        if c.group_size
    )
    parts = {
        "compute": costs.passes_flops / chip.flops,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sent / chip.ici_bandwidth,
    }
    return {**parts, "overlapped": max(parts.values()), "in_turn": sum(parts.values())}


def model_flops(network: Any, parameters: int, batch_shape: tuple[int, int]) -> float:
    """FLOPs of a step that the model needs, without rematerialization: 6 x parameters x tokens, and attention.

    Attention takes 12 x heads x head width for each pair of a query and a key that it sees (PaLM, Chowdhery et al. 2022,
    appendix B). What state spaces compute between their projections is not counted: it is the price of mixing.

    Args:
      network: a decoder.
      parameters: their number, embedding included; tied, it is also the output projection.
      batch_shape: (batch, length).
    """
    batch, length = batch_shape
    mixers = {**DEFAULT_MIXERS, **network.mixers}
    layers = pattern_language.parse(network.pattern, network.num_layers, mixers)
    pairs = sum(_attention_width(mixers[layer], network.embed_dim, length) for layer in layers)
    return batch * length * (6.0 * parameters + 12.0 * pairs)


def _attention_width(mixer: Any, embed_dim: int, length: int) -> float:
    """Width of all heads times the mean number of keys that a query sees; 0 for a mixer without attention."""
    module = mixer(parent=None)
    if isinstance(module, Spade):
        return _attention_width(module.attention, embed_dim, length)
    if not isinstance(module, Attention):
        return 0.0
    width = embed_dim if module.head_dim is None else module.num_heads * module.head_dim
    window = length if module.span == "full" else min(module.window, length)
    if module.span == "sliding":
        seen = window - window * (window - 1) / (2 * length)
    else:
        seen = (window + 1) / 2
    return width * seen
