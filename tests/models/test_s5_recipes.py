"""S5's seven published recipes: parameter counts as derived from the authors' settings, rates and decay of every leaf."""

import functools
import pathlib
import re

import gin
import jax
import jax.numpy as jnp
import pytest

from t5x_ssm import config
from t5x_ssm.models import classifier
from t5x_ssm.training import optimizers

GIN = pathlib.Path(__file__).resolve().parents[2] / "gin"
# Parameters to three digits; the peak rate of Λ, which never decays; rate and decay of B, C and Δ; the rate elsewhere.
RECIPES = {
    "listops": (188e3, 1e-3, (3e-3, True), (3e-3, True), (1e-3, False), 3e-3),
    "text": (1.32e6, 1e-3, (1e-3, False), (4e-3, True), (4e-3, True), 4e-3),
    "retrieval": (0.772e6, 1e-3, (1e-3, False), (2e-3, True), (2e-3, True), 2e-3),
    "image": (5.13e6, 1e-3, (4.5e-3, True), (4.5e-3, True), (1e-3, False), 4.5e-3),
    "pathfinder": (1.11e6, 9e-4, (9e-4, False), (4.5e-3, True), (9e-4, False), 4.5e-3),
    "pathx": (0.694e6, 6e-4, (6e-4, True), (1.8e-3, True), (6e-4, False), 1.8e-3),
    "sc35": (284e3, 2e-3, (2e-3, False), (2e-3, False), (2e-3, False), 8e-3),
}


@functools.cache
def shapes(name):
    """Path to leaf of the recipe's parameters, for a short input."""
    config.load([f"networks/s5_{name}.gin"])
    retrieval, tokens = name == "retrieval", name in ("listops", "text", "retrieval")
    kind = classifier.RetrievalClassifier if retrieval else classifier.Classifier
    network = gin.get_configurable(kind)()
    shape = (1, 2, 8) if retrieval else (1, 8) if tokens else (1, 8, 1)
    inputs = jnp.ones(shape, jnp.int32 if tokens else jnp.float32)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), inputs, enable_dropout=False))["params"]


@pytest.mark.parametrize("name", RECIPES)
def test_parameters(name):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(name)))
    assert f"{count:.3g}" == f"{RECIPES[name][0]:.3g}"
    assert f"{count:,}" in (GIN / "networks" / f"s5_{name}.gin").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_rates_and_decay(name):
    _, poles, b, c, step, rest = RECIPES[name]
    config.load([f"models/s5_{name}.gin"], ["TRAIN_STEPS = 100", "WARMUP_STEPS = 10"])
    optimizer = gin.get_configurable(optimizers.adamw)()
    groups = {group.name: group for group in optimizer.groups}
    labels = optimizers.group_labels(shapes(name), optimizer.groups)
    expected = {r"/ssm/b_re": b, r"/ssm/c_re": c, r"/ssm/log_step": step, r"gate/kernel": (rest, True)}
    expected |= {r"mixer_norm/scale": (rest, False), r"gate/bias": (rest, False), r"/ssm/lambda_re": (poles, False)}
    for pattern, want in expected.items():
        (label,) = {
            label
            for path, label in jax.tree_util.tree_leaves_with_path(labels)
            if re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))
        }
        # At update 10 of 100 the warm-up of ten ends.
        rate = float(optimizer.schedules[label](9))
        decayed = (groups[label].weight_decay is None and optimizer.weight_decay > 0) or bool(
            groups[label].weight_decay
        )
        assert rate == pytest.approx(want[0]) and decayed == want[1], pattern
