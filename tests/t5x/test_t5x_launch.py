"""T5X's own program, started by the wrapper on 8 virtual devices, ends and goes on from its checkpoint."""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import restoring

pytestmark = [pytest.mark.t5x, pytest.mark.slow]

SETTINGS = {
    "MIXTURE_OR_TASK_NAME": '"embedded_books_code_math"',
    "TASK_FEATURE_LENGTHS": "{'targets': 32}",
    "TRAIN_STEPS": 4,
    "WARMUP_STEPS": 1,
    "BATCH_SIZE": 8,
    "train.eval_period": 2,
    "train.train_eval_dataset_cfg": None,
    "utils.SaveCheckpointConfig.period": 2,
    "mesh.MeshConfig.model": 2,
    "mesh.MeshConfig.fsdp": 2,
    "decoder.Decoder.embed_dim": 16,
    "decoder.Decoder.num_layers": 2,
    "gss.GSS.state_size": 4,
}


def train(model_dir):
    bindings = {"MODEL_DIR": f'"{model_dir}"'} | SETTINGS
    done = subprocess.run(
        [
            *(sys.executable, "-m", "t5x_ssm.integrations.t5x", "train"),
            *("--gin_file=t5x/models/gss_tiny.gin", "--gin_file=t5x/pretrain.gin"),
            *(f"--gin.{name}={value}" for name, value in bindings.items()),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def parameters(checkpoint):
    """The parameters of a checkpoint on one device."""
    net = Decoder(259, 16, "gss", 2, {"gss": functools.partial(GSS, state_size=4)})
    tokens = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), tokens, tokens, enable_dropout=False)["params"])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return restoring.restore_parameters(checkpoint, placed).params


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    train(tmp_path / "whole")
    # What a run leaves that was killed after its save of step 2.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint_4")
    train(tmp_path / "cut")
    early, whole, resumed = (
        jax.tree.leaves(parameters(tmp_path / name))
        for name in ("whole/checkpoint_2", "whole/checkpoint_4", "cut/checkpoint_4")
    )
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != b) for a, b in zip(whole, early, strict=True))
