"""A run folder is all that evaluation and generation need: trains a tiny model, then uses it from its folder alone."""

import json
import math
import os

import pytest

from t5x_ssm import eval as evaluation
from t5x_ssm import generate, train
from t5x_ssm.errors import UserError
from t5x_ssm.training.metrics import history

LENGTH = 32


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "MODEL_DIR": os.path.relpath(folder),
        "MIXTURE_OR_TASK_NAME": "embedded_books",
        "TASK_FEATURE_LENGTHS": {"targets": LENGTH},
        "BATCH_SIZE": 4,
        "TRAIN_STEPS": 12,
        "WARMUP_STEPS": 2,
        "EVAL_STEPS": 2,
        "decoder.Decoder.embed_dim": 16,
        "decoder.Decoder.num_layers": 1,
        "gss.GSS.state_size": 4,
        "trainer.TrainerConfig.log_period": 4,
        "trainer.TrainerConfig.profile_at_step": 6,
        "trainer.TrainerConfig.profile_steps": 1,
    }
    assert (
        train.main(["--gin_file=quickstart.gin", *(f"--gin.{name}={value}" for name, value in settings.items())]) == 0
    )
    return folder


@pytest.mark.slow
def test_training_leaves_a_complete_run_folder(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert {"checkpoint_12", "config.gin", "model-info.txt", "metrics.jsonl", "run.json", "profile"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    items = {path.name for path in (run_folder / "checkpoint_12").iterdir()}
    assert {"state", "dataset", "metadata"} <= items
    info = (run_folder / "model-info.txt").read_text()
    assert "decoder/segment_0/block_0/mixer/ssm/c_re" in info
    assert "state_space" in info
    assert "gss.GSS.state_size = 4" in (run_folder / "config.gin").read_text()


@pytest.mark.slow
def test_metrics_speak_of_every_step_once_and_loss_falls(run_folder):
    lines = history(run_folder / "metrics.jsonl", split="train")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line["steps"] == 4 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert math.isclose(line["perplexity"], math.exp(line["nats_per_token"]))
    held_out = history(run_folder / "metrics.jsonl", split="validation/embedded_books")
    assert [line["step"] for line in held_out] == [12]


@pytest.mark.slow
def test_evaluation_reads_every_byte_at_every_length(run_folder, capsys):
    assert evaluation.main([f"--model_dir={run_folder}", f"--lengths={LENGTH},{4 * LENGTH}"]) == 0
    results = json.loads((run_folder / "evaluation" / "eval_results.json").read_text())
    short, long = (results["lengths"][str(length)]["embedded_books"] for length in (LENGTH, 4 * LENGTH))
    assert short["tokens"] == long["tokens"]
    assert short["bytes"] == long["bytes"] > 0
    for result in (short, long):
        # A byte vocabulary's loss, after twelve steps: better than uniform over the vocabulary, far from perfect.
        assert 2.0 < result["bits_per_byte"] < math.log2(259)
        nats = result["nats_per_token"] * result["tokens"]
        assert math.isclose(result["bits_per_byte"], nats / math.log(2) / result["bytes"], rel_tol=1e-6)
    assert "embedded_books" in capsys.readouterr().out


@pytest.mark.slow
def test_a_state_can_be_carried_across_documents(run_folder, tmp_path):
    """The flag gives what running text (pack=False) gives, beside windows whose documents are apart."""
    length = 4 * LENGTH
    command = [f"--model_dir={run_folder}", f"--lengths={length}", f"--output_dir={tmp_path}"]
    results = []
    for more in ([f"--across_documents={length}"], ["--gin.train_eval/feed.DatasetConfig.pack=False"]):
        assert evaluation.main([*command, *more]) == 0
        results.append(json.loads((tmp_path / "eval_results.json").read_text()))
    both, running = results
    apart, across = (both[kind][str(length)]["embedded_books"] for kind in ("lengths", "across_documents"))
    assert across == running["lengths"][str(length)]["embedded_books"] and not running["across_documents"]
    assert (across["tokens"], across["bytes"]) == (apart["tokens"], apart["bytes"])
    assert 0 < abs(across["nats_per_token"] - apart["nats_per_token"]) < 0.2


@pytest.mark.slow
def test_generation_continues_the_prompt_and_repeats_itself_with_a_seed(run_folder, capsys):
    command = [f"--model_dir={run_folder}", "--prompt=The", "--max_new_tokens=8", "--seed=3"]
    texts = []
    for _ in range(2):
        assert generate.main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The")
    assert texts[0] == texts[1]


def test_an_empty_prompt_is_refused_with_a_way_out(run_folder):
    with pytest.raises(UserError, match="--unconditional"):
        generate.main([f"--model_dir={run_folder}", "--prompt="])


def test_folders_named_as_ours_are_do_not_hide_the_gin_files(tmp_path, monkeypatch):
    for name in ("runs", "models", "networks", "optimizers"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="MODEL_DIR must be set"):
        train.main(["--gin_file=quickstart.gin"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        evaluation.main([f"--model_dir={tmp_path}"])


@pytest.mark.slow
def test_a_relative_run_folder_works(run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder.parent)
    assert generate.main([f"--model_dir={run_folder.name}", "--prompt=The", "--max_new_tokens=1"]) == 0
    assert capsys.readouterr().out.startswith("The")
