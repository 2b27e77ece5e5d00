"""Two processes evaluate and infer together what one does alone."""

import json
import pathlib

import evaluation_programs
import jax
import numpy as np
import pytest
import tiny
from training_command import MIXTURE, ROOT, Command, write_corpus

from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import checkpoints
from tasks import vocabularies

CONFIG = """
include 'quickstart.gin'
MODEL_DIR = '{folder}'
MIXTURE_OR_TASK_NAME = '{mixture}'
BATCH_SIZE = 4
TASK_FEATURE_LENGTHS = {{'targets': 32}}
decoder.Decoder.embed_dim = 8
decoder.Decoder.num_layers = 1
gss.GSS.state_size = 4
"""


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A checkpoint of random parameters, beside a token cache of bytes."""
    network = Decoder(vocab_size=259, embed_dim=8, num_layers=1, mixers={"gss": lambda **kw: GSS(state_size=4, **kw)})
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(network, tokens, tokens, enable_dropout=False)
    vocabulary = vocabularies.describe(vocabularies.byte_vocabulary())
    folder = tmp_path / "run"
    with checkpoints.Checkpointer(folder) as checkpointer:
        tree = {"target": params, "state": {"step": jax.numpy.asarray(3), "param_states": {}}}
        checkpointer.save(3, tree, {}, {"vocabulary": vocabulary})
    (folder / "config.gin").write_text(CONFIG.format(folder=folder, mixture=MIXTURE))
    (tmp_path / "tokens").mkdir()
    write_corpus(tmp_path / "tokens", vocabulary=vocabulary)
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "tokens"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    return folder


@pytest.mark.slow
def test_two_processes_find_what_one_does(run_folder, tmp_path):
    flags = ["--processes=2", "--devices_per_process=2", "--module=evaluation_programs"]
    module = ["launch.local", *flags, "--", str(run_folder), str(tmp_path / "two")]
    path = f"{ROOT}:{pathlib.Path(__file__).parent}"
    together = Command([], log=tmp_path / "log.txt", module=module, PYTHONPATH=path)
    evaluation_programs.main([str(run_folder), str(tmp_path / "one")])
    status, text = together.finish()
    assert status == 0, text

    one, two = (json.loads((tmp_path / name / "eval/eval_results.json").read_text()) for name in ("one", "two"))
    assert two["lengths"]["32"].keys() == one["lengths"]["32"].keys() == {"prose", "code"}
    for task, expected in one["lengths"]["32"].items():
        found = two["lengths"]["32"][task]
        assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
        for name in ("nats_per_token", "accuracy"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
        curves = (result["by_position"]["bits_per_byte"] for result in (found, expected))
        np.testing.assert_allclose(*curves, rtol=1e-5)

    for mode in ("score", "predict"):
        one, two = (
            [json.loads(line) for line in (tmp_path / f"{name}/infer/embedded_books-validation-{mode}.jsonl").open()]
            for name in ("one", "two")
        )
        assert len(one) == 5
        for found, expected in zip(two, one, strict=True):
            score = expected.pop("score", 0.0)
            assert found.pop("score", 0.0) == pytest.approx(score, rel=1e-6)
            assert found == expected
