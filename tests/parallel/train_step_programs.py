"""Run with 8 virtual devices by `test_train_step_on_meshes.py`: two steps of a small hybrid on mixed meshes and on one device."""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import functools

import jax
import numpy as np

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.training import optimizers
from t5x_ssm.training.trainer import Trainer

MESHES = {
    "data 2 fsdp 2 model 2": MeshConfig(data=2, fsdp=2, model=2),
    "fsdp 2 sequence 2 model 2": MeshConfig(data=1, fsdp=2, sequence=2, model=2),
}
SEGMENTS = np.array(
    [[1] * 24, [1] * 3 + [2] * 17 + [3] * 4, [1] * 6 + [2] * 1 + [3] * 5 + [4] * 12, [1] * 13 + [0] * 11], np.int32
)
STARTS = np.diff(SEGMENTS, axis=1, prepend=0) != 0
INDEX = np.arange(24, dtype=np.int32)
TOKENS = np.random.default_rng(0).integers(1, 32, (4, 25)).astype(np.int32)
BATCH = {
    "decoder_input_tokens": TOKENS[:, :-1],
    "decoder_target_tokens": TOKENS[:, 1:],
    "decoder_loss_weights": (SEGMENTS > 0).astype(np.int32),
    "decoder_segment_ids": SEGMENTS,
    "decoder_positions": INDEX - np.maximum.accumulate(np.where(STARTS, INDEX, 0), axis=1),
}
NETWORK = Decoder(
    vocab_size=32,
    embed_dim=8,
    pattern="gss*2 chunk",
    num_layers=3,
    mixers={
        "gss": functools.partial(GSS, channels=4, hidden=12, state_size=3),
        "chunk": functools.partial(Attention, num_heads=2, span="chunk", window=5, relative_bias=True),
    },
    mlp=functools.partial(MLP, hidden=16),
    remat_policy="full",
)
STEPS = 2


def trainer_on(mesh):
    # A large eps: the first updates of Adam are otherwise the signs of gradients, rounding included.
    optimizer = optimizers.adamw(0.05, eps=1e-2, clip_global_norm=0.5)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in BATCH.items()}
    return Trainer(LanguageModel(NETWORK, z_loss=1e-4), optimizer, mesh, shapes)


def train(trainer, state):
    """The state and the metrics of every step, as numpy."""
    metrics = []
    with jax.set_mesh(trainer.mesh):
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, trainer.abstract_state)
        for _ in range(STEPS):
            state, measured = trainer.train_step(state, trainer.to_device(BATCH))
            metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


if __name__ == "__main__":
    alone = trainer_on(make_mesh(MeshConfig(), jax.devices()[:1]))
    start = jax.device_get(alone.initial_state())
    expected = train(alone, start)
    losses = [float(m["loss"]) for m in expected[1]]
    assert losses[1] < 0.995 * losses[0], losses
    for label, config in MESHES.items():
        trainer = trainer_on(make_mesh(config))
        sharded = [leaf.sharding.spec for leaf in jax.tree.leaves(trainer.abstract_state.params)]
        assert any("model" in spec for spec in sharded) and any("fsdp" in spec for spec in sharded)

        def close(path, got, want, label=label):
            want = np.asarray(want)
            message = f"{label}: {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max(), err_msg=message)

        jax.tree_util.tree_map_with_path(close, train(trainer, start), expected)
        print("passed", label, flush=True)
