"""Batch inference over a seqio task with a checkpoint of random parameters, against one forward pass an example."""

import json

import jax
import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm import export, generate, infer
from t5x_ssm.errors import UserError
from t5x_ssm.inference.beam_search import BeamSearcher
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import checkpoints
from tasks import vocabularies

PAIRS = [("two and two", "four"), ("", "nothing before"), ("a" * 40, "b" * 21), ("x", ""), ("last", "one é")]
NETWORK = Decoder(vocab_size=259, embed_dim=8, num_layers=2, mixers={"gss": lambda **kw: GSS(state_size=4, **kw)})
CONFIG = """
include 'quickstart.gin'
MODEL_DIR = '{folder}'
MIXTURE_OR_TASK_NAME = 'pairs'
decoder.Decoder.embed_dim = 8
decoder.Decoder.num_layers = 2
gss.GSS.state_size = 4
"""


@pytest.fixture(scope="module")
def params():
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(NETWORK, tokens, tokens, enable_dropout=False)
    # Logits with a spread.
    params["token_embedder"]["embedding"] = 3.0 * params["token_embedder"]["embedding"]
    return params


@pytest.fixture(scope="module")
def run_folder(params, tmp_path_factory):
    seqio = pytest.importorskip("seqio")
    import tensorflow as tf

    def source(texts):
        def dataset_fn(split, shuffle_files, seed=None):
            del split, shuffle_files, seed
            return tf.data.Dataset.from_tensor_slices(texts)

        return seqio.FunctionDataSource(dataset_fn, splits=["validation"])

    def add(name, texts):
        features = {key: seqio.Feature(vocabularies.byte_vocabulary(), add_eos=key == "targets") for key in texts}
        if name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add(
                name,
                source=source(texts),
                preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
                output_features=features,
            )

    inputs, targets = (list(column) for column in zip(*PAIRS, strict=True))
    add("pairs", {"inputs": inputs, "targets": targets})
    add("plain_texts", {"targets": targets})
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.gin").write_text(CONFIG.format(folder=folder))
    tree = {"target": params, "state": {"step": jax.numpy.asarray(3), "param_states": {}}}
    with checkpoints.Checkpointer(folder) as checkpointer:
        description = vocabularies.describe(vocabularies.byte_vocabulary())
        checkpointer.save(3, tree, {}, {"vocabulary": description})
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def log_likelihood(params, before, counted):
    """(sum of log p of the counted tokens, whether all are the likeliest), by one forward pass."""
    ids = np.array([[0, *before, *counted]])
    logits = NETWORK.apply({"params": params}, ids[:, :-1], ids[:, :-1], enable_dropout=False)
    log_p = scipy.special.log_softmax(np.asarray(logits[0, len(before) :], np.float64), axis=-1)
    chosen = log_p[np.arange(len(counted)), counted]
    return chosen.sum(), bool(np.all(log_p.argmax(-1) == counted))


@pytest.mark.slow
def test_scores_are_those_of_a_forward_pass(run_folder, params, capsys):
    assert infer.main([f"--model_dir={run_folder}", "--mode=score", "--batch_size=3"]) == 0
    written = lines(run_folder / "inference", "pairs-validation-score")
    assert [(line["inputs"], line["targets"]) for line in written] == PAIRS
    for line, (inputs, targets) in zip(written, PAIRS, strict=True):
        counted = [*vocabularies.encode_bytes(targets), vocabularies.EOS_ID]
        expected, greedy = log_likelihood(params, vocabularies.encode_bytes(inputs), counted)
        assert line["tokens"] == len(counted)
        np.testing.assert_allclose(line["score"], expected, rtol=1e-4)
        assert line["greedy"] == greedy
    greedy_share = sum(line["greedy"] for line in written) / len(written)
    printed = capsys.readouterr().out
    assert "5 examples" in printed and f"{greedy_share:.1%} greedy" in printed
    assert not list((run_folder / "inference").glob("*.partial"))


@pytest.mark.slow
def test_a_model_that_left_and_came_back_scores_the_same(run_folder, tmp_path):
    pytest.importorskip("safetensors")
    assert export.main([f"--model_dir={run_folder}", f"--output_dir={tmp_path}/model"]) == 0
    assert export.main([f"--input_dir={tmp_path}/model", f"--output_dir={tmp_path}/back"]) == 0
    for folder, output in ((run_folder, "before"), (tmp_path / "back", "after")):
        flags = [f"--model_dir={folder}", "--mode=score", "--num_examples=3", f"--output_dir={tmp_path}/{output}"]
        assert infer.main(flags) == 0
    before, after = (lines(tmp_path / output, "pairs-validation-score") for output in ("before", "after"))
    assert len(before) == 3 and before == after


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_batch_and_continue_the_inputs(run_folder, params):
    flags = [f"--model_dir={run_folder}", "--max_new_tokens=5", "--temperature=1.2", "--seed=4"]
    for size in (2, 5):
        assert infer.main([*flags, f"--batch_size={size}", f"--output_dir={run_folder}/{size}"]) == 0
    by_two, by_five = (lines(run_folder / str(size), "pairs-validation-predict") for size in (2, 5))
    assert by_two == by_five
    assert len({line["prediction"] for line in by_two}) > 1

    # Greedy predictions score as greedy ones.
    greedy = [f"--model_dir={run_folder}", "--max_new_tokens=4", f"--output_dir={run_folder}/greedy"]
    assert infer.main([*greedy, "--num_examples=2"]) == 0
    predicted = lines(run_folder / "greedy", "pairs-validation-predict")
    assert [line["inputs"] for line in predicted] == [inputs for inputs, _ in PAIRS[:2]]
    writer = generate.Writer(infer.Generator(NETWORK, params), generate.byte_codec())
    for line in predicted:
        shown = []
        generate.write(writer, line["inputs"], 1, 4, infer.Sampling(0.0), 0, shown.append)
        continuation = "".join(shown).removeprefix(line["inputs"]).removesuffix("\n")
        # The vocabulary drops bytes that are no UTF-8, the stream shows them as U+FFFD.
        assert continuation.replace("\ufffd", "") == line["prediction"].replace("\ufffd", "")


