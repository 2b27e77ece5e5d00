"""Saving and restoring: exact, whole or not at all, and never at the cost of an older checkpoint."""

import copy
import functools
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_programs import abstract as kernel_abstract
from checkpoint_programs import assert_same, state_at
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from t5x_ssm.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointUnreadable, UserError
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.training import run_folder, stored_tree
from t5x_ssm.training.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from t5x_ssm.training.restoring import restore_parameters, restore_state

PROGRAMS = pathlib.Path(__file__).with_name("checkpoint_programs.py")
REPOSITORY = pathlib.Path(__file__).parents[2]


def sharding() -> NamedSharding:
    return NamedSharding(make_mesh(MeshConfig()), PartitionSpec())


def on_device(tree):
    return jax.device_put(tree, sharding())


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding()), tree)


def example(step: int = 3) -> dict:
    """Values whose bits are easily lost: NaNs with payloads, -0.0, denormals, bfloat16, integers near their limits."""
    rng = np.random.default_rng(step)
    bits = rng.integers(0, 2**32, (16, 48), dtype=np.uint32)
    bits[0, :4] = (0x7FC00001, 0x80000000, 0x00000001, 0xFF800000)
    weights = bits.view(np.float32)
    bias = (bits[1] >> 16).astype(np.uint16).view(jnp.bfloat16)
    return on_device(
        {
            "target": {
                "decoder": {"kernel": weights, "bias": bias},
                "embed": np.full((600,), step, np.float32),
            },
            "state": {
                "step": np.int32(step),
                "param_states": {
                    "0": {"count": np.int32(-(2**31)), "mu": {"kernel": -weights}, "mask": bits[2] % 2 == 0},
                    "1": {},
                },
            },
        }
    )


def save_all(folder, steps, config=SaveCheckpointConfig()) -> None:
    with Checkpointer(folder, config) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, example(step), {"position": step}, {"window": [step, 0.1 * step]})


def restore(folder, step=None, tree=None):
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore(abstract(example() if tree is None else tree), step)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What is stored.


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bit_exact(tmp_path, asynchronous):
    dataset_state = {"kind": "indexed", "seed": 2**63 + 1, "weights": [0.1, 1e-320], "done": None}
    metadata = {"window": {"loss": 0.1 + 0.2}, "name": "größer", "flag": True}
    with Checkpointer(tmp_path, SaveCheckpointConfig(asynchronous=asynchronous)) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.restore(abstract(example())) is None
        given = copy.deepcopy((dataset_state, metadata))
        checkpointer.save(3, example(), *given)
        given[0].clear(), given[1]["window"].clear()  # The loop goes on and changes its own.
        restored = checkpointer.restore(abstract(example()))
    assert jax.tree.structure(restored.tree) == jax.tree.structure(example())
    assert_same(restored.tree, jax.tree.map(np.asarray, example()))
    assert (restored.dataset_state, restored.metadata, restored.step) == (dataset_state, metadata, 3)
    assert restored.set_aside == ()


def test_layout_and_names_are_those_of_t5x(tmp_path):
    save_all(tmp_path, [100])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_100"]
    items = {p.name for p in (tmp_path / "checkpoint_100").iterdir() if p.is_dir()}
    assert items == {"state", "dataset", "metadata"}
    # As T5X reads it: the tree that Orbax gives without any hint from us.
    tree = ocp.PyTreeCheckpointHandler(use_ocdbt=True).restore(
        ocp.path.step.epath.Path(tmp_path / "checkpoint_100/state"),
        args=ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), example(100))),
    )
    names = set(traverse_util.flatten_dict(tree, sep="/"))
    assert names == {
        "target/decoder/kernel",
        "target/decoder/bias",
        "target/embed",
        "state/step",
        "state/param_states/0/count",
        "state/param_states/0/mu/kernel",
        "state/param_states/0/mask",
    }
    assert tree["target"]["embed"].tolist() == [100.0] * 600


