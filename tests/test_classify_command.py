"""A published recipe by its command, tiny: a classifier trains, goes on, and is evaluated from its run folder alone."""

import json

import numpy as np
import pytest
from token_caches import write_labelled
from training_command import run

from t5x_ssm import eval as evaluation
from t5x_ssm import generate
from t5x_ssm.errors import UserError
from t5x_ssm.training import manifest
from t5x_ssm.training.metrics import history

# S5's recipe for ListOps, over sequences whose first token tells the class.
SETTINGS = {
    "MIXTURE_OR_TASK_NAME": "first_token",
    "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 1},
    "BATCH_SIZE": 8,
    "EVAL_PERIOD": 10,
    "WARMUP_STEPS": 2,
    "LEARNING_RATE": 0.03,
    "NUM_CLASSES": 2,
    "NUM_LAYERS": 2,
    "EMBED_DIM": 16,
    "EMBED_INIT_SCALE": 1.0,
    "DROPOUT_RATE": 0.1,
    "trainer.TrainerConfig.log_period": 10,
    "trainer.TrainerConfig.num_microbatches": 2,
    "trainer.TrainerConfig.tensorboard": False,
    "checkpoints.SaveCheckpointConfig.period": 10,
}


def arguments(model_dir, **settings):
    bindings = {"MODEL_DIR": model_dir} | SETTINGS | settings
    return ["--gin_file=models/s5_listops.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())]


def split(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count).tolist()
    return [[8 + 3 * label] * random.integers(2, 12) for label in labels], labels


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    splits = {"train": split(64, 0), "validation": split(13, 1), "test": split(21, 2)}
    write_labelled(root, "first_token", splits, classes=2, size=18)
    return {"T5X_SSM_CACHE_DIR": root, "JAX_COMPILATION_CACHE_DIR": root / "xla"}


@pytest.mark.slow
def test_a_classifier_trains_goes_on_and_is_evaluated(tmp_path, environment, monkeypatch):
    folder = tmp_path / "run"
    status, text = run(arguments(folder, TRAIN_STEPS=20), log=tmp_path / "first.txt", **environment)
    assert status == 0, text
    status, text = run(arguments(folder, TRAIN_STEPS=40), log=tmp_path / "second.txt", **environment)
    assert status == 0, text
    assert f"Continuing {folder} from step 20 of 40" in text and " accuracy" in text

    lines = history(folder / "metrics.jsonl", split="train")
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert {"loss", "accuracy"} <= lines[0].keys() and not {"nats_per_token", "bits_per_token"} & lines[0].keys()
    # More positions than examples were worked on.
    assert lines[-1]["tokens_total"] > 2 * 40 * 8
    assert lines[-1]["accuracy"] > 0.95 and lines[-1]["loss"] < lines[0]["loss"]
    held_out = history(folder / "metrics.jsonl", split="validation/first_token")
    assert [line["step"] for line in held_out] == [10, 20, 30, 40]
    names = manifest.arrays(manifest.read(folder / "checkpoint_40"))
    assert sum(name.startswith("flax_mutables/batch_stats/") for name in names) == 2

    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(environment["T5X_SSM_CACHE_DIR"]))
    results = {}
    for name in ("validation", "test"):
        assert evaluation.main([f"--model_dir={folder}", f"--gin.EVAL_SPLIT={name}"]) == 0
        results[name] = json.loads((folder / "evaluation" / "eval_results.json").read_text())
    assert results["validation"]["step"] == "40" and results["test"]["split"] == "test"
    figures = {name: result["tasks"]["first_token"] for name, result in results.items()}
    assert {name: f["examples"] for name, f in figures.items()} == {"validation": 13, "test": 21}
    # What training wrote about the same split and step; batch norms used the averages of the checkpoint.
    assert figures["validation"]["accuracy"] == held_out[-1]["accuracy"]
    np.testing.assert_allclose(figures["validation"]["loss"], held_out[-1]["loss"], rtol=1e-5)
    with pytest.raises(UserError, match="--lengths"):
        evaluation.main([f"--model_dir={folder}", "--lengths=6"])
    with pytest.raises(UserError, match="classifier, which writes no text"):
        generate.main([f"--model_dir={folder}", "--prompt=a"])


@pytest.mark.slow
def test_data_of_more_classes_than_the_model_has_is_refused(tmp_path, environment):
    given = arguments(tmp_path / "run", TRAIN_STEPS=4, NUM_CLASSES=1)
    status, text = run(given, log=tmp_path / "log.txt", **environment)
    assert status == 2 and "num_classes = 1" in text and "Traceback" not in text
