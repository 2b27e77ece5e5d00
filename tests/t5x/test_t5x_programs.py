"""T5X's infer and eval of a native checkpoint write what the network's own forward pass says."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import seqio
import tiny

pytest.importorskip("t5x.models", reason="T5X cannot be imported; docs/t5x.md says how to get it")

from both_engines import Case, optimizer, save_natively
from pairs_task import PAIRS_TASK, texts

from t5x_ssm.training.train_state import TrainState

pytestmark = [pytest.mark.t5x, pytest.mark.slow]

SOURCE, TARGET = 24, 28
VOCABULARY = seqio.ByteVocabulary(extra_ids=0)
HERE = pathlib.Path(__file__).parent

GIN = """
from __gin__ import dynamic_registration
import both_engines
import pairs_task
from t5x import decoding
from t5x_ssm.training import optimizers

include 't5x/{kind}.gin'
include 't5x/{program}.gin'

NETWORK = @both_engines.network()
both_engines.network.name = '{name}'
OPTIMIZER = None
OPTIMIZER_DEF = None
DECODE_FN = @decoding.temperature_sample
decoding.temperature_sample.temperature = 0.0
"""


def parameters(case):
    """Parameters whose argmax is no tie, and never padding."""
    tokens = np.zeros((1, 8), np.int32)
    arguments = (tokens,) * (3 if case.pairs else 2)
    params = tiny.random_parameters(case.network, *arguments, seed=5, enable_dropout=False)
    embedding = 2.0 * params["token_embedder"]["embedding"]
    params["token_embedder"]["embedding"] = embedding.at[0].set(0.0)
    return params


def greedy(case, params) -> list[str]:
    """The validation texts' continuations, one whole forward pass a token and no cache."""
    network = case.network
    forward = jax.jit(lambda *tokens: network.apply({"params": params}, *tokens, tokens[-1], enable_dropout=False))
    found = []
    for text in texts("validation"):
        source = [*VOCABULARY.encode(text), VOCABULARY.eos_id]
        prompt = [0] if case.pairs else [0, *source]
        length = TARGET if case.pairs else SOURCE + TARGET
        fed = np.zeros((1, length), np.int32)
        fed[0, : len(prompt)] = prompt
        inputs = (np.pad(np.array([source], np.int32), [(0, 0), (0, SOURCE - len(source))]),) if case.pairs else ()
        written = []
        for at in range(len(prompt) - 1, length):
            token = int(np.asarray(forward(*inputs, fed))[0, at].argmax())
            written.append(token)
            if token == VOCABULARY.eos_id or at + 1 == length:
                break
            fed[0, at + 1] = token
        found.append(VOCABULARY.decode(written))
    return found


def run(program, case, checkpoint, folder):
    """Runs a program of T5X and returns its output folder."""
    kind = "encoder_decoder" if case.pairs else "decoder_only"
    (folder / f"{program}.gin").write_text(GIN.format(kind=kind, program=program, name=case.name))
    output = folder / f"{program}_output"
    bindings = {
        "MIXTURE_OR_TASK_NAME": f"'{PAIRS_TASK}'",
        "TASK_FEATURE_LENGTHS": {"inputs": SOURCE, "targets": TARGET},
        "CHECKPOINT_PATH": f"'{checkpoint}'",
        f"{program.upper()}_OUTPUT_DIR": f"'{output}'",
        "utils.DatasetConfig.split": "'validation'",
        "utils.DatasetConfig.batch_size": 2,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "t5x_ssm.integrations.t5x", program, f"--gin_file={folder / program}.gin"),
            *(f"--gin.{name}={value}" for name, value in bindings.items()),
        ],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return output


@pytest.mark.parametrize("name", ["spade encoder-decoder", "spade swa*3"])
def test_infer_and_eval_of_a_native_checkpoint(name, tmp_path):
    case = Case(name)
    params = parameters(case)
    save_natively(tmp_path / "run", TrainState.create(params, optimizer()))
    expected = greedy(case, params)
    assert len(set(expected)) > 1 and max(map(len, expected)) > 3

    output = run("infer", case, tmp_path / "run/checkpoint_0", tmp_path)
    (written,) = output.glob("*predict.jsonl-00000-of-00001")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prediction"] for row in rows] == expected

    output = run("eval", case, tmp_path / "run/checkpoint_0", tmp_path)
    (written,) = output.rglob("*metrics.jsonl")
    found = json.loads(written.read_text().splitlines()[-1])
    np.testing.assert_allclose(found["mean_length"], np.mean([len(text) for text in expected]), rtol=1e-6)
