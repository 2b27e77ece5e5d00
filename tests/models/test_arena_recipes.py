"""The arena's recipes as gin files: complete, with the published epochs as steps, and of nearly equal size side by side."""

import functools
import math

import gin
import jax
import numpy as np
import pytest

from t5x_ssm import config, train
from t5x_ssm.data.feed import DatasetConfig
from t5x_ssm.models.objectives import Classification
from t5x_ssm.training.sharded_state import split_variables

# Of the authors' experiments: training examples, batch, epochs, epochs of warm-up, length, classes, ids (None: numbers).
PUBLISHED = {
    "listops": (96_000, 50, 40, 1, 2048, 10, 18),
    "text": (25_000, 50, 35, 0, 4096, 2, 259),
    "retrieval": (147_086, 32, 20, 1, 4000, 2, 259),
    "image": (45_000, 50, 250, 1, 1024, 10, None),
    "pathfinder": (160_000, 64, 200, 1, 1024, 2, None),
    "pathx": (160_000, 32, 75, 1, 16384, 2, None),
    "sc35": (84_843, 16, 40, 1, 16000, 35, None),
}
RECIPES = [f"s5_{task}" for task in PUBLISHED] + [
    f"{system}_{task}" for system in ("s4d", "dss", "spade", "attention") for task in ("listops", "pathfinder")
]


def macro(name):
    return gin.query_parameter(f"{name}/gin.macro.value")


@functools.cache
def sizes(recipe):
    """Loads a recipe as the command does; returns its macros and data settings, and its parameters and mutables as shapes."""
    config.load([f"models/{recipe}.gin"], ["MODEL_DIR=/nowhere"])
    config.check(train.train)
    model = gin.get_configurable(Classification)()
    with gin.config_scope("train"):
        data = gin.get_configurable(DatasetConfig)()
    macros = {name: macro(name) for name in ("TRAIN_STEPS", "WARMUP_STEPS", "EVAL_PERIOD")}
    shapes = {name: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype) for name, s in train.batch_shapes(data).items()}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
    params, mutables = split_variables(variables)
    sums = jax.eval_shape(lambda p, m, b: model.mutable_loss_sums(p, m, b)[1], params, mutables, shapes)
    assert set(sums) == {"loss", "correct", "weights", "tokens"}
    return macros, data, params, mutables, model.network


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_and_data_are_those_of_the_recipe(recipe):
    macros, data, _, mutables, network = sizes(recipe)
    examples, batch, epochs, warmup, length, classes, ids = PUBLISHED[recipe.partition("_")[2]]
    an_epoch = examples // batch
    assert macros == {
        "TRAIN_STEPS": epochs * an_epoch,
        "WARMUP_STEPS": warmup * an_epoch,
        "EVAL_PERIOD": an_epoch,
    }
    assert (data.batch_size, data.task_feature_lengths["inputs"]) == (batch, length)
    assert (network.num_classes, network.vocab_size) == (classes, ids)
    # Batch norms in state-space classifiers, layer norms beside attention.
    assert bool(mutables) == recipe.startswith(("s5_", "s4d_", "dss_"))


@pytest.mark.parametrize("task", ["listops", "pathfinder"])
def test_systems_side_by_side_are_of_the_same_order(task):
    counts = {
        system: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(sizes(f"{system}_{task}")[2]))
        for system in ("s5", "s4d", "dss", "spade", "attention")
    }
    assert max(counts.values()) < 8 * min(counts.values()), counts


@pytest.mark.parametrize(("task", "mean", "deviation"), [("image", 122.6, 61.0), ("pathfinder", 127.5, 127.5)])
def test_pixels_become_features_of_the_published_scale(task, mean, deviation):
    config.load([f"models/s5_{task}.gin"], ["MODEL_DIR=/nowhere"])
    model = gin.get_configurable(Classification)()
    pixels = np.array([[0, 100, 255]])
    np.testing.assert_allclose(model._inputs(pixels)[..., 0], (pixels - mean) / deviation, rtol=1e-5)