@pytest.mark.slow
def test_predictions_of_beams_are_those_of_the_search_alone(run_folder, params):
    flags = [f"--model_dir={run_folder}", "--max_new_tokens=3", "--batch_size=3"]
    settings = {"greedy": [], "beams": ["--beams=8", "--length_penalty=0"]}
    for name, more in settings.items():
        assert infer.main([*flags, *more, f"--output_dir={run_folder}/{name}"]) == 0
    greedy, beams = (lines(run_folder / name, "pairs-validation-predict") for name in settings)
    # One example at a time, without the command.
    network = BeamSearcher(infer.Generator(NETWORK, params))
    for line, (inputs, _) in zip(beams, PAIRS, strict=True):
        before = np.array([vocabularies.encode_bytes(inputs)], np.int32).reshape(1, -1)
        state = network.generator.read(network.generator.start(1), before)
        found = network.search(state, 3, 8, length_penalty=0.0, sampling=infer.Sampling(0.0, vocab_size=259))
        ids = [i for i in found.tokens[0, 0].tolist() if i > 1]
        assert line["prediction"] == vocabularies.byte_vocabulary().decode(ids)
    assert [line["prediction"] for line in beams] != [line["prediction"] for line in greedy]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beams=0"], "infer.beams = 0"),
        (["--beams=2", "--top_p=0.5"], "leave temperature, top_k and top_p"),
        (["--length_penalty=1"], "set infer.beams above 1"),
    ],
)
def test_settings_of_beams_that_mean_nothing_are_refused(run_folder, flags, message):
    with pytest.raises(UserError, match=message):
        infer.main([f"--model_dir={run_folder}", *flags])


@pytest.mark.slow
def test_a_task_without_inputs_is_cut_into_prompt_and_rest(run_folder):
    with pytest.raises(UserError, match="--prompt_length"):
        infer.main([f"--model_dir={run_folder}", "--task=plain_texts"])
    flags = [f"--model_dir={run_folder}", "--task=plain_texts", "--mode=score", "--prompt_length=3"]
    assert infer.main(flags) == 0
    written = lines(run_folder / "inference", "plain_texts-validation-score")
    assert [line["inputs"] + line["targets"] for line in written] == [targets for _, targets in PAIRS]
    assert [line["tokens"] for line in written] == [max(len(t.encode()) + 1 - 3, 0) for _, t in PAIRS]


@pytest.mark.slow
def test_a_tasks_metrics_are_of_the_scores_that_are_written(run_folder, tmp_path, monkeypatch):
    """SuperGLUE's COPA in the published form: the answer is the choice of the higher score."""
    questions = [("The rain fell.", "It got wet.", "It flew.", 0), ("He ran.", "He sat.", "He was late.", 1)] * 2
    (tmp_path / "COPA").mkdir()
    with (tmp_path / "COPA" / "val.jsonl").open("w") as file:
        for i, (premise, first, second, label) in enumerate(questions):
            record = {"premise": premise, "choice1": first, "choice2": second, "question": "effect", "label": label}
            file.write(json.dumps(record | {"label": (label + (i > 1)) % 2, "idx": i}) + "\n")
    monkeypatch.setenv("T5X_SSM_SUPERGLUE", str(tmp_path))
    flags = [f"--model_dir={run_folder}", "--task=superglue_copa", "--mode=score", f"--output_dir={tmp_path}"]
    assert infer.main(flags) == 0
    written = lines(tmp_path, "superglue_copa-validation-score")
    assert [line["inputs"] for line in written[:4:2]] == ["The rain fell therefore", "He ran therefore"]
    scores = np.array([line["score"] for line in written]).reshape(4, 2)
    sizes = np.array([len(line["targets"]) for line in written]).reshape(4, 2)
    right = np.array([0, 1, 1, 0])
    found = json.loads((tmp_path / "superglue_copa-validation-score-metrics.json").read_text())
    assert found["accuracy"] == 100 * np.mean(scores.argmax(1) == right) == 50
    assert found["accuracy_by_length"] == 100 * np.mean((scores / sizes).argmax(1) == right)
    assert (found["examples"], found["questions"]) == (8, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--task=pears", "pairs"),
        ("--split=train", "validation"),
        ("--batch_size=0", "batch_size"),
        ("--top_p=2", "top_p"),
        ("--gin.infer.batch_sise=3", "batch_size"),
    ],
)
def test_mistakes_name_the_setting(run_folder, flag, message):
    with pytest.raises(UserError, match=message):
        infer.main([f"--model_dir={run_folder}", flag])
