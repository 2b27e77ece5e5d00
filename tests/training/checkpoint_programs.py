"""Programs that the checkpoint tests run in processes of their own: to be killed, on other meshes, or as several.

python checkpoint_programs.py write FOLDER
python checkpoint_programs.py meshes FOLDER
python checkpoint_programs.py processes FOLDER PORT INDEX
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_ssm import errors
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.training.checkpoints import Checkpointer, SaveCheckpointConfig
from t5x_ssm.training.restoring import restore_parameters


def state_at(step: int, size: int = 1 << 18) -> dict:
    """A tree on the host whose every value depends on the step."""
    noise = np.random.default_rng(step).standard_normal((8, size // 8)).astype(np.float32)
    return {
        "target": {"decoder": {"kernel": noise, "scale": noise[:, :64].astype(jnp.bfloat16)}},
        "state": {"step": np.int32(step), "param_states": {"0": {"mu": {"kernel": -noise}}}},
    }


SPECS = {"kernel": PartitionSpec("fsdp", "model"), "scale": PartitionSpec("model", None), "step": PartitionSpec()}


def abstract(mesh, tree: dict) -> dict:
    """The tree's shapes, on the mesh."""

    def place(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, SPECS[path[-1].key]))

    return jax.tree_util.tree_map_with_path(place, tree)


def put(mesh, tree: dict) -> dict:
    """The tree on the mesh; works with several processes."""

    def make(leaf, like):
        return jax.make_array_from_callback(leaf.shape, like.sharding, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(make, tree, abstract(mesh, tree))


def assert_same(restored: dict, expected: dict) -> None:
    """All bits of all values that this process holds are equal, and so are types."""
    for leaf, value in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == value.dtype
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(value)[shard.index].tobytes()


def write(folder: str) -> None:
    """Goes on from the newest checkpoint and saves one step after the other, as fast as it can, until it is killed."""
    mesh = make_mesh(MeshConfig())
    checkpointer = Checkpointer(folder, SaveCheckpointConfig(keep=2))
    restored = checkpointer.restore(abstract(mesh, state_at(0)))
    step = 0 if restored is None else restored.step
    if restored is not None:
        assert_same(restored.tree, state_at(step))
        assert restored.dataset_state == {"next": step + 1}
    while True:
        step += 1
        checkpointer.save(step, put(mesh, state_at(step)), {"next": step + 1}, {"window": [step, step / 3]})


def meshes(folder: str) -> None:
    """Saves on one mesh and restores on others, of other axes and fewer devices."""
    assert jax.device_count() == 8
    tree = state_at(5, size=1 << 10)
    layouts = [
        make_mesh(MeshConfig(data=1, fsdp=8)),
        make_mesh(MeshConfig(data=1, fsdp=1, model=8)),
        make_mesh(MeshConfig(data=2, fsdp=2, model=2)),
        make_mesh(MeshConfig(data=1, fsdp=2, model=2), devices=jax.devices()[:4]),
        make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]),
    ]
    sums = set()
    for number, saved_on in enumerate(layouts):
        path = pathlib.Path(folder) / str(number)
        with Checkpointer(path) as checkpointer:
            checkpointer.save(5, put(saved_on, tree), None, {})
        sums.add((path / "checkpoint_5/metadata/metadata").read_text().split('"dataset_checksum"')[0])
    for source, target in ((0, 1), (1, 0), (0, 3), (2, 3), (3, 4), (4, 2)):
        path = pathlib.Path(folder) / str(source)
        wanted = abstract(layouts[target], tree)
        with Checkpointer(path) as checkpointer, jax.set_mesh(layouts[target]):
            restored = checkpointer.restore(wanted)
        assert_same(restored.tree, tree)
        for leaf, like in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == like.sharding
    assert_same(restore_parameters(path, wanted["target"]).params, tree["target"])
    assert len(sums) == 1, "checksums depend on the mesh"


def processes(folder: str, port: str, index: str) -> None:
    """One of two processes that save, and meet damage and a mismatch together."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count()))
    own = {"next": 3, "process": int(index)}
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, put(mesh, state_at(step, 1 << 14)), own, {"from": int(index)})
        checkpointer.wait()
        if index == "0":
            (pathlib.Path(folder) / "checkpoint_3/dataset/metadata").write_text("{")
            # Only one process's arrays are in this folder, so the other process alone notices at first.
            for path in (pathlib.Path(folder) / "checkpoint_2/state/ocdbt.process_1/d").iterdir():
                path.write_bytes(b"")
        checkpointer.latest_step()  # Waits for the other process.
        restored = checkpointer.restore(abstract(mesh, state_at(0, 1 << 14)))
        assert restored.step == 1 and len(restored.set_aside) == 2, restored
        assert restored.dataset_state == own and restored.metadata == {"from": 0}
        assert_same(restored.tree, state_at(1, 1 << 14))
        try:
            checkpointer.restore(abstract(mesh, state_at(0, 1 << 15)))
        except errors.CheckpointMismatch:
            pass
        else:
            raise AssertionError("no mismatch")
        assert checkpointer.steps() == [1]
    print("both agree")


if __name__ == "__main__":
    {"write": write, "meshes": meshes, "processes": processes}[sys.argv[1]](*sys.argv[2:])