def test_donating_the_saved_arrays_at_once_changes_nothing_in_the_checkpoint(tmp_path):
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree), donate_argnums=0)
    tree = on_device({"target": {"w": np.zeros((512, 512), np.float32)}})
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, tree, None, {})
            for _ in range(5):
                tree = donate(tree)
        for step, value in ((1, 0.0), (2, 5.0), (3, 10.0)):
            restored = checkpointer.restore(abstract(tree), step)
            assert np.unique(restored.tree["target"]["w"]).tolist() == [value]


def test_parameters_stored_in_another_type(tmp_path):
    save_all(tmp_path, [3], SaveCheckpointConfig(dtype="bfloat16"))
    tree = example()
    stored = stored_tree.stored_arrays(run_folder.checkpoint_path(tmp_path, 3) / "state")
    assert stored["target/embed"].dtype == stored["target/decoder/kernel"].dtype == jnp.bfloat16
    assert stored["state/param_states/0/mu/kernel"].dtype == np.float32
    rounded = tree | {"target": jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), tree["target"])}
    assert_same(restore(tmp_path).tree, jax.tree.map(np.asarray, rounded))
    save_all(tmp_path / "wide", [3], SaveCheckpointConfig(dtype="float32"))
    assert_same(restore(tmp_path / "wide").tree, jax.tree.map(np.asarray, tree))


def test_state_spaces_are_never_stored_narrower(tmp_path):
    mixer = {"ssm": {"lambda_re": jnp.ones(3)}, "kernel": jnp.ones(3)}
    state = {"target": {"mixer": mixer}, "state": {"step": jnp.int32(1), "param_states": {}}}
    with Checkpointer(tmp_path, SaveCheckpointConfig(dtype="bfloat16")) as checkpointer:
        checkpointer.save(1, on_device(state), None, {})
    stored = stored_tree.stored_arrays(run_folder.checkpoint_path(tmp_path, 1) / "state")
    types = {name: stored[f"target/mixer/{name}"].dtype for name in ("ssm/lambda_re", "kernel")}
    assert types == {"ssm/lambda_re": np.float32, "kernel": jnp.bfloat16}


def test_without_the_data_position(tmp_path):
    save_all(tmp_path, [3], SaveCheckpointConfig(save_dataset=False))
    assert not (tmp_path / "checkpoint_3/dataset").exists()
    assert restore(tmp_path).dataset_state is None


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"a": [1, (2,)]}, "a/1 is a tuple"),
        ({"a": {1: 2}}, "a has the key 1"),
        ({"a": np.float32(1)}, "a is a float32"),
        ({"a": {1}}, "a is a set"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path, value, name):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match=f"metadata/?{name}"):
            checkpointer.save(1, example(), {}, value)
        with pytest.raises(TypeError, match=f"dataset_state/?{name}"):
            checkpointer.save(1, example(), value, {})
        assert checkpointer.steps() == []


def test_trees_that_would_not_come_back_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for tree in ({"a/b": jnp.ones(3)}, {"a": {1: jnp.ones(3)}}, {"a": [jnp.ones(3)]}, {"a": 3}):
            with pytest.raises(TypeError):
                checkpointer.save(1, {"target": tree}, None, {})
        with pytest.raises(ValueError, match="target/a has no sharding"):
            checkpointer.restore({"target": {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}})


# Which are saved and kept.


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SaveCheckpointConfig(keep=None), [1, 2, 3, 4, 5, 6]),
        (SaveCheckpointConfig(keep=2), [5, 6]),
        (SaveCheckpointConfig(keep=1, keep_period=3), [3, 6]),
        (SaveCheckpointConfig(keep=1, checkpoint_steps=[2]), [2, 6]),
    ],
)
def test_retention(tmp_path, config, kept):
    save_all(tmp_path, [1, 2, 3], config)
    save_all(tmp_path, [4, 5, 6], config)  # Another start counts the earlier ones too.
    assert run_folder.checkpoint_steps(tmp_path) == kept


