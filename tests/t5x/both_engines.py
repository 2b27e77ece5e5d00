"""Tiny networks of both kinds, their batches as T5X reads them, and the two engines' ways to start, save and restore them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pairs_task import PAIRS_TASK
from t5x import models, trainer, utils

from t5x_ssm.integrations.t5x.optimizer_definition import OptimizerDefinition
from t5x_ssm.integrations.t5x.partitioner import Partitioner
from t5x_ssm.integrations.t5x.vocabulary import task_vocabulary
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.encoder_decoder import EncoderDecoder, cross_attention
from t5x_ssm.models.objectives import LanguageModel, SequenceToSequence
from t5x_ssm.parallel.mesh import MeshConfig
from t5x_ssm.training import checkpoints, optimizers, schedules
from t5x_ssm.training.train_state import TrainState

LENGTH, BATCH, STEPS = 32, 4, 50
TEXT_TASK = "embedded_books_code_math"

attention = functools.partial(Attention, num_heads=2)
sliding = functools.partial(attention, span="sliding", window=8)
mlp = functools.partial(MLP, hidden=32)


def spade(**state_space):
    return functools.partial(
        Spade,
        state_space=functools.partial(S4StateSpace, state_size=4, **state_space),
        attention=functools.partial(sliding, causal=not state_space),
    )


def decoder(pattern, **mixers):
    return Decoder(vocab_size=259, embed_dim=16, pattern=pattern, mixers=mixers, mlp=mlp)


NETWORKS = {
    "gss*3 chunk": decoder(
        "gss*3 chunk",
        gss=functools.partial(GSS, state_size=4, channels=8, hidden=32),
        chunk=functools.partial(attention, span="chunk", window=8, relative_bias=True),
    ),
    "h3 attn h3*2": decoder("h3 attn h3*2", h3=functools.partial(H3, state_size=4), attn=attention),
    "spade swa*3": decoder("spade swa*3", spade=spade(), swa=sliding),
    # Its encoder is as SPADE's, a layer outside the period before the rest.
    "spade encoder-decoder": EncoderDecoder(
        vocab_size=259,
        embed_dim=16,
        encoder_pattern="spade swa*2",
        encoder_mixers={
            "spade": spade(bidirectional=True),
            "swa": functools.partial(sliding, causal=False, relative_bias=True),
        },
        decoder_pattern="attn*2",
        decoder_mixers={"attn": attention},
        cross=functools.partial(cross_attention, num_heads=2),
        mlp=mlp,
        decoder_positions=LENGTH,
    ),
}


def network(name: str):
    """One of NETWORKS, for gin."""
    return NETWORKS[name]


def optimizer():
    return optimizers.adamw(schedules.warmup_cosine(peak=3e-3, warmup_steps=10, total_steps=STEPS))


@functools.cache
def batches(task: str) -> list[dict[str, np.ndarray]]:
    """The first batches of a task as T5X reads and packs them."""
    pairs = task == PAIRS_TASK
    config = utils.DatasetConfig(
        mixture_or_task_name=task,
        task_feature_lengths={"inputs": LENGTH, "targets": LENGTH} if pairs else {"targets": LENGTH},
        split="train",
        batch_size=BATCH,
        shuffle=True,
        seed=0,
        pack=True,
    )
    model_class = models.EncoderDecoderModel if pairs else models.DecoderOnlyModel
    data = utils.get_dataset(config, 0, 1, model_class.FEATURE_CONVERTER_CLS)
    return [
        {name: np.asarray(array) for name, array in batch.items()} for _, batch in zip(range(STEPS), data, strict=False)
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network under both engines."""

    name: str

    @property
    def network(self):
        return NETWORKS[self.name]

    @property
    def pairs(self) -> bool:
        return isinstance(self.network, EncoderDecoder)

    @property
    def task(self) -> str:
        return PAIRS_TASK if self.pairs else TEXT_TASK

    @property
    def objective(self):
        """The native engine's."""
        return (SequenceToSequence if self.pairs else LanguageModel)(self.network, z_loss=1e-4)

    def t5x_model(self, **settings: Any):
        """T5X's stock model."""
        settings = {
            "optimizer_def": OptimizerDefinition(optimizer()),
            "z_loss": 1e-4,
            "loss_normalizing_factor": "NUM_REAL_TARGET_TOKENS",
        } | settings
        vocabulary = functools.partial(task_vocabulary, self.task, self.network)
        if self.pairs:
            return models.EncoderDecoderModel(self.network, vocabulary("inputs"), vocabulary("targets"), **settings)
        return models.DecoderOnlyModel(self.network, vocabulary("targets"), **settings)

    def start(self) -> TrainState:
        """The native state before the first step."""
        tokens = [jnp.ones((BATCH, LENGTH), jnp.int32)] * (3 if self.pairs else 2)
        init = lambda key: self.network.init(key, *tokens, enable_dropout=False)["params"]
        return TrainState.create(jax.jit(init)(jax.random.key(0)), optimizer())


def t5x_initializer(model: Any, partitioner: Partitioner, batch: dict[str, Any]) -> utils.TrainStateInitializer:
    """For batches of these arrays or shapes."""
    return utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in batch.items()},
        input_types={name: array.dtype for name, array in batch.items()},
        partitioner=partitioner,
    )


def t5x_train_step(model, state, partitioner, initializer, learning_rate):
    """T5X's own, jitted."""
    return trainer.Trainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        train_state_axes=initializer.train_state_axes,
        eval_names=[],
        summary_dir=None,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=learning_rate,
        num_microbatches=None,
    )._partitioned_train_step


def restore_in_t5x(checkpoint, partitioner, initializer, model_dir):
    """T5X's way from a checkpoint to a train state; also its checkpoint manager for `model_dir`."""
    return utils.create_checkpoint_manager_and_restore(
        initializer,
        partitioner,
        utils.RestoreCheckpointConfig(path=str(checkpoint), mode="specific", dtype="float32"),
        str(checkpoint),
        None,
        save_checkpoint_cfg=utils.SaveCheckpointConfig(period=1),
        model_dir=str(model_dir),
        use_orbax=True,
    )


def one_device() -> Partitioner:
    return Partitioner(MeshConfig(data=1))


def save_natively(folder, state: TrainState) -> None:
    with checkpoints.Checkpointer(folder, checkpoints.SaveCheckpointConfig(period=1, keep=None)) as checkpointer:
        checkpointer.save(int(state.step), state.to_tree(), None, {})
        checkpointer.wait()


def on_one_device(tree: Any) -> Any:
    """Shapes of a tree, to be restored on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
