"""T5X's own program, started by the wrapper on 8 virtual devices: killed and started again, and from a native run."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from both_engines import on_one_device, save_natively

from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import optimizers, restoring, schedules
from t5x_ssm.training.train_state import TrainState

pytestmark = [pytest.mark.t5x, pytest.mark.slow]

STEPS = 60
SETTINGS = {
    "MIXTURE_OR_TASK_NAME": '"embedded_books_code_math"',
    "TASK_FEATURE_LENGTHS": "{'targets': 32}",
    "TRAIN_STEPS": STEPS,
    "WARMUP_STEPS": 1,
    "BATCH_SIZE": 8,
    "train.eval_period": 10,
    "train.train_eval_dataset_cfg": None,
    "utils.SaveCheckpointConfig.period": 10,
    "mesh.MeshConfig.model": 2,
    "mesh.MeshConfig.fsdp": 2,
    "decoder.Decoder.embed_dim": 16,
    "decoder.Decoder.num_layers": 2,
    "gss.GSS.state_size": 4,
}


def start(model_dir, run="pretrain", **settings) -> subprocess.Popen:
    bindings = {"MODEL_DIR": f'"{model_dir}"'} | SETTINGS | settings
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "t5x_ssm.integrations.t5x", "train"),
            *("--gin_file=t5x/models/gss_tiny.gin", f"--gin_file=t5x/{run}.gin"),
            *(f"--gin.{name}={value}" for name, value in bindings.items()),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        stdout=subprocess.DEVNULL,
        stderr=(pathlib.Path(model_dir).with_suffix(".log")).open("a"),
        start_new_session=True,
    )


def train(model_dir, **settings):
    assert start(model_dir, **settings).wait() == 0, pathlib.Path(model_dir).with_suffix(".log").read_text()[-5000:]


def network():
    return Decoder(259, 16, "gss", 2, {"gss": functools.partial(GSS, state_size=4)})


def initial_parameters():
    tokens = jnp.ones((1, 4), jnp.int32)
    return jax.jit(lambda key: network().init(key, tokens, tokens, enable_dropout=False)["params"])(jax.random.key(0))


def parameters(checkpoint):
    """The parameters of a checkpoint on one device."""
    return jax.tree.leaves(restoring.restore_parameters(checkpoint, on_one_device(initial_parameters())).params)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    train(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed/checkpoint_10").exists():
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()[-5000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / f"killed/checkpoint_{STEPS}").exists()
    train(tmp_path / "killed")
    early, whole, resumed = (
        parameters(tmp_path / name)
        for name in ("whole/checkpoint_10", f"whole/checkpoint_{STEPS}", f"killed/checkpoint_{STEPS}")
    )
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != b) for a, b in zip(whole, early, strict=True))


def test_finetuning_starts_from_a_native_run(tmp_path):
    params = initial_parameters()
    state = TrainState.create(params, optimizers.adamw(schedules.warmup_cosine(1e-3, 1, 10)))
    save_natively(tmp_path / "native", state.replace(step=jnp.int32(5)))
    # At a rate of zero nothing moves: what is saved is what the run started from.
    settings = {"TRAIN_STEPS": 6, "WARMUP_STEPS": 1, "LEARNING_RATE": 0.0, "USE_CACHED_TASKS": False}
    checkpoint = f"'{tmp_path / 'native/checkpoint_5'}'"
    train(tmp_path / "tuned", run="finetune", INITIAL_CHECKPOINT_PATH=checkpoint, **settings)
    assert (tmp_path / "tuned/checkpoint_6").exists(), "the native run's step goes on"
    for a, b in zip(parameters(tmp_path / "tuned/checkpoint_6"), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
