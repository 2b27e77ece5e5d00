"""From pretraining to a sequence-to-sequence task by the commands, on data that a tiny model learns, judged by hand."""

import json
import types

import numpy as np
import pytest
from stored_runs import stored
from token_caches import write_mixture

from t5x_ssm import eval as evaluation
from t5x_ssm import infer, train
from t5x_ssm.errors import UserError
from t5x_ssm.training import restoring
from t5x_ssm.training.checkpoints import RestoreCheckpointConfig
from t5x_ssm.training.metrics import history
from tasks import cache

# A summary is the document's first word.
WORDS = ("amber", "birch", "cedar", "denim", "ebony", "flint")
STEPS = 140
SPADE = {
    "EMBED_DIM": 32,
    "NUM_LAYERS": 1,
    "ENCODER_PATTERN": "spade",
    "NUM_HEADS": 2,
    "MLP_DIM": 64,
    "RADIUS_PLUS_ONE": 8,
    "MAX_TARGET_LENGTH": 32,
    "FREEZE_STATE_SPACE": True,  # as published; it also compiles in less time
    "s4.S4StateSpace.state_size": 8,
}
GSS = {"decoder.Decoder.embed_dim": 32, "decoder.Decoder.num_layers": 2, "gss.GSS.state_size": 16}
# Equal in both runs, which thus compile one program.
COMMON = {
    "BATCH_SIZE": 16,
    "LEARNING_RATE": 1e-2,
    "schedules.warmup_cosine.total_steps": STEPS,
    "WARMUP_STEPS": 5,
    "EVAL_PERIOD": 0,
    "EVAL_STEPS": 2,
    "Z_LOSS": 0.0,
    "optimizers.adamw.weight_decay": 0.0,
    "trainer.TrainerConfig.log_period": 5,
    "trainer.TrainerConfig.tensorboard": False,
}


def documents(count, seed):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 3)) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 400, 0), ("validation", 24, 1)):
        records = [json.dumps({"document": text, "summary": text.split()[0]}) + "\n" for text in documents(count, seed)]
        (root / f"{split}.jsonl").write_text("".join(records))
    for split, count, seed in (("train", 400, 0), ("dev", 24, 1)):
        table = [f"{text}\t{int(text < 'd')}\n" for text in documents(count, seed)]
        (root / "SST-2").mkdir(exist_ok=True)
        (root / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(table))
    tokens = [[*(3 + byte for byte in text.encode()), 1] for text in documents(60, 2)]
    write_mixture(root, "words", {"words": {"train": tokens, "validation": tokens[:20]}}, vocabulary=byte_vocabulary())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T5X_SSM_CACHE_DIR", str(root))
        patch.setenv("T5X_SSM_SUMMARIZATION", str(root))
        patch.setenv("T5X_SSM_GLUE", str(root))
        yield root


def byte_vocabulary():
    from tasks import vocabularies

    return vocabularies.describe(vocabularies.byte_vocabulary())


def run(files, settings):
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    assert train.main([*(f"--gin_file={name}.gin" for name in files), *bindings]) == 0


def exact(folder):
    """The share of validation documents for which the first word was written, from the file of predictions."""
    written = [json.loads(line) for line in (folder / "summarization-validation-predict.jsonl").open()]
    assert [line["inputs"] for line in written] == [f"summarize: {text}" for text in documents(24, 1)]
    return sum(line["prediction"] == line["inputs"].split()[1] for line in written) / len(written)


def check_metrics(folder, share):
    """Of summaries of one word ROUGE-1 and ROUGE-L are the share that is right, and there are no pairs of words."""
    pytest.importorskip("rouge_score")
    found = json.loads((folder / "summarization-validation-predict-metrics.json").read_text())
    assert found["examples"] == 24 and found["rouge2"] == 0
    assert found["rouge1"] == found["rougeL"] == pytest.approx(100 * share)


def test_parameters_of_another_vocabulary_are_refused(monkeypatch):
    scratch = types.SimpleNamespace(params="scratch", replace=lambda params: params)
    run = types.SimpleNamespace(initial_state=lambda: scratch, abstract_state=scratch)
    trained_with = {"vocabulary": {**byte_vocabulary(), "hash": "another"}}
    found = restoring.RestoredParameters("restored", None, trained_with)
    monkeypatch.setattr(restoring, "restore_parameters", lambda *args, **kwargs: found)
    with pytest.raises(UserError, match="not the one that the checkpoint was trained with"):
        train.start(run, RestoreCheckpointConfig(path="x"), byte_vocabulary())
    # An embedding that starts anew has no old vocabulary.
    anew = RestoreCheckpointConfig(path="x", assignment_map=[("target/token_embedder.*", None)])
    assert train.start(run, anew, byte_vocabulary()) == "restored"
    assert train.start(run, RestoreCheckpointConfig(path="x"), trained_with["vocabulary"]) == "restored"