def test_due(tmp_path):
    with Checkpointer(tmp_path, SaveCheckpointConfig(period=4, checkpoint_steps=[6])) as checkpointer:
        assert [step for step in range(13) if checkpointer.due(step)] == [4, 6, 8, 12]
    with Checkpointer(tmp_path, SaveCheckpointConfig(period=None)) as checkpointer:
        assert not any(map(checkpointer.due, range(13)))


def test_a_step_is_saved_once(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(example()), step=2).step == 2
        before = contents(tmp_path)
        assert not checkpointer.save(2, example(2), {}, {})
        with pytest.raises(CheckpointError, match="checkpoint_3 exists already"):
            checkpointer.save(3, example(3), {}, {})
        assert contents(tmp_path) == before
        assert checkpointer.save(4, example(4), {}, {}) and not checkpointer.save(4, example(4), {}, {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; it has \[1, 2, 3, 4\]"):
            checkpointer.wait()
            checkpointer.restore(abstract(example()), step=7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SaveCheckpointConfig(period=0),
        lambda: SaveCheckpointConfig(keep=0),
        lambda: SaveCheckpointConfig(keep_period=-1),
        lambda: SaveCheckpointConfig(dtype="float16"),
        lambda: RestoreCheckpointConfig(path="x", mode="all"),
        lambda: RestoreCheckpointConfig(path="x", assignment_map=[("target/(", None)]),
    ],
)
def test_settings_that_make_no_sense_are_named(make):
    with pytest.raises(UserError, match=r"CheckpointConfig\.(period|keep|keep_period|dtype|mode|assignment_map)\b"):
        make()


# Another architecture.


def other_network() -> dict:
    tree = traverse_util.flatten_dict(example(), sep="/")
    tree["target/decoder/kernel"] = jnp.zeros((16, 64))
    tree["target/new"] = jnp.zeros((2,), jnp.bfloat16)
    del tree["target/embed"]
    return on_device(traverse_util.unflatten_dict(tree, sep="/"))


def test_a_mismatch_names_every_leaf_and_touches_nothing(tmp_path):
    save_all(tmp_path, [2, 3])
    before = contents(tmp_path)
    with pytest.raises(CheckpointMismatch) as error:
        restore(tmp_path, tree=other_network())
    lines = str(error.value).splitlines()
    assert "checkpoint_3" in lines[0] and "another network" in lines[0]
    assert lines[1:] == [
        "  missing in the checkpoint: target/new bfloat16[2]",
        "  only in the checkpoint: target/embed float32[600]",
        "  different: target/decoder/kernel is float32[16, 48] in the checkpoint, float32[16, 64] here",
    ]
    assert contents(tmp_path) == before


def test_a_mismatch_of_the_optimizer_alone_says_so(tmp_path):
    save_all(tmp_path, [3])
    tree = example()
    tree["state"]["param_states"]["0"]["mu"]["kernel"] = tree["target"]["decoder"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(
        CheckpointMismatch, match=r"another optimizer:\n  different: state/param_states/0/mu/kernel is float32"
    ):
        restore(tmp_path, tree=tree)


def test_long_mismatches_are_cut():
    names = [f"target/layer{i:02}" for i in range(45)]
    with pytest.raises(CheckpointMismatch) as error:
        stored_tree.compare("x", {}, dict.fromkeys(names, jnp.zeros(2)))
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and "target/layer19 float32[2]" in lines[20] and lines[21] == "  ... and 25 more"


# Damage.


def largest_data_file(checkpoint: pathlib.Path) -> pathlib.Path:
    return max((p for p in checkpoint.rglob("ocdbt.process_0/d/*")), key=lambda p: p.stat().st_size)


def truncate_data(checkpoint):
    os.truncate(largest_data_file(checkpoint), largest_data_file(checkpoint).stat().st_size // 2)


def remove_data(checkpoint):
    largest_data_file(checkpoint).unlink()


def remove_item(checkpoint, item):
    shutil.rmtree(checkpoint / item)


def cut_file(checkpoint, name):
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def change_digit(checkpoint, item):
    path = checkpoint / item / "metadata"
    text = path.read_text()
    old, new = {"dataset": ('"position": 3', '"position": 4'), "metadata": ('"window": [3', '"window": [4')}[item]
    assert old in text
    path.write_text(text.replace(old, new))


def exchange_arrays(checkpoint):
    """Arrays that are perfectly readable, but are not the ones that were written."""
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(checkpoint.with_name("checkpoint_2") / "state", checkpoint / "state")


DAMAGE = {
    "truncated array": truncate_data,
    "missing array": remove_data,
    "other arrays": exchange_arrays,
    "no state": functools.partial(remove_item, item="state"),
    "no dataset": functools.partial(remove_item, item="dataset"),
    "no metadata": functools.partial(remove_item, item="metadata"),
    "cut tree": functools.partial(cut_file, name="state/_METADATA"),
    "cut index": functools.partial(cut_file, name="state/manifest.ocdbt"),
    "cut dataset": functools.partial(cut_file, name="dataset/metadata"),
    "cut metadata": functools.partial(cut_file, name="metadata/metadata"),
    "changed dataset": functools.partial(change_digit, item="dataset"),
    "changed metadata": functools.partial(change_digit, item="metadata"),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_all(folder, [1, 2, 3])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_replaces_a_damaged_one(whole_run, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    DAMAGE[damage](folder / "checkpoint_3")
    damaged = contents(folder / "checkpoint_3")
    with pytest.raises(CheckpointDamaged, match="checkpoint_3"):
        restore(folder, step=3)  # Asked for by number, nothing else will do.
    assert run_folder.checkpoint_steps(folder) == [1, 2, 3]
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore(abstract(example()))
        assert restored.step == 2 and restored.dataset_state == {"position": 2}
        assert_same(restored.tree, jax.tree.map(np.asarray, example(2)))
        (line,) = restored.set_aside
        assert f"{folder}/checkpoint_3 " in line and "bad/checkpoint_3-0" in line and "\n" not in line
        assert contents(folder / "bad/checkpoint_3-0") == damaged
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(3, example(3), {"position": 3}, {})  # And the run goes on, over the same steps.
    assert restore(folder).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_no_flipped_bit_is_restored_as_if_nothing_were(whole_run, tmp_path, number):
    """One bit in one file: either it is noticed, or it lies where no array is."""
    rng = random.Random(number)
    expected = jax.tree.map(np.asarray, example(3))
    noticed = 0
    with Checkpointer(tmp_path) as checkpointer:
        for path in sorted(p for p in (whole_run / "checkpoint_3").rglob("*") if p.is_file()):
            shutil.rmtree(tmp_path / "checkpoint_3", ignore_errors=True)
            shutil.copytree(whole_run / "checkpoint_3", tmp_path / "checkpoint_3")
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (tmp_path / "checkpoint_3" / path.relative_to(whole_run / "checkpoint_3")).write_bytes(data)
            try:
                restored = checkpointer.restore(abstract(example()), step=3)
            except (CheckpointDamaged, CheckpointUnreadable):
                noticed += 1
            else:
                assert_same(restored.tree, expected)
                assert (restored.dataset_state, restored.metadata) == ({"position": 3}, {"window": [3, 0.1 * 3]})
    assert noticed >= 4


def test_damage_everywhere_is_an_error_and_stays_one(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for step in (1, 2, 3):
        truncate_data(folder / f"checkpoint_{step}")
    for _ in range(2):  # The second start finds an empty folder, and must not take it for a fresh one.
        with pytest.raises(CheckpointDamaged, match="No whole checkpoint is left") as error:
            restore(folder)
        assert all(f"checkpoint_{step}" in str(error.value) for step in (1, 2, 3))
        assert run_folder.set_aside_checkpoints(folder) == ["checkpoint_1-0", "checkpoint_2-0", "checkpoint_3-0"]


def failing_reads(monkeypatch, error, steps):
    """Lets Orbax raise `error` for the checkpoints of these steps."""
    original = ocp.PyTreeCheckpointHandler.restore

    def restore(self, directory, *args, **kwargs):
        if any(f"checkpoint_{step}/" in str(directory) for step in steps):
            raise error
        return original(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)


def test_a_store_out_of_reach_is_not_blamed_on_the_checkpoint(whole_run, monkeypatch):
    before = contents(whole_run)
    for error in (PermissionError(13, "denied"), ValueError("UNAVAILABLE: no route"), MemoryError("8 GiB")):
        failing_reads(monkeypatch, error, steps=[3])
        with pytest.raises(CheckpointError, match="checkpoint_3") as raised:
            restore(whole_run)
        assert not isinstance(raised.value, CheckpointDamaged | CheckpointUnreadable)
    assert contents(whole_run) == before


@pytest.mark.slow
def test_an_unclear_failure_is_blamed_on_the_files_only_if_others_can_be_read(whole_run, tmp_path, monkeypatch):
    failing_reads(monkeypatch, AttributeError("'dict' object has no attribute"), steps=[1, 2, 3])
    with pytest.raises(CheckpointUnreadable, match=r"checkpoint_3(.|\n)*checkpoint_1"):
        restore(whole_run)
    assert run_folder.checkpoint_steps(whole_run) == [1, 2, 3]
    monkeypatch.undo()
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    failing_reads(monkeypatch, AttributeError("'dict' object has no attribute"), steps=[3])
    restored = restore(folder)
    assert restored.step == 2 and run_folder.set_aside_checkpoints(folder) == ["checkpoint_3-0"]


def test_leftovers_of_a_killed_write_are_removed_at_the_start(tmp_path):
    save_all(tmp_path, [1])
    whole = contents(tmp_path)
    shutil.copytree(tmp_path / "checkpoint_1", tmp_path / "checkpoint_2.orbax-checkpoint-tmp")
    assert run_folder.checkpoint_steps(tmp_path) == [1]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(example())).step == 1
    assert contents(tmp_path) == whole


# Disks.


def test_a_write_that_fails_leaves_the_older_checkpoint_and_a_usable_folder(tmp_path):
    save_all(tmp_path, [1])
    before = contents(tmp_path)
    big = on_device({"target": {"w": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(2, big, {}, {})
            with pytest.raises(
                CheckpointError, match=r"checkpoint_2 could not be written(.|\n)*checkpoint_1\."
            ) as error:
                for _ in range(1000):
                    checkpointer.check()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "tensorstore_spec" not in str(error.value)
        checkpointer.check()  # Said once.
        assert contents(tmp_path) == before
        assert checkpointer.restore(abstract(example(1))).step == 1
        assert checkpointer.save(2, big, {}, {})
    assert run_folder.checkpoint_steps(tmp_path) == [1, 2]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may mount a small disk; the limit on file sizes is tested above")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(small_disk, asynchronous):
    tree = on_device({"target": {"w": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}})
    with Checkpointer(small_disk, SaveCheckpointConfig(asynchronous=asynchronous)) as checkpointer:
        with pytest.raises(CheckpointError, match=r"disk is full(.|\n)*SaveCheckpointConfig.keep") as error:
            for step in range(1, 6):
                checkpointer.save(step, tree, {}, {})
        newest = checkpointer.latest_step()
        assert newest and f"checkpoint_{newest}." in str(error.value)
        restored = checkpointer.restore(abstract(tree))
        assert restored.step == newest
        assert_same(restored.tree, jax.tree.map(np.asarray, tree))
        shutil.rmtree(small_disk / f"checkpoint_{newest}")
        assert checkpointer.save(9, tree, {}, {})
        checkpointer.wait()
        assert checkpointer.latest_step() == 9


# Parameters alone.


def t5x_checkpoint(folder, tree) -> pathlib.Path:
    """A checkpoint as T5X's own manager writes it: only `state`, and no manifest."""
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint")
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    return folder / "checkpoint_7"


@pytest.mark.parametrize("engine", ["own", "t5x"])
def test_parameters_from_either_engine(tmp_path, engine):
    tree = example()
    if engine == "own":
        save_all(tmp_path, [2, 3])
    else:
        t5x_checkpoint(tmp_path, tree | {"flax_mutables": {"counts": jnp.ones(2)}})
    (tmp_path / "checkpoint_8.orbax-checkpoint-tmp").mkdir()
    before = contents(tmp_path)
    wanted = abstract(tree["target"])
    newest = restore_parameters(tmp_path, wanted)
    assert_same(newest.params, jax.tree.map(np.asarray, tree["target"]))
    assert newest.metadata == (None if engine == "t5x" else {"window": [3, 0.1 * 3]})
    specific = restore_parameters(RestoreCheckpointConfig(path=str(newest.path), mode="specific"), wanted)
    assert_same(specific.params, jax.tree.map(np.asarray, tree["target"]))
    # In the types of the network that takes them.
    wanted["embed"] = jax.ShapeDtypeStruct((600,), jnp.bfloat16, sharding=sharding())
    assert restore_parameters(tmp_path, wanted).params["embed"].dtype == jnp.bfloat16
    # A folder that is only read stays as it is, another run's leftovers included.
    assert contents(tmp_path) == before and (tmp_path / "checkpoint_8.orbax-checkpoint-tmp").exists()
    with pytest.raises(CheckpointMismatch, match=r"target/decoder/kernel is float32\[16, 48\]"):
        restore_parameters(tmp_path, abstract(other_network()["target"]))


@pytest.mark.parametrize("engine", ["own", "t5x"])
def test_the_whole_state_of_another_run(tmp_path, engine):
    tree = example(7)
    if engine == "own":
        save_all(tmp_path, [7])
    else:
        # T5X turns whole numbers into the type of its checkpoints.
        t5x_checkpoint(tmp_path, {**tree, "state": {**tree["state"], "step": jnp.float32(7)}})
    config = RestoreCheckpointConfig(path=str(tmp_path), what="state")
    found = restore_state(config, abstract(tree))
    assert_same(found.tree, jax.tree.map(np.asarray, tree))
    assert (found.metadata is None) == (engine == "t5x")
    with pytest.raises(CheckpointMismatch, match="decoder/kernel"):
        restore_state(config, abstract(other_network()))
    with pytest.raises(UserError, match="assignment_map"):
        RestoreCheckpointConfig(path=str(tmp_path), what="state", assignment_map=[("a", "b")])
    with pytest.raises(UserError, match="what is 'everything'"):
        RestoreCheckpointConfig(what="everything")


def test_parameters_of_a_damaged_checkpoint_are_refused(tmp_path):
    save_all(tmp_path, [2, 3])
    exchange_arrays(tmp_path / "checkpoint_3")
    with pytest.raises(CheckpointDamaged, match="not as they were written"):
        restore_parameters(tmp_path, abstract(example()["target"]))
    assert run_folder.checkpoint_steps(tmp_path) == [2, 3]


def test_parameters_by_assignment_from_scratch_and_not_strictly(tmp_path):
    save_all(tmp_path, [3])
    stored = example()["target"]
    initial = on_device(
        {
            "decoder": {"weights": np.full((16, 48), 7, np.float32)},
            "embed": np.full((600,), 7, np.float32),
            "head": np.ones(5),
        }
    )
    config = functools.partial(RestoreCheckpointConfig, path=str(tmp_path))
    renamed = [(r"target/(.*)/weights", r"target/\1/kernel")]

    with pytest.raises(CheckpointMismatch, match="missing in the checkpoint: target/decoder/weights"):
        restore_parameters(config(), abstract(initial), initial)
    with pytest.raises(CheckpointMismatch, match="missing in the checkpoint: target/head"):
        restore_parameters(config(assignment_map=renamed, strict=False), abstract(initial), initial)
    with pytest.raises(CheckpointMismatch, match="only in the checkpoint: target/decoder/bias"):
        restore_parameters(config(assignment_map=renamed, fallback_to_scratch=True), abstract(initial), initial)
    with pytest.raises(UserError, match=r"assignment_map.*target/nothing"):
        restore_parameters(config(assignment_map=[*renamed, ("target/nothing", None)]), abstract(initial), initial)

    loose = config(assignment_map=renamed, strict=False, fallback_to_scratch=True)
    params = restore_parameters(loose, abstract(initial), initial).params
    expected = {"decoder": {"weights": stored["decoder"]["kernel"]}, "embed": stored["embed"], "head": initial["head"]}
    assert_same(params, jax.tree.map(np.asarray, expected))

    dropped = config(assignment_map=[*renamed, ("target/(embed|head)", None)], strict=False)
    params = restore_parameters(dropped, abstract(initial), initial).params
    assert_same(params, jax.tree.map(np.asarray, expected | {"embed": initial["embed"]}))
    with pytest.raises(CheckpointError, match="come from scratch"):
        restore_parameters(dropped, abstract(initial))


# Processes of their own.


def start(program: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(PROGRAMS), program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_group(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_restores_on_other_meshes_and_fewer_devices(tmp_path):
    program = start("meshes", tmp_path, devices=8)
    output, _ = program.communicate(timeout=120)
    assert program.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_two_processes_decide_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    programs = [start("processes", tmp_path, port, index, devices=2) for index in range(2)]
    try:
        for program in programs:
            output, _ = program.communicate(timeout=120)
            assert program.returncode == 0 and "both agree" in output, output[-3000:]
    finally:
        for program in programs:
            if program.poll() is None:
                kill_group(program)
    assert run_folder.set_aside_checkpoints(tmp_path) == ["checkpoint_2-0", "checkpoint_3-0"]


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_whole_checkpoint_is_there(tmp_path):
    """SIGKILL to a process group that writes without pause; most kills fall inside a write, and three must."""
    rng = random.Random(os.getpid())  # Other moments in every run.
    mesh = make_mesh(MeshConfig())
    inside_a_write, newest = 0, 0
    for attempt in range(12):
        program = start("write", tmp_path)
        try:
            deadline = time.monotonic() + 60
            while len(run_folder.checkpoint_steps(tmp_path)) < 2 or run_folder.checkpoint_steps(tmp_path)[-1] <= newest:
                assert program.poll() is None, program.stdout.read()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            if attempt % 2:  # And at every stage of a write, from its first file on.
                while not list(tmp_path.glob("checkpoint_*.orbax-checkpoint-tmp*")):
                    pass
                time.sleep(rng.uniform(0, 0.05))
        finally:
            kill_group(program)
        leftovers = list(tmp_path.glob("checkpoint_*.orbax-checkpoint-tmp*"))
        inside_a_write += bool(leftovers)
        written = run_folder.checkpoint_steps(tmp_path)[-1]
        with Checkpointer(tmp_path, SaveCheckpointConfig(keep=2)) as checkpointer:
            restored = checkpointer.restore(kernel_abstract(mesh, state_at(0)))
        assert restored.step == written > newest
        assert_same(restored.tree, state_at(written))
        assert restored.dataset_state == {"next": written + 1}
        assert restored.metadata == {"window": [written, written / 3]} and restored.set_aside == ()
        assert not list(tmp_path.glob("checkpoint_*.orbax-checkpoint-tmp*"))
        newest = written
        if inside_a_write >= 3 and attempt >= 4:
            break
    assert inside_a_write >= 3
