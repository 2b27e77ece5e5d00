"""Settings of a run that the layers do not know, through the engine: rematerialization, and a schedule from gin."""

import functools
import re

import jax
import numpy as np
import pytest
import tiny

from t5x_ssm import train
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.models.stack import REMAT_POLICIES
from t5x_ssm.training import optimizers
from t5x_ssm.training.metrics import history
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_train_step

VOCABULARY, LENGTH, STEPS = 11, 16, 3


def objective(pattern, policy):
    return LanguageModel(
        Decoder(
            vocab_size=VOCABULARY,
            embed_dim=8,
            pattern=pattern,
            num_layers=2,
            mixers={
                "gss": functools.partial(GSS, state_size=4),
                "attn": functools.partial(Attention, num_heads=2, span="full"),
            },
            mlp=functools.partial(MLP, hidden=12),
            remat_policy=policy,
        )
    )


def batches():
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = random.integers(1, VOCABULARY, (2, LENGTH + 1)).astype(np.int32)
        weights = random.integers(0, 2, (2, LENGTH)).astype(np.int32)
        yield {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": weights,
        }


@functools.cache
def trained(pattern, policy):
    """(losses, parameters, rematerialized calls in the program) after a few steps."""
    # A large epsilon makes the update smooth in the gradient: Adam's own is its sign where it is nearly zero.
    model, optimizer = objective(pattern, policy), optimizers.adamw(0.5, eps=1.0, clip_global_norm=None)
    tokens = np.ones((2, LENGTH), np.int32)
    state = TrainState.create(tiny.random_parameters(model.network, tokens, tokens, enable_dropout=False), optimizer)
    traced = tiny.jit(make_train_step(model, optimizer)).trace(state, next(batches()))
    step = traced.lower().compile()
    losses = []
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    # Norms keep what they name under every policy; that is not this setting's.
    calls = re.findall(r"policy=(?!SaveOnlyTheseNames)", str(traced.jaxpr))
    return losses, state.params, len(calls)


POLICIES = [policy for policy in REMAT_POLICIES if policy != "none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "policy"),
    [*(("attn", policy) for policy in POLICIES), ("gss", "full")],
)
def test_rematerialization_changes_nothing_that_is_learnt(pattern, policy):
    losses, params, calls = trained(pattern, policy)
    expected_losses, expected, none = trained(pattern, "none")
    assert calls > none == 0
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert losses[0] != losses[1]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


@pytest.mark.slow
def test_wsd_from_its_gin_file_is_the_rate_that_every_step_applies(tmp_path, training_caches, monkeypatch):
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(training_caches["T5X_SSM_CACHE_DIR"]))
    settings = {
        "MODEL_DIR": tmp_path / "run",
        "MIXTURE_OR_TASK_NAME": "prose_and_code",
        "TASK_FEATURE_LENGTHS": {"targets": 16},
        "BATCH_SIZE": 2,
        "TRAIN_STEPS": 8,
        "WARMUP_STEPS": 2,
        "DECAY_STEPS": 4,
        "LEARNING_RATE": 0.008,
        "EVAL_STEPS": 1,
        "EVAL_PERIOD": 0,
        "decoder.Decoder.embed_dim": 8,
        "decoder.Decoder.num_layers": 1,
        "gss.GSS.state_size": 2,
        "trainer.TrainerConfig.log_period": 1,
        "trainer.TrainerConfig.tensorboard": False,
    }
    files = [f"--gin_file={name}.gin" for name in ("runs/pretrain", "optimizers/adamw_wsd", "networks/gss_tiny")]
    assert train.main([*files, *(f"--gin.{name}={value}" for name, value in settings.items())]) == 0
    lines = history(tmp_path / "run" / "metrics.jsonl", split="train")
    rates = [0.004, 0.008, 0.008, 0.008, 0.006, 0.004, 0.002, 0.0]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-6, atol=1e-9)
    # The state space's own bound holds beside it.
    slow = [line["learning_rate/state_space"] for line in lines]
    np.testing.assert_allclose(slow, np.minimum(rates, 1e-3), rtol=1e-6, atol=1e-9)
