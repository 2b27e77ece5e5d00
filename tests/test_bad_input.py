"""Mistakes of a user, made to the entry points themselves: a message that names the setting, status 2, and nothing lost.

Only what passes through an entry point is here; what a layer, a checkpoint or a feed refuses is tested beside it.
"""

import logging
import pathlib
import shutil
import sys

import numpy as np
import pytest
from training_command import arguments, run, write_corpus

from t5x_ssm import config, eval, generate, train
from t5x_ssm.training.metrics import history
from t5x_ssm.training.run_folder import checkpoint_steps

STEPS = 4
SETTINGS = {
    "TRAIN_STEPS": STEPS,
    "EVAL_PERIOD": 0,
    "EVAL_STEPS": 1,
    "checkpoints__SaveCheckpointConfig__period": 2,
}


@pytest.fixture(autouse=True)
def environment(training_caches, monkeypatch):
    """Token caches made by hand; and the logging that an entry point sets up is undone."""
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(training_caches["T5X_SSM_CACHE_DIR"]))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def finished_run(training_caches, tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T5X_SSM_CACHE_DIR", str(training_caches["T5X_SSM_CACHE_DIR"]))
        assert train.main(arguments(folder, **SETTINGS)) == 0
    assert checkpoint_steps(folder) == [2, STEPS]
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy of that run."""
    return pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Runs an entry point as the command line does; returns what it complains of."""

    def complain(main, given):
        monkeypatch.setattr(sys, "argv", ["python", *given])
        with pytest.raises(SystemExit) as ended:
            config.run_main(main)
        printed = capsys.readouterr().err
        assert ended.value.code == 2, printed
        assert "Traceback" not in printed
        return printed.partition("error: ")[2]

    return complain


def contents(folder):
    """Every file but the lock, by name."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Names.
        ({"gss__GSS__state_sizes": 4}, "Did you mean state_size"),
        ({"gss__GGS__state_size": 4}, "Did you mean gss.GSS"),
        ({"BATCHSIZE": 4}, "Did you mean BATCH_SIZE"),
        ({"BATCH_SIZE": "many"}, "BATCH_SIZE = 'many' is not a whole number"),
        # Sizes of the network.
        ({"decoder__Decoder__embed_dim": 0}, "embed_dim = 0; it must be at least 1"),
        ({"decoder__Decoder__embed_dim": -8}, "embed_dim = -8"),
        ({"decoder__Decoder__embed_dim": 3}, "GSS.channels = 0"),
        ({"decoder__Decoder__num_layers": 0}, "depth of 0"),
        ({"gss__GSS__state_size": 0}, "GSS.state_size = 0"),
        ({"gss__GSS__hidden": -1}, "GSS.hidden = -1"),
        ({"decoder__Decoder__vocab_size": 100}, "more ids than the model's vocabulary size 100"),
        # Choices by name.
        ({"gss__GSS__activation": "gelly"}, "no activation 'gelly'; there are gelu, gelu_tanh"),
        ({"decoder__Decoder__dtype": "bfloat17"}, "dtype = 'bfloat17'"),
        ({"decoder__Decoder__dtype": "int32"}, "dtype = 'int32'"),
        ({"decoder__Decoder__pattern": "gss*"}, "cannot read 'gss*'"),
        ({"decoder__Decoder__pattern": "gss lstm"}, "no mixer is named 'lstm'"),
        ({"decoder__Decoder__pattern": "gss*2"}, "do not repeat to a depth of 1"),
        ({"decoder__Decoder__remat_policy": "some"}, "remat_policy = 'some'; it is one of none, full"),
        # Optimizer and schedule.
        ({"LEARNING_RATE": -0.1}, "-0.1"),
        ({"WARMUP_STEPS": 100}, "warmup_steps"),
        ({"optimizers__adamw__mu_dtype": "bfloat17"}, "adamw.mu_dtype = 'bfloat17'"),
        # Mesh and batch, on one device.
        ({"mesh__MeshConfig__model": 3}, "MeshConfig"),
        ({"mesh__MeshConfig__fsdp": 0}, "MeshConfig.fsdp = 0"),
        ({"mesh__MeshConfig__fsdp": -1}, "only one axis may be -1"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE must be a positive"),
        ({"trainer__TrainerConfig__num_microbatches": 3}, "BATCH_SIZE = 4 must be a multiple of 3"),
        ({"TASK_FEATURE_LENGTHS": 32}, "{'targets': 512}"),
        ({"TASK_FEATURE_LENGTHS": {"targets": 0}}, "must be a positive integer"),
        ({"TRAIN_STEPS": 0}, "total_steps is 0"),
        # Where things lie.
        ({"MODEL_DIR": "s3://bucket/run"}, "MODEL_DIR = 's3://bucket/run'"),
        (
            {"checkpoints__RestoreCheckpointConfig__path": "/nowhere/checkpoint_1"},
            "/nowhere/checkpoint_1 does not exist",
        ),
    ],
)
def test_a_setting_that_no_run_can_have_is_named(complaint, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(train.main, arguments(tmp_path / "run", **SETTINGS | settings))
    assert not checkpoint_steps(tmp_path / "run") and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("num_heads = 3", "Attention.num_heads = 3 does not divide the width 16"),
        ("num_heads = 0", "Attention.num_heads = 0"),
        ("window = 0", "Attention.window = 0"),
        ("span = 'wide'", "Attention.span = 'wide'; it is one of full, sliding, chunk"),
    ],
)
def test_settings_of_attention_are_named(complaint, tmp_path, binding, message):
    file = tmp_path / "attention.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from t5x_ssm.layers import attention\n"
        "from t5x_ssm.layers import gss\n"
        "from t5x_ssm.models import decoder\n"
        "decoder.Decoder.pattern = 'attn'\n"
        "decoder.Decoder.mixers = {'attn': @attention.Attention, 'gss': @gss.GSS}\n"
        f"attention.Attention.{binding}\n"
    )
    quickstart, *bindings = arguments(tmp_path / "run", **SETTINGS)
    assert message in complaint(train.main, [quickstart, f"--gin_file={file}", *bindings])


def test_a_gin_file_that_is_not_there_is_named_with_the_nearest(complaint):
    assert "Did you mean quickstart.gin" in complaint(train.main, ["--gin_file=quikstart.gin"])


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest(complaint, tmp_path):
    text = complaint(train.main, arguments(tmp_path / "run", MIXTURE_OR_TASK_NAME="embeded_books"))
    assert "embeded_books" in text and "embedded_books" in text


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path, training_caches):
    """The real command, on three devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    given = arguments(tmp_path / "run", **SETTINGS)
    status, printed = run(given, log=tmp_path / "log.txt", **training_caches | flags)
    assert status == 2 and "Traceback" not in printed
    assert "BATCH_SIZE = 4 must be a multiple of 3" in printed


def test_a_folder_of_another_run_is_refused_and_left_alone(complaint, finished_run):
    before = contents(finished_run)
    text = complaint(train.main, arguments(finished_run, **SETTINGS, LEARNING_RATE=0.25))
    assert "schedules.warmup_cosine.peak: 0.005 there, 0.25 here" in text and "another MODEL_DIR" in text
    assert contents(finished_run) == before


def test_a_checkpoint_of_another_architecture_is_compared_leaf_by_leaf(complaint, finished_run, tmp_path):
    before = contents(finished_run)
    wider = {"decoder__Decoder__embed_dim": 24, "checkpoints__RestoreCheckpointConfig__path": finished_run}
    for text in (
        complaint(train.main, arguments(tmp_path / "run", **SETTINGS | wider)),
        complaint(eval.main, [f"--model_dir={finished_run}", "--gin.decoder.Decoder.embed_dim=24"]),
    ):
        assert "token_embedder/embedding" in text and "16" in text and "24" in text
    untied = complaint(eval.main, [f"--model_dir={finished_run}", "--gin.decoder.Decoder.logits_via_embedding=False"])
    assert "logits/kernel" in untied
    assert contents(finished_run) == before


def test_another_vocabulary_is_refused(complaint, finished_run, tmp_path, monkeypatch):
    from token_caches import VOCABULARY

    write_corpus(tmp_path, vocabulary=VOCABULARY | {"hash": "cd"})
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path))
    before = contents(finished_run)
    for main, given in (
        (train.main, arguments(finished_run, **SETTINGS)),
        (eval.main, [f"--model_dir={finished_run}", f"--output_dir={tmp_path}"]),
    ):
        assert "not the one that the checkpoint was trained with" in complaint(main, given)
    assert contents(finished_run) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths=32,x"], "--lengths=32,x"),
        (["--lengths=0"], "evaluate.lengths has 0"),
        (["--across_documents=-1"], "evaluate.across_documents has -1"),
    ],
)
def test_lengths_that_no_window_has_are_refused(complaint, finished_run, tmp_path, flags, message):
    assert message in complaint(eval.main, [f"--model_dir={finished_run}", f"--output_dir={tmp_path}", *flags])


