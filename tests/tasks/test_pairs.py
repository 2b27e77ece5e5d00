"""Tasks of pairs from files as published to texts in T5's format, their metrics by hand, and SuperGLUE's questions."""

import json

import pair_files
import pytest

import tasks
from t5x_ssm.data.examples import open_examples
from tasks.corpora.settings import CorpusError
from tasks.pairs import metrics, prompts, ranking


@pytest.fixture(autouse=True, scope="module")
def registered():
    tasks.register()


def task_of(name):
    import seqio

    return seqio.TaskRegistry.get(name)


def texts(name, split="train", **settings):
    dataset = task_of(name).get_dataset(None, split, shuffle=False, try_in_mem_cache=False, **settings)
    return [
        (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in dataset.as_numpy_iterator()
    ]


@pytest.mark.parametrize("name", pair_files.GLUE)
def test_glue_is_read_into_t5s_format(name, tmp_path, monkeypatch):
    path, content, expected = pair_files.GLUE[name]
    pair_files.write(tmp_path / path, content)
    monkeypatch.setenv("T5X_SSM_GLUE", str(tmp_path))
    assert texts(f"glue_{name}") == expected
    # The one line with too few fields is counted, not dropped in silence.
    assert task_of(f"glue_{name}").source.left_out("train") == ({"malformed": 1} if name == "qqp" else {})


def test_texts_are_tokenised_and_end(tmp_path, monkeypatch):
    pair_files.write(
        tmp_path / "train.jsonl",
        pair_files.lines({"article": "abc", "highlights": "b"}, {"article": " ", "highlights": "lost"}),
    )
    monkeypatch.setenv("T5X_SSM_CNN_DAILYMAIL", str(tmp_path))
    task = task_of("cnn_dailymail")
    (example,) = task.get_dataset(None, "train", shuffle=False, try_in_mem_cache=False).as_numpy_iterator()
    assert example["inputs"].tolist() == [3 + byte for byte in b"summarize: abc"] + [1]
    assert example["targets"].tolist() == [3 + ord("b"), 1]
    assert task.source.left_out("train") == {"empty": 1} and task.source.left_out("test") == {}
    (cut,) = task.get_dataset({"inputs": 5, "targets": 9}, "train", shuffle=False).as_numpy_iterator()
    assert cut["inputs"].tolist() == [3 + byte for byte in b"summa"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.jsonl", '{"sentence": "x"}\n', r"train\.jsonl, line 1: there is none of \['label'\]"),
        ("train.jsonl", '{"sentence": "x", "label": "good"}\n', "'good' is no label; there are negative, positive"),
        ("train.jsonl", '{"sentence": "x", "label": -1}\n', "-1 is no label"),
        ("train.jsonl", "[1]\n", "line 1: this is a JSON list, not an object"),
        ("train.jsonl", "{\n", "line 1: this is no JSON"),
        ("train.tsv", "sentence\tlabel\n", "has no records"),
        ("test.tsv", "sentence\tlabel\nx\t1\n", "no file of the split 'train' in .*SST-2 or .*sst2"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path, monkeypatch):
    pair_files.write(tmp_path / "sst2" / name, content)
    monkeypatch.setenv("T5X_SSM_GLUE", str(tmp_path))
    with pytest.raises(CorpusError, match=message):
        texts("glue_sst2")


def test_a_place_that_is_not_set_names_the_setting(monkeypatch):
    monkeypatch.delenv("T5X_SSM_XSUM", raising=False)
    with pytest.raises(CorpusError, match=r"Set \$T5X_SSM_XSUM"):
        texts("xsum")
    monkeypatch.setenv("T5X_SSM_XSUM", "tfds:xsum")
    with pytest.raises(
        CorpusError, match=r"\$T5X_SSM_XSUM .* is 'tfds:xsum'; the version of a TFDS data set is missing"
    ):
        texts("xsum")
    monkeypatch.setenv("T5X_SSM_XSUM", "tfds:")
    with pytest.raises(CorpusError, match="name of a TFDS data set is missing"):
        texts("xsum")


@pytest.mark.slow
def test_a_tfds_data_set_stands_where_a_folder_could(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # TFDS would ask its bucket first, which takes long where there is no network.
    monkeypatch.setattr(tfds.core.utils.gcs_utils, "_is_gcs_disabled", True)
    article = "Long text."
    tfds.dataset_builders.store_as_tfds_dataset(
        "tiny_news",
        "1.0.0",
        tfds.features.FeaturesDict({"article": tfds.features.Text(), "highlights": tfds.features.Text()}),
        {"validation": tf.data.Dataset.from_tensors({"article": article, "highlights": "Short."})},
        data_dir=str(tmp_path),
    )
    monkeypatch.setenv("T5X_SSM_SUMMARIZATION", "tfds:tiny_news:1.0.0")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert texts("summarization", "validation") == [("summarize: Long text.", "Short.")]


def test_accuracy_f1_and_matthews_by_hand():
    targets = ["a", "a", "a", "b", "b", "b", "b", "b"]
    written = ["a", " a", "b", "b", "b", "b", "a", "?"]
    assert metrics.accuracy(targets, written) == {"accuracy": 62.5}
    # Of a: 2 found rightly, 3 found, 3 wanted.
    assert metrics.f1_of("a")(targets, written)["f1"] == pytest.approx(100 * 2 / 3)
    assert metrics.f1_of("c")(targets, written) == {"f1": 0.0}
    # Right 2, wrongly found 1, missed 1, rightly left 4.
    assert metrics.matthews_of("a")(targets, written)["matthews"] == pytest.approx(100 * (2 * 4 - 1) / 15)
    assert metrics.matthews_of("a")(["a"], ["a"]) == {"matthews": 0.0}


def test_correlations_by_hand():
    # Deviations -3, -1, 1, 3 (in halves) and -2, -1, 1, 2 of the mean: products 14, squares 20 and 10.
    found = metrics.correlations(["1.0", "2.0", "3.0", "4.0"], ["0.6", " 0.8", "1.2", "1.4"])
    assert found == {"pearson": pytest.approx(100 * 14 / 200**0.5), "spearman": pytest.approx(100.0)}
    # Ranks 1, 2, 3 against 2, 1, 3; what is no number is below all scores.
    assert metrics.correlations(["0.0", "0.2", "5.0"], ["0.0", "similar", "4.0"])["spearman"] == pytest.approx(50.0)
    assert metrics.correlations(["0.0", "5.0"], ["nan", "0.0"])["pearson"] == pytest.approx(100.0)
    assert metrics.correlations(["1.0", "2.0"], ["3.0", "3.0"]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("score", ["5.1", "-0.2", "high", "nan"])
def test_a_score_that_cannot_be_is_named(score, tmp_path, monkeypatch):
    pair_files.write(
        tmp_path / "stsb/train.jsonl", pair_files.lines({"sentence1": "A", "sentence2": "B", "label": score})
    )
    monkeypatch.setenv("T5X_SSM_GLUE", str(tmp_path))
    with pytest.raises(CorpusError, match=rf"train\.jsonl, line 1: '{score}' is no score from 0 to 5"):
        texts("glue_stsb")


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Of six words each four are shared (the, cat, on, mat), of five pairs the first; in order the, cat, on, mat.
    first = ("the cat sat on the mat", "the cat lay on a mat")
    # Stems: runs, running. Two of three words against two; one pair of two against one.
    second = ("dogs running fast", "dog runs")
    found = metrics.rouge(*zip(first, second, strict=True))
    assert found["rouge1"] == pytest.approx(100 * (4 / 6 + 4 / 5) / 2)
    assert found["rouge2"] == pytest.approx(100 * (1 / 5 + 2 / 3) / 2)
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(100 * (4 / 6 + 4 / 5) / 2)


@pytest.mark.parametrize("name", pair_files.SUPERGLUE)
def test_superglues_records_become_questions(name):
    folder, record, expected = pair_files.SUPERGLUE[name]
    assert prompts.TEMPLATES[name][0] == folder
    assert [tuple(question) for question in prompts.TEMPLATES[name][1](record)] == expected


def test_few_shot_prompts_hold_solved_questions_but_never_the_question_itself(tmp_path, monkeypatch):
    def rte(i):
        label = "entailment" if i % 2 else "not_entailment"
        return {"premise": f"P{i}.", "hypothesis": f"H{i}.", "label": label}

    pair_files.write(tmp_path / "RTE" / "train.jsonl", pair_files.lines(*map(rte, range(4))))
    pair_files.write(tmp_path / "RTE" / "val.jsonl", pair_files.lines(rte(7)))
    monkeypatch.setenv("T5X_SSM_SUPERGLUE", str(tmp_path))
    own = "P7.\nquestion: H7. True or False?\nanswer:"
    assert texts("superglue_rte", "validation") == [(own, " True"), (own, " False")]
    solved = {f"P{i}.\nquestion: H{i}. True or False?\nanswer:{' True' if i % 2 else ' False'}" for i in range(4)}
    shown = texts("superglue_rte_few_shot", "validation")
    assert shown == texts("superglue_rte_few_shot", "validation") and shown[0][0] == shown[1][0]
    *before, last = shown[0][0].split("\n\n")
    assert last == own and len(set(before)) == 3 and set(before) < solved
    for number, (prompt, _) in enumerate(texts("superglue_rte_few_shot", "train")):
        *before, last = prompt.split("\n\n")
        assert len(before) == 3 and not [text for text in before if text.startswith(last)], number
    monkeypatch.setenv("T5X_SSM_SHOTS", "4")
    with pytest.raises(CorpusError, match=r"\$T5X_SSM_SHOTS = 4, but the training split of RTE has 4"):
        list(task_of("superglue_rte_few_shot").source.examples("validation"))
    (tmp_path / "RTE" / "val.jsonl").write_text(json.dumps({"premise": "P"}) + "\n")
    with pytest.raises(CorpusError, match=r"val\.jsonl, line 1: this is no record of RTE \(KeyError: 'hypothesis'\)"):
        list(task_of("superglue_rte").source.examples("validation"))


def test_a_scorer_by_hand_answers_superglue(tmp_path, monkeypatch):
    """The scorer likes short answers: right for the first question and wrong for the second, by bytes the other way."""
    records = [
        {"premise": "A.", "choice1": "Short.", "choice2": "Much longer.", "question": "cause", "label": 0},
        {"premise": "B.", "choice1": "Tiny.", "choice2": "Also longer.", "question": "effect", "label": 1},
    ]
    pair_files.write(tmp_path / "COPA" / "val.jsonl", pair_files.lines(*records))
    monkeypatch.setenv("T5X_SSM_SUPERGLUE", str(tmp_path))
    (task,) = open_examples("superglue_copa", "validation")
    examples = list(task)
    assert [e.targets_text for e in examples] == [" short.", " much longer.", " tiny.", " also longer."]
    assert examples[2].inputs_text == "B therefore" and examples[2].inputs.tolist() == [3 + b for b in b"B therefore"]
    assert examples[0].targets.tolist() == [3 + byte for byte in b" short."]  # without an end
    scores = [-5.0 - len(e.targets_text) / 10 for e in examples]
    found = task.metrics(examples, scores, "score")
    assert found == {"accuracy": 50.0, "accuracy_by_length": 50.0, "questions": 2.0}
    assert task.has_metrics("score") and not task.has_metrics("predict")
    # Only a question whose choices have all been read counts.
    assert task.metrics(examples[:3], scores[:3], "score")["questions"] == 1
    assert [t.name for t in open_examples("superglue", "validation")] == [f"superglue_{n}" for n in prompts.TEMPLATES]


def choices(number, right, sizes):
    return [ranking.Choice(number, i, len(sizes), i in right, size) for i, size in enumerate(sizes)]


def test_the_likeliest_choice_answers():
    """Three questions scored by hand; of a fourth a choice is missing."""
    targets = [
        *choices(0, {1}, (4, 4, 4)),
        *choices(1, {0}, (2, 10)),
        *choices(2, {1}, (4, 4)),
        *choices(3, {0}, (1, 1))[:1],
    ]
    scores = [-3.0, -1.0, -2.0, -4.0, -6.0, -1.0, -1.5, 0.0]
    # Of the second, -4 beats -6, but -0.6 a byte beats -2 a byte.
    expected = {"accuracy": 200 / 3, "accuracy_by_length": 100 / 3, "questions": 3}
    assert ranking.accuracy(targets, scores) == pytest.approx(expected)
    assert ranking.accuracy([], []) == {"accuracy": 0.0, "accuracy_by_length": 0.0, "questions": 0}


def test_f1s_of_choices_by_hand():
    """Chosen 0 0 1 1 0, right 0 1 1 1 1: of class 0 one of three and one; of class 1 two of two and four."""
    targets, scores = [], []
    for number, (chosen, right) in enumerate([(0, 0), (0, 1), (1, 1), (1, 1), (0, 1)]):
        targets += choices(number, {right}, (3, 3))
        scores += [0.0 if i == chosen else -1.0 for i in range(2)]
    assert ranking.macro_f1(targets, scores)["macro_f1"] == pytest.approx(100 * (2 / 4 + 4 / 6) / 2)
    assert ranking.answer_f1(targets, scores)["f1"] == pytest.approx(100 * 2 / 4)
