"""The gin files of published networks have the papers' parameter counts; shapes only, no arrays."""

import pathlib
import re

import gin
import jax
import jax.numpy as jnp
import pytest

from t5x_ssm import config
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.encoder_decoder import EncoderDecoder

NETWORKS = pathlib.Path(__file__).resolve().parents[2] / "gin" / "networks"

# Total besides norms and relative biases at a 32,000 vocabulary, tied; and what those add.
GSS = {
    "gss_192m": (192_172_032, 43_008),
    "gss_352m": (351_576_064, 83_968),
    "gss_hybrid_203m": (202_652_672, 50_176),
    "gss_hybrid_373m": (372_537_344, 98_304),
}
# Everything. H3's are the published ones; of the others the papers give no exact count, and the sums below are the check.
TOTALS = {
    "h3_125m": 126_139_392,
    "h3_355m": 361_058_304,
    "h3_1_3b": 1_326_096_384,
    "h3_2_7b": 2_671_134_720,
    "s5_lm_125m": 128_496_384,
    "spade_wt103": 478_012_672,
    "spade_base": 239_147_520,
    "spade_large": 759_980_032,
    "transformer_125m": 123_658_752,
    "transformer_192m": 193_254_400,
    "s4d_125m": 123_076_608,
    "s4d_192m": 192_514_048,
    "dss_125m": 123_677_952,
    "dss_192m": 191_741_440,
}


def parameters(name):
    """Path to size of a network's parameters."""
    config.load([f"networks/{name}.gin"])
    kind = EncoderDecoder if re.match("spade_(base|large)", name) else Decoder
    tokens = jnp.ones((1, 8), jnp.int32)
    network = gin.get_configurable(kind)()
    inputs = [tokens] * (3 if kind is EncoderDecoder else 2)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs, enable_dropout=False))["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize("name", GSS)
def test_gss_sizes_are_the_papers(name):
    counts = {True: 0, False: 0}
    for path, size in parameters(name).items():
        counts[bool(re.search("norm|relative_bias", path))] += size
    assert (counts[False], counts[True]) == GSS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_as_the_file_says(name):
    assert sum(parameters(name).values()) == TOTALS[name]
    assert f"{TOTALS[name]:,}" in (NETWORKS / f"{name}.gin").read_text()


def test_spades_language_model_adds_up():
    """Width 1024, feed-forward 4096 with biases, 16 layers; S4 of 32 modes a channel; a vocabulary of 267,744 words."""
    d, f, modes = 1024, 4096, 32
    layer = 4 * d * d + 2 * d * f + f + d + 2 * (2 * d)
    s4 = d * (8 * modes + 2)  # A, P, B and C, real and imaginary, Δ and D
    combine = 2 * d * d + d + 2 * (2 * d)
    assert TOTALS["spade_wt103"] == 267_744 * d + 16 * layer + s4 + combine + 8 * 32 + 2 * d


def test_baselines_are_as_large_as_what_they_are_held_against():
    gss = sum(GSS["gss_192m"])
    for name in ("transformer_192m", "s4d_192m", "dss_192m"):
        assert abs(TOTALS[name] / gss - 1) < 0.006, name
    for name in ("s4d_125m", "dss_125m"):
        assert abs(TOTALS[name] / TOTALS["transformer_125m"] - 1) < 0.006, name
