"""T5X's own train step with these modules compiles for TPU slices that are not there."""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")
pytest.importorskip("libtpu", reason="the TPU compiler is not installed (the extra aot)")

import seqio
from both_engines import t5x_initializer, t5x_train_step
from t5x import models

from launch.chips import topology_devices
from t5x_ssm.integrations.t5x.optimizer_definition import OptimizerDefinition, learning_rate_fn
from t5x_ssm.integrations.t5x.partitioner import Partitioner
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.parallel.mesh import MeshConfig
from t5x_ssm.training import optimizers, schedules

pytestmark = [pytest.mark.t5x, pytest.mark.aot]

BATCH, LENGTH, WIDTH, VOCAB = 256, 1024, 512, 32000
heads = functools.partial(Attention, num_heads=8)
NETWORKS = {
    "gss chunk": {
        "gss": functools.partial(GSS, state_size=256),
        "chunk": functools.partial(heads, span="chunk", window=256),
    },
    "swa gss": {
        "swa": functools.partial(heads, span="sliding", window=128),
        "gss": functools.partial(GSS, state_size=256),
    },
}


@pytest.mark.parametrize(
    ("topology", "mesh", "pattern"),
    [
        ("v5e:4x4", MeshConfig(data=1, fsdp=-1, model=2), "gss chunk"),
        ("v5p:4x4x4", MeshConfig(data=2, fsdp=-1, model=2), "swa gss"),
    ],
    ids=["v5e:4x4", "v5p:4x4x4"],
)
def test_train_step_compiles(topology, mesh, pattern):
    network = Decoder(
        VOCAB, WIDTH, pattern, 4, NETWORKS[pattern], mlp=functools.partial(MLP, hidden=4 * WIDTH), dtype="bfloat16"
    )
    optimizer = optimizers.adamw(schedules.warmup_cosine(peak=1e-3, warmup_steps=10, total_steps=100))
    model = models.DecoderOnlyModel(
        module=network,
        vocabulary=seqio.ByteVocabulary(),
        optimizer_def=OptimizerDefinition(optimizer),
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
    devices = topology_devices(topology)
    partitioner = Partitioner(mesh, devices)
    names = ("input_tokens", "target_tokens", "segment_ids", "positions", "loss_weights")
    batch = {f"decoder_{name}": jax.ShapeDtypeStruct((BATCH, LENGTH), np.int32) for name in names}
    initializer = t5x_initializer(model, partitioner, batch)
    state = initializer.global_train_state_shape
    step = t5x_train_step(model, state, partitioner, initializer, learning_rate_fn(optimizer))
    program = step.lower(state, batch).compile()

    memory = program.memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.param_states)))
    # Each device holds its share of parameters and moments, and little more: what no mesh axis divides.
    assert memory.argument_size_in_bytes < 1.2 * whole / (len(devices) / partitioner.mesh.shape["data"])
    assert "all-reduce" in program.as_text() or "reduce-scatter" in program.as_text()
