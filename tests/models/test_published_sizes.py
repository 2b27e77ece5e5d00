"""The gin files of published networks have the papers' parameter counts; shapes only, no arrays."""

import re

import gin
import jax
import jax.numpy as jnp
import pytest

from t5x_ssm import config
from t5x_ssm.models.decoder import Decoder

# Total besides norms and relative biases at a 32,000 vocabulary, tied; and what those add.
GSS = {
    "gss_192m": (192_172_032, 43_008),
    "gss_352m": (351_576_064, 83_968),
    "gss_hybrid_203m": (202_652_672, 50_176),
    "gss_hybrid_373m": (372_537_344, 98_304),
}


@pytest.mark.parametrize("name", GSS)
def test_gss_sizes_are_the_papers(name):
    config.load([f"networks/{name}.gin"])
    network = gin.get_configurable(Decoder)()
    tokens = jnp.ones((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens, tokens, enable_dropout=False))["params"]
    counts = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        extra = re.search("norm|relative_bias", jax.tree_util.keystr(path, simple=True, separator="/"))
        counts[bool(extra)] += leaf.size
    assert (counts[False], counts[True]) == GSS[name]