@pytest.mark.parametrize("main", [eval.main, generate.main])
def test_a_step_that_was_not_saved_is_refused_with_those_that_were(complaint, finished_run, main):
    wanted = f"--gin.CHECKPOINT_PATH={finished_run / 'checkpoint_99'}"
    prompt = ["--prompt=The"] if main is generate.main else []
    text = complaint(main, [f"--model_dir={finished_run}", wanted, *prompt])
    assert "checkpoint_99 does not exist" in text and "holds checkpoint_2, checkpoint_4" in text


@pytest.mark.slow
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_it_goes_on(run_folder, capsys):
    damaged = max((run_folder / f"checkpoint_{STEPS}" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (run_folder / "checkpoint_6.orbax-checkpoint-tmp").mkdir()
    lines = history(run_folder / "metrics.jsonl", timings=False)
    assert train.main(arguments(run_folder, **SETTINGS)) == 0
    assert checkpoint_steps(run_folder) == [2, STEPS]
    aside = run_folder / "bad" / f"checkpoint_{STEPS}-0"
    assert (aside / damaged.relative_to(run_folder / f"checkpoint_{STEPS}")).is_file()
    assert (run_folder / "bad" / f"{aside.name}.reason.txt").read_text().strip()
    assert not (run_folder / "checkpoint_6.orbax-checkpoint-tmp").exists()
    assert history(run_folder / "metrics.jsonl", timings=False) == lines


def test_a_run_without_a_whole_checkpoint_is_not_silently_begun_again(complaint, run_folder):
    for step in checkpoint_steps(run_folder):
        shutil.rmtree(run_folder / f"checkpoint_{step}" / "state")
    text = complaint(train.main, arguments(run_folder, **SETTINGS))
    assert "No whole checkpoint is left" in text and "another MODEL_DIR" in text
    assert len(list((run_folder / "bad").glob("checkpoint_*[0-9]"))) == 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_skipped_and_counted_and_then_stops_with_the_batch(complaint, tmp_path):
    """The first update throws the parameters so far out that no later loss is finite."""
    settings = {
        "LEARNING_RATE": 1e30,
        "WARMUP_STEPS": 0,
        "trainer__TrainerConfig__max_skipped_in_a_row": 2,
        "trainer__TrainerConfig__log_period": 1,
    }
    folder = tmp_path / "run"
    text = complaint(train.main, arguments(folder, **SETTINGS | settings | {"TRAIN_STEPS": 8}))
    assert "not finite for 2 steps in a row, up to step 3" in text and "max_skipped_in_a_row" in text
    (path,) = (folder / "bad_batches").iterdir()
    assert str(path) in text
    with np.load(path) as batch:
        assert batch["decoder_target_tokens"].shape == (4, 32)
    skipped = [line["skipped"] for line in history(folder / "metrics.jsonl", split="train")]
    assert skipped[:2] == [0, 1]
    assert checkpoint_steps(folder), "what was saved before is still there"
