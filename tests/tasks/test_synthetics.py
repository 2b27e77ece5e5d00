"""The synthetic languages against sentences written by hand and the rules that every sentence keeps."""

import numpy as np
import pytest

import tasks
from t5x_ssm.data.examples import open_examples
from tasks import cache, vocabularies
from tasks import synthetic_languages as languages
from tasks.synthetic_languages import LANGUAGES, SPLITS, Language, sentences


class Told:
    """A source of random choices that does as it is told."""

    def __init__(self, *answers):
        self._answers = list(answers)

    def choice(self, options, size=None):
        answer = self._answers.pop(0)
        assert all(a in list(options) for a in (answer if size else [answer]))
        assert size is None or len(answer) == size
        return answer

    def integers(self, bound):
        assert 0 <= self._answers[0] < bound
        return self._answers.pop(0)


def test_an_induction_head_repeats_what_followed_the_trigger():
    told = Told(["4", "0", "7", "7", "2"], 1)
    assert " ".join(languages.induction_head(told, ["0", "2", "4", "7"], 5)) == "4 => 7 7 2 => 7"
    at_the_end = Told(["4", "0", "7", "7", "2"], 3)
    assert " ".join(languages.induction_head(at_the_end, ["0", "2", "4", "7"], 5)) == "4 0 7 => 2 => 2"


def test_associative_recall_asks_for_a_key_that_it_has_seen():
    told = Told(["5", "6", "5"], ["2", "0", "2"], "0")
    found = languages.associative_recall(told, ["0", "1", "2", "4", "5", "6"], 6)
    assert " ".join(found) == "2 5 0 5 2 5 => 0 5"


def test_ids_are_the_order_of_strings():
    assert " ".join(LANGUAGES["induction_head"].symbols) == ". 0 1 10 11 12 13 14 15 16 17 2 3 4 5 6 7 8 9 =>"
    assert " ".join(LANGUAGES["associative_recall"].symbols) == ". 0 1 2 3 4 5 6 7 =>"


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_sentence_keeps_the_rules(name):
    """The answer follows from the sentence by a search that knows nothing of how it was made."""
    language = LANGUAGES[name]
    trigger = language.vocabulary_size - 1
    splits = [sentences(language, split) for split in SPLITS]
    assert [len(rows) for rows in splits] == [5000, 500]
    together = np.concatenate(splits)
    assert len(np.unique(together, axis=0)) == 5500, "two sentences are equal"
    assert together.min() == 1, "the no-op stands in a sentence"
    for row in together.tolist():
        if language.kind == "induction_head":
            assert len(row) == language.length + 2 and row.count(trigger) == 2 and row[-2] == trigger
            assert row[-1] == row[row.index(trigger) + 1] != trigger
        else:
            body, (sign, key, value) = row[:-3], row[-3:]
            assert len(body) == language.length and sign == trigger and trigger not in body
            pairs = list(zip(body[::2], body[1::2], strict=True))
            assert (key, value) in pairs and len(dict(pairs)) == len(set(pairs))
            assert {k for k, _ in pairs} <= set(range(1, 5)) and {v for _, v in pairs} <= set(range(5, 9))
    # Nothing but recall tells the answer: no symbol is the answer much more often than any other.
    share = np.bincount(together[:, -1]).max() / len(together)
    assert share < 1.2 / (4 if language.kind == "associative_recall" else 18)


def test_a_seed_is_a_corpus():
    language = LANGUAGES["induction_head"]
    first = sentences(language, "train")
    sentences.cache_clear()
    np.testing.assert_array_equal(sentences(language, "train"), first)
    assert not np.array_equal(sentences(language, "train", seed=1), first)
    with pytest.raises(ValueError, match="fewer"):
        sentences(Language("associative_recall", length=2, vocabulary_size=4), "train")


@pytest.mark.slow
def test_the_tasks_train_on_everything_and_score_the_answer():
    pytest.importorskip("seqio")
    tasks.register()
    for name, language in LANGUAGES.items():
        for split in SPLITS:
            rows = sentences(language, split)
            whole = cache.registered(name).get_dataset(sequence_length=None, split=split, shuffle=False)
            found = [example["targets"] for example in whole.as_numpy_iterator()]
            np.testing.assert_array_equal(found, rows)
    row = sentences(LANGUAGES["associative_recall"], "validation")[7]
    example = list(open_examples("associative_recall_answer", "validation")[0])[7]
    np.testing.assert_array_equal(example.inputs, row[:-1])
    np.testing.assert_array_equal(example.targets, row[-1:])
    text = f"{example.inputs_text} {example.targets_text}"
    assert [LANGUAGES["associative_recall"].symbols.index(symbol) for symbol in text.split()] == row.tolist()


def test_the_vocabularies_are_told_apart_and_refuse_strangers():
    tf = pytest.importorskip("tensorflow")
    from tasks.synthetics import SymbolVocabulary, accuracy

    vocabulary = SymbolVocabulary(LANGUAGES["associative_recall"].symbols)
    assert vocabulary.encode("3 => .") == [4, 9, 0]
    assert vocabulary.decode_tf(tf.constant([4, 9, 0])).numpy() == b"3 => ."
    for encode in (vocabulary.encode, vocabulary.encode_tf):
        with pytest.raises(Exception, match="no symbol of this vocabulary"):
            encode("3 8")
    others = [SymbolVocabulary(language.symbols) for language in LANGUAGES.values()]
    assert len({vocabularies.describe(other)["hash"] for other in others}) == 2
    assert accuracy(["3", "4", "5", "5"], ["3", "5", "5", "5"]) == {"accuracy": 75.0}
