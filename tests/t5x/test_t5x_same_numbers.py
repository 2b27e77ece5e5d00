"""One checkpoint, one task: T5X's own train step and the native one give the same losses, and each reads the other's saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from t5x import models, trainer, utils

from t5x_ssm.integrations.t5x.optimizer_definition import OptimizerDefinition, learning_rate_fn
from t5x_ssm.integrations.t5x.partitioner import Partitioner
from t5x_ssm.integrations.t5x.vocabulary import task_vocabulary
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.parallel.mesh import MeshConfig
from t5x_ssm.training import checkpoints, optimizers, schedules
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_train_step

pytestmark = [pytest.mark.t5x, pytest.mark.slow]

TASK, LENGTH, BATCH, STEPS = "embedded_books_code_math", 32, 4, 50
attention = functools.partial(Attention, num_heads=2)
PATTERNS = {
    "gss*3 chunk": {
        "gss": functools.partial(GSS, state_size=4, channels=8, hidden=32),
        "chunk": functools.partial(attention, span="chunk", window=8, relative_bias=True),
    },
    "h3 attn h3*2": {"h3": functools.partial(H3, state_size=4), "attn": attention},
    "spade swa*3": {
        "spade": functools.partial(
            Spade,
            state_space=functools.partial(S4StateSpace, state_size=4),
            attention=functools.partial(attention, span="sliding", window=8),
        ),
        "swa": functools.partial(attention, span="sliding", window=8),
    },
}


def network(pattern):
    mlp = functools.partial(MLP, hidden=32)
    return Decoder(vocab_size=259, embed_dim=16, pattern=pattern, mixers=PATTERNS[pattern], mlp=mlp)


@functools.cache
def batches():
    """The first batches that T5X reads of the task, packed."""
    config = utils.DatasetConfig(
        mixture_or_task_name=TASK,
        task_feature_lengths={"targets": LENGTH},
        split="train",
        batch_size=BATCH,
        shuffle=True,
        seed=0,
        pack=True,
    )
    data = utils.get_dataset(config, 0, 1, models.DecoderOnlyModel.FEATURE_CONVERTER_CLS)
    return [
        {name: np.asarray(array) for name, array in batch.items()} for _, batch in zip(range(STEPS), data, strict=False)
    ]


def optimizer():
    return optimizers.adamw(schedules.warmup_cosine(peak=3e-3, warmup_steps=10, total_steps=STEPS))


def t5x_setup(net):
    """T5X's model, partitioner and train state initializer."""
    vocabulary = task_vocabulary(TASK, net)
    model = models.DecoderOnlyModel(
        module=net,
        vocabulary=vocabulary,
        optimizer_def=OptimizerDefinition(optimizer()),
        z_loss=1e-4,
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
    partitioner = Partitioner(MeshConfig(data=1))
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in batches()[0].items()},
        input_types={name: array.dtype for name, array in batches()[0].items()},
        partitioner=partitioner,
    )
    return model, partitioner, initializer


def restore_in_t5x(folder, step, partitioner, initializer, model_dir):
    """T5X's way from a checkpoint to a train state; also its checkpoint manager for `model_dir`."""
    return utils.create_checkpoint_manager_and_restore(
        initializer,
        partitioner,
        utils.RestoreCheckpointConfig(path=str(folder / f"checkpoint_{step}"), mode="specific", dtype="float32"),
        str(folder / f"checkpoint_{step}"),
        None,
        save_checkpoint_cfg=utils.SaveCheckpointConfig(period=1),
        model_dir=str(model_dir),
        use_orbax=True,
    )


def save_natively(folder, state):
    with checkpoints.Checkpointer(folder, checkpoints.SaveCheckpointConfig(period=1, keep=None)) as checkpointer:
        checkpointer.save(int(state.step), state.to_tree(), None, {})
        checkpointer.wait()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_engines_learn_the_same_and_read_each_other(pattern, tmp_path):
    net = network(pattern)
    tokens = jnp.ones((BATCH, LENGTH), jnp.int32)
    params = jax.jit(lambda key: net.init(key, tokens, tokens, enable_dropout=False)["params"])(jax.random.key(0))
    start = TrainState.create(params, optimizer())
    save_natively(tmp_path / "native", start)
    model, partitioner, initializer = t5x_setup(net)
    (tmp_path / "t5x").mkdir()
    state, manager = restore_in_t5x(tmp_path / "native", 0, partitioner, initializer, tmp_path / "t5x")

    step = trainer.Trainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        train_state_axes=initializer.train_state_axes,
        eval_names=[],
        summary_dir=None,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=learning_rate_fn(optimizer()),
        num_microbatches=None,
    )._partitioned_train_step
    native_step = jax.jit(make_train_step(LanguageModel(net, z_loss=1e-4), optimizer()))
    native, losses, native_losses = start, [], []
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].total))
        native, sums = native_step(native, batch)
        native_losses.append(float(sums["loss"] / sums["weights"]))
        logged = metrics["learning_rate"]
        np.testing.assert_allclose(float(logged.total / logged.count), float(sums["learning_rate"]), rtol=1e-6)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, native_losses, rtol=1e-5)

    # T5X -> native.
    manager.save(state)
    manager.wait_until_finished()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), start.params)
    found = checkpoints.restore_parameters(
        checkpoints.RestoreCheckpointConfig(path=str(tmp_path / "t5x" / f"checkpoint_{STEPS}")), placed
    )
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Native -> T5X, with moments and step.
    save_natively(tmp_path / "native", native)
    again, _ = restore_in_t5x(tmp_path / "native", STEPS, partitioner, initializer, tmp_path / "t5x_again")
    assert int(again.step) == STEPS
    for ours, theirs in zip(jax.tree.leaves(native.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(jax.tree.leaves(native.opt_state), jax.tree.leaves(again.param_states), strict=True):
        np.testing.assert_array_equal(ours, theirs)
