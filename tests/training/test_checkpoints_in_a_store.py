"""What of `test_checkpoints` is different where nothing is renamed: which checkpoint is whole, and what becomes of the rest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_programs import assert_same

from t5x_ssm.errors import CheckpointDamaged, CheckpointError, RunFolderError
from t5x_ssm.training import run_folder
from t5x_ssm.training.checkpoints import Checkpointer, SaveCheckpointConfig
from t5x_ssm.training.restoring import restore_parameters

URL, PREFIX = "gs://bucket/run", "bucket/run/"
HERE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def tree(step):
    weights = np.random.default_rng(step).normal(size=(8, 16)).astype(np.float32)
    return {"target": {"kernel": jnp.asarray(weights)}, "state": {"step": jnp.asarray(step, jnp.int32)}}


def abstract(found):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=HERE), found)


def save_all(folder, steps, **settings):
    with Checkpointer(folder, SaveCheckpointConfig(**settings)) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, tree(step), {"position": step}, {"window": [step]})


def restore(folder):
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore(abstract(tree(0)))


def test_round_trip_and_retention(store):
    save_all(URL, [1, 2, 3, 4], keep=2, keep_period=3)
    assert run_folder.checkpoint_steps(URL) == [3, 4]
    assert {name.split("/")[2] for name in store.names(PREFIX)} == {"checkpoint_3", "checkpoint_4"}
    restored = restore(URL)
    assert_same(restored.tree, jax.tree.map(np.asarray, tree(4)))
    assert (restored.dataset_state, restored.metadata, restored.step) == ({"position": 4}, {"window": [4]}, 4)
    found = restore_parameters(f"{URL}/checkpoint_3", abstract(tree(0))["target"])
    np.testing.assert_array_equal(found.params["kernel"], tree(3)["target"]["kernel"])
    with pytest.raises(
        CheckpointError, match=r"checkpoint_7 does not exist.*gs://bucket/run holds checkpoint_3, checkpoint_4"
    ):
        restore_parameters(f"{URL}/checkpoint_7", abstract(tree(0))["target"])


def test_what_a_killed_write_left_is_no_checkpoint_and_is_removed(store):
    save_all(URL, [1, 2])
    # Orbax writes both at the end.
    del store.objects[f"{PREFIX}checkpoint_2/commit_success.txt"]
    described = f"{PREFIX}checkpoint_2/_CHECKPOINT_METADATA"
    store.write(described, json.dumps(json.loads(store.objects[described]) | {"commit_timestamp_nsecs": None}).encode())
    assert run_folder.checkpoint_steps(URL) == [1]
    assert run_folder.find_checkpoint(URL).name == "checkpoint_1"
    assert restore(URL).step == 1
    assert not [*store.names(f"{PREFIX}checkpoint_2")] and [*store.names(f"{PREFIX}checkpoint_1")]


def test_a_run_copied_from_a_file_system_goes_on(store, tmp_path):
    save_all(tmp_path, [1, 2])
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":  # Not every Orbax writes it there.
            store.write(PREFIX + path.relative_to(tmp_path).as_posix(), path.read_bytes())
    before = dict(store.objects)
    assert run_folder.checkpoint_steps(URL) == [1, 2]
    assert_same(restore(URL).tree, jax.tree.map(np.asarray, tree(2)))
    assert store.objects == before
    save_all(URL, [3])
    assert restore(URL).step == 3 and before.items() <= store.objects.items()


def test_a_damaged_checkpoint_is_set_aside_with_all_its_files(store):
    save_all(URL, [1, 2])
    for name in store.names(f"{PREFIX}checkpoint_2/state/"):
        if "/d/" in name:
            store.write(name, store.objects[name][:-1])
    files = {
        name.removeprefix(f"{PREFIX}checkpoint_2/"): store.objects[name]
        for name in store.names(f"{PREFIX}checkpoint_2")
    }
    restored = restore(URL)
    assert restored.step == 1 and "checkpoint_2 cannot be used" in restored.set_aside[0]
    aside = f"{PREFIX}bad/checkpoint_2-0/"
    assert {name.removeprefix(aside): store.objects[name] for name in store.names(aside)} == files
    assert not [*store.names(f"{PREFIX}checkpoint_2/")]
    assert b"checkpoint_2" in store.objects[f"{PREFIX}bad/checkpoint_2-0.reason.txt"]


def test_a_store_that_refuses_is_not_blamed_on_the_checkpoints(store):
    save_all(URL, [1])
    before = dict(store.objects)
    checkpointer = Checkpointer(URL)
    store.forbidden = ("POST",)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_2 could not be written(?s:.*)no access(?s:.*)checkpoint_1\."
    ):
        checkpointer.save(2, tree(2), {}, {})
        checkpointer.wait()
    store.forbidden = ("POST", "GET")
    with pytest.raises(RunFolderError, match="no access"):
        checkpointer.save(2, tree(2), {}, {})
    with pytest.raises((CheckpointError, RunFolderError), match="no access") as refused:
        restore_parameters(f"{URL}/checkpoint_1", abstract(tree(0))["target"])
    assert not isinstance(refused.value, CheckpointDamaged)
    store.forbidden = ()
    assert store.objects == before
    assert checkpointer.save(2, tree(2), {}, {})
    checkpointer.close()
    assert restore(URL).step == 2
