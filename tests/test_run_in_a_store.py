"""A run whose MODEL_DIR is at gs://: the real commands, with the store of `object_store` in Google's place."""

import json

import pytest
from object_store import ObjectStore
from stored_runs import stored
from training_command import ROOT, Command, arguments, run

from t5x_ssm.training.metrics import history

STEPS, PERIOD = 30, 3
URL, PREFIX = "gs://bucket/run", "bucket/run/"
SETTINGS = {
    "TRAIN_STEPS": STEPS,
    "EVAL_STEPS": None,
    "EVAL_PERIOD": 0,
    "trainer__TrainerConfig__log_period": 7,
    "trainer__TrainerConfig__tensorboard": True,
    "checkpoints__SaveCheckpointConfig__period": PERIOD,
    "checkpoints__SaveCheckpointConfig__keep": 2,
}
# Compiled in haste, as in `tiny.jit`, and once for all commands.
HASTE = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, training_caches):
    """The same run in a folder, never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    status, text = run(arguments(folder / "run", **SETTINGS), log=folder / "log.txt", **training_caches, **HASTE)
    assert status == 0, text
    return folder / "run"


@pytest.fixture
def store(tmp_path):
    with ObjectStore() as found:
        found.environment["TMPDIR"] = str(tmp_path)  # A start that is killed leaves its files there.
        yield found


def committed(store) -> set[int]:
    """Steps of the whole checkpoints."""
    marks = (name.removeprefix(PREFIX).split("/") for name in store.names(f"{PREFIX}checkpoint_"))
    return {int(parts[0].rpartition("_")[2]) for parts in marks if parts[1:] == ["commit_success.txt"]}


def copied(store, folder):
    """The run folder as files of this machine."""
    for name in store.names(PREFIX):
        path = folder / name.removeprefix(PREFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.objects[name])
    return folder


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_run_of_a_folder(store, training_caches, reference, tmp_path):
    # A TensorFlow that is found, and cannot be imported: it must not be what reaches the store.
    broken = tmp_path / "path" / "tensorflow"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise SystemError('a run needs no TensorFlow')")
    environment = training_caches | store.environment | HASTE | {"PYTHONPATH": f"{broken.parent}:{ROOT}"}
    given = arguments(URL, **SETTINGS)
    first = Command(given, log=tmp_path / "first.txt", **environment)
    assert first.until(lambda: max(committed(store), default=0) >= 2 * PERIOD), first.text()
    first.kill()
    newest = max(committed(store))
    assert 2 * PERIOD <= newest < STEPS

    status, text = run(given, log=tmp_path / "second.txt", **environment)
    assert status == 0, text
    assert f"Continuing {URL} from step {newest} of {STEPS}" in text
    run_folder = copied(store, tmp_path / "run")
    assert stored(run_folder, STEPS) == stored(reference, STEPS)
    lines = history(run_folder / "metrics.jsonl", timings=False)
    assert lines == history(reference / "metrics.jsonl", timings=False)
    assert committed(store) == {STEPS - PERIOD, STEPS}
    top = {name.removeprefix(PREFIX).split("/")[0] for name in store.names(PREFIX)} - {"run.lock"}
    assert {name for name in top if not name.startswith("events")} == {
        path.name for path in reference.iterdir() if not path.name.startswith("events")
    } - {"run.lock"}
    assert sum(name.startswith("events") for name in top) == 2

    module = ["t5x_ssm.eval", f"--model_dir={URL}"]
    status, text = Command([], module=module, log=tmp_path / "eval.txt", **environment).finish()
    assert status == 0, text
    found = json.loads(store.objects[f"{PREFIX}evaluation/eval_results.json"])
    assert found["checkpoint"] == f"{URL}/checkpoint_{STEPS}"
    for task, result in found["lengths"]["32"].items():
        expected = next(line for line in reversed(lines) if line["split"] == f"validation/{task}")
        assert result["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-5)


@pytest.mark.nightly
def test_two_processes_share_a_run(store, training_caches, reference, tmp_path):
    environment = training_caches | store.environment | HASTE
    for steps in (4 * PERIOD, STEPS):
        given = arguments(URL, **SETTINGS | {"TRAIN_STEPS": steps, "schedules__warmup_cosine__total_steps": STEPS})
        module = ["launch.local", "--processes=2", "--", *given]
        status, text = Command([], module=module, log=tmp_path / f"{steps}.txt", **environment).finish()
        assert status == 0, text
    assert f"[1] Continuing {URL} from step {4 * PERIOD} of {STEPS}" in text
    assert committed(store) == {STEPS - PERIOD, STEPS}
    assert any("ocdbt.process_1" in name for name in store.names(f"{PREFIX}checkpoint_{STEPS}/"))
    found = history(copied(store, tmp_path / "run") / "metrics.jsonl", split="train", timings=False)
    expected = history(reference / "metrics.jsonl", split="train", timings=False)
    # The first start logged at its last step too.
    losses = {line["step"]: line["loss"] for line in found}
    for line in expected[-3:]:
        assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-3)


@pytest.mark.nightly
def test_a_start_that_a_later_one_has_overtaken_leaves(store, training_caches, tmp_path):
    environment = training_caches | store.environment | HASTE
    # Too long to end by itself.
    given = arguments(URL, **SETTINGS | {"TRAIN_STEPS": 100_000})
    first = Command(given, log=tmp_path / "first.txt", **environment)
    assert first.until(lambda: max(committed(store), default=0) >= PERIOD), first.text()
    store.write(f"{PREFIX}run.lock", b"process 1 on elsewhere\n")
    newest = max(committed(store))
    status, text = first.finish()
    assert status == 2
    assert "A later start trains in MODEL_DIR=gs://bucket/run (process 1 on elsewhere)" in text.splitlines()[-1]
    assert store.objects[f"{PREFIX}run.lock"] == b"process 1 on elsewhere\n"
    # A save may have begun before.
    assert max(committed(store)) <= newest + PERIOD