@pytest.mark.slow
def test_an_encoder_decoder_from_span_corruption_to_summaries(tmp_path):
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    network = ("networks/spade_tiny", "optimizers/adamw_cosine")
    first = {"MODEL_DIR": pretrained, "MIXTURE_OR_TASK_NAME": "words", "TRAIN_STEPS": 3}
    lengths = {"TASK_FEATURE_LENGTHS": {"inputs": 28, "targets": 12}}
    run((*network, "runs/pretrain_pairs"), SPADE | COMMON | first | lengths)
    second = {
        "MODEL_DIR": tuned,
        "INITIAL_CHECKPOINT_PATH": pretrained,
        "MIXTURE_OR_TASK_NAME": "summarization",
        "TRAIN_STEPS": STEPS,
    }
    run((*network, "runs/finetune_pairs"), SPADE | COMMON | second | lengths)
    last = history(tuned / "metrics.jsonl", "train")[-1]
    # 'summarize: ', 17 bytes and the end are 29, one too many.
    assert (last["data/cut_inputs"], last["data/cut_targets"]) == (STEPS * 16, 0)
    assert infer.main([f"--model_dir={tuned}", "--inputs_length=28", "--max_new_tokens=16", "--batch_size=24"]) == 0
    share = exact(tuned / "inference")
    assert share >= 0.9
    check_metrics(tuned / "inference", share)
    searched = [f"--model_dir={tuned}", "--inputs_length=28", "--max_new_tokens=16", "--batch_size=10", "--beams=3"]
    assert infer.main([*searched, f"--output_dir={tmp_path}/beams"]) == 0
    assert exact(tmp_path / "beams") >= 0.9
    assert evaluation.main([f"--model_dir={tuned}"]) == 0
    found = json.loads((tuned / "evaluation/eval_results.json").read_text())["tasks"]["summarization"]
    # Five bytes a word, and its end.
    assert found["tokens"] == 24 * 6 and found["accuracy"] >= 0.95
    held_out = history(tuned / "metrics.jsonl", "validation/summarization")[-1]
    np.testing.assert_allclose(held_out["nats_per_token"], found["nats_per_token"], rtol=1e-5)


@pytest.mark.slow
def test_packed_pairs_from_a_cache_alone_in_two_starts(tmp_path, monkeypatch, capsys):
    """The cache is made first; then the folder of texts is no longer known. Two starts are bit by bit as one."""
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "caches"))
    cache.main(["--mixture=summarization"])
    # A document and a summary of each record.
    assert "800 documents" in next(line for line in capsys.readouterr().out.splitlines() if " train " in line)
    monkeypatch.delenv("T5X_SSM_SUMMARIZATION")
    settings = {
        "INITIAL_CHECKPOINT_PATH": None,
        "MIXTURE_OR_TASK_NAME": "summarization",
        "TASK_FEATURE_LENGTHS": {"inputs": 60, "targets": 14},
        "SOURCE": "cache",
        "PACK": True,
        "BATCH_SIZE": 4,
    }
    files = ("networks/spade_tiny", "optimizers/adamw_cosine", "runs/finetune_pairs")
    for name, starts in (("whole", (4,)), ("parted", (2, 4))):
        for steps in starts:
            run(files, SPADE | COMMON | settings | {"MODEL_DIR": tmp_path / name, "TRAIN_STEPS": steps})
    found, expected = (stored(tmp_path / name, 4) for name in ("parted", "whole"))
    assert len(expected["arrays"]) > 20 and found == expected
    last = history(tmp_path / "whole" / "metrics.jsonl", "train")[-1]
    # Six bytes a summary: two of them fit into 14, and two documents of 29 bytes into 60.
    assert last["tokens_total"] == 4 * 4 * 2 * 6 and (last["data/cut_inputs"], last["data/cut_targets"]) == (0, 0)


@pytest.mark.nightly
def test_an_encoder_decoder_writes_the_names_of_classes(tmp_path):
    """A sentence is positive if it begins with one of the first three words."""
    settings = {
        "MODEL_DIR": tmp_path,
        "INITIAL_CHECKPOINT_PATH": None,
        "MIXTURE_OR_TASK_NAME": "glue_sst2",
        "TASK_FEATURE_LENGTHS": {"inputs": 36, "targets": 12},
        "TRAIN_STEPS": STEPS,
    }
    run(("networks/spade_tiny", "optimizers/adamw_cosine", "runs/finetune_pairs"), SPADE | COMMON | settings)
    assert infer.main([f"--model_dir={tmp_path}", "--max_new_tokens=12", "--batch_size=24"]) == 0
    folder = tmp_path / "inference"
    written = [json.loads(line) for line in (folder / "glue_sst2-validation-predict.jsonl").open()]
    wanted = ["positive" if text.split()[0] in WORDS[:3] else "negative" for text in documents(24, 1)]
    assert {*wanted} == {"positive", "negative"} and [line["targets"] for line in written] == wanted
    share = np.mean([line["prediction"] == name for line, name in zip(written, wanted, strict=True)])
    assert share >= 0.9
    found = json.loads((folder / "glue_sst2-validation-predict-metrics.json").read_text())
    assert found == {"examples": 24, "accuracy": pytest.approx(100 * share)}


@pytest.mark.nightly
def test_a_decoder_learns_summaries_by_prefix_language_modelling(tmp_path):
    steps = {"TRAIN_STEPS": 400, "schedules.warmup_cosine.total_steps": 400}
    settings = {
        "MODEL_DIR": tmp_path,
        "INITIAL_CHECKPOINT_PATH": None,
        "MIXTURE_OR_TASK_NAME": "summarization",
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 8},
    }
    run(("networks/gss_tiny", "optimizers/adamw_cosine", "runs/finetune_decoder"), GSS | COMMON | settings | steps)
    assert infer.main([f"--model_dir={tmp_path}", "--inputs_length=32", "--max_new_tokens=16", "--batch_size=24"]) == 0
    share = exact(tmp_path / "inference")
    assert share >= 0.9
    check_metrics(tmp_path / "inference", share)
