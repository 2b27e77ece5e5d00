"""The baseline of the layers' benchmark is the same function as what it is compared with."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import layers
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.dss import DSS
from t5x_ssm.models.decoder import Decoder


@pytest.mark.nightly
def test_the_kernel_written_out_gives_the_gradients_of_dss():
    dss = functools.partial(DSS, state_size=4, feed_forward=True)
    network = Decoder(16, 32, "dss", num_layers=2, mlp=functools.partial(MLP, hidden=8), mixers={"dss": dss})
    tokens = np.random.default_rng(0).integers(0, 16, (2, 24))
    program, params = layers.gradient_program(network, (tokens, tokens))
    with layers.nn.intercept_methods(layers.written_out):
        other, _ = layers.gradient_program(network, (tokens, tokens))
    assert other.as_text() != program.as_text()
    expected, found = program(params, tokens, tokens), other(params, tokens, tokens)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5 * np.abs(want).max())
