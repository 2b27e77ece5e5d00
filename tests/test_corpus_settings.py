"""Places of corpora set in gin: the entry points follow them, a run keeps them, and other data under a run is refused."""

import json
import logging
import re

import pytest
from training_command import SETTINGS

import tasks
from t5x_ssm import config, infer, train
from t5x_ssm import eval as evaluation
from t5x_ssm.data import feed, sources
from t5x_ssm.errors import DataError, UserError
from tasks import cache, inspect, train_vocabulary
from tasks.corpora import settings

PLACE = "texts/corpora.location.path"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    import gin

    for name in ("T5X_SSM_TEXTS", "T5X_SSM_BOOKS", settings.VOCABULARY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path / "caches"))
    with gin.unlock_config():
        gin.clear_config()
        yield
        gin.clear_config()


def bind(**bindings):
    import gin

    gin.clear_config()
    for name, value in bindings.items():
        gin.bind_parameter(name, value)


def write_texts(folder, word):
    for split, count in (("train", 5), ("validation", 2)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            (folder / split / f"{i}.txt").write_text(f"{word} {i} " * 9)
    return folder


def write_pairs(folder, word):
    folder.mkdir()
    records = (json.dumps({"document": f"{word} {i}", "summary": word}) + "\n" for i in range(9))
    (folder / "train.jsonl").write_text("".join(records))
    return folder


def test_the_names_that_gin_may_place_are_those_that_are_asked_for(monkeypatch):
    """Every registered task is asked for its data; what its message says it misses is the oracle."""
    import seqio

    tasks.register()
    for name in settings.NAMES:
        monkeypatch.delenv(settings.variable(name), raising=False)
    missed = set()
    for name in seqio.TaskRegistry.names():
        task = seqio.TaskRegistry.get(name)
        if type(task.source).__module__.startswith("tasks."):
            try:
                task.source.get_dataset(sorted(task.source.splits)[0])
            except settings.CorpusError as error:
                missed |= set(re.findall(r"Where is the corpus '(\w+)'\? Set \$T5X_SSM", str(error)))
    assert missed == set(settings.NAMES)


def test_a_place_of_no_corpus_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"text/corpora\.location\.path .* no corpus is named 'text'.* texts"):
        config.load(["quickstart.gin"], ["MODEL_DIR=/x", f"text/corpora.location.path={tmp_path}"])
        config.check(train.train)
    with pytest.raises(UserError, match=r"path = 3 is not text"):
        config.load(["quickstart.gin"], ["MODEL_DIR=/x", f"{PLACE}=3"])
        config.check(train.train)
    with pytest.raises(SystemExit, match="no corpus is named 'text'"):
        cache.main(["--mixture=texts", f"--gin.text/corpora.location.path={tmp_path}"])


def test_a_vocabulary_is_trained_on_what_gin_places(tmp_path):
    import sentencepiece

    place = write_texts(tmp_path / "here", "zebra")
    model = tmp_path / "small.model"
    train_vocabulary.main(["--mixture=texts", f"--gin.{PLACE}={place}", f"--output={model}", "--size=275"])
    processor = sentencepiece.SentencePieceProcessor(str(model))
    known = [processor.piece_to_id(letter) != processor.unk_id() for letter in "zebraq"]
    assert known == [True] * 5 + [False]


def test_a_macro_may_say_the_place(tmp_path):
    given = ["MODEL_DIR=/x", "DATA=/there", f"{PLACE}=%DATA"]
    config.load(["quickstart.gin"], given)
    config.check(train.train)
    assert settings.given() == {PLACE: "/there"}
    assert f"{PLACE} = '/there'\n" in config.operative_text()
    with pytest.raises(UserError, match="Nothing uses DATA"):
        config.load(["quickstart.gin"], given[:2])
        config.check(train.train)


def test_a_cache_of_another_setting_is_not_taken(tmp_path, caplog):
    tasks.register()
    first, second = write_texts(tmp_path / "first", "one"), write_texts(tmp_path / "second", "two")
    bind(**{PLACE: str(first)})
    path = cache.build("texts", modules=())
    assert cache.find("texts") == path
    bind()  # Whoever trains from the cache need not have the corpus.
    assert cache.find("texts") == path
    with caplog.at_level(logging.INFO):
        bind(**{PLACE: str(second)})
        assert cache.find("texts") is None
    assert f"{PLACE} was {str(first)!r} and is {str(second)!r}" in caplog.text
    bind(**{PLACE: str(first), "corpora.vocabulary.name": "bytes:5"})
    assert cache.find("texts") is None
    assert cache.build("texts", modules=()) == cache.find("texts") != path


def test_rates_that_have_changed_make_another_mixture(tmp_path):
    import seqio

    tasks.register()
    for name in ("books", "code"):
        write_texts(tmp_path / name, name)
    if "books_and_code" not in seqio.MixtureRegistry.names():
        from tasks.corpora.mixtures import books_code_math_rate

        seqio.MixtureRegistry.add("books_and_code", [(name, books_code_math_rate) for name in ("books", "code")])
    (tmp_path / "code/train/a.py").write_text("x = 1\n")
    (tmp_path / "code/validation/a.py").write_text("x = 2\n")
    places = {f"{name}/corpora.location.path": str(tmp_path / name) for name in ("books", "code")}
    bind(**places)
    path = cache.build("books_and_code", modules=())
    bind(**places, **{"corpora.rates.books": 3.0})
    assert cache.find("books_and_code") is None
    changed = cache.build("books_and_code", modules=())
    assert sources.CachedMixture(changed, "train").rates == [3.0, 1.0]
    bind(**places)
    assert cache.find("books_and_code") == path


@pytest.mark.parametrize("source", ["cache", "seqio"])
def test_a_position_goes_on_where_the_data_has_moved_and_not_with_other_data(source, tmp_path, caplog):
    tasks.register()
    write = write_texts if source == "cache" else write_pairs
    contents = (("a", "one"), ("b", "one"), ("c", "three"))
    places = {name: str(write(tmp_path / name, word)) for name, word in contents}
    if source == "cache":
        place, settings_of = PLACE, feed.DatasetConfig("texts", {"targets": 8}, "train", 2)
    else:
        lengths = {"inputs": 24, "targets": 8}
        place = "summarization/corpora.location.path"
        settings_of = feed.DatasetConfig("summarization", lengths, "train", 2, source=source, pack=False)
    bind(**{place: places["a"]})
    with feed.open_feed(settings_of) as opened:
        opened.next()
        state, expected = json.loads(json.dumps(opened.state())), opened.next()
    bind(**{place: places["b"]})
    with caplog.at_level(logging.INFO), feed.open_feed(settings_of) as moved:
        moved.restore(state)
        batch = moved.next()
    assert f"{place} was {places['a']!r} and is {places['b']!r}; the data is the same" in caplog.text
    assert all((batch[name] == expected[name]).all() for name in expected)
    bind(**{place: places["c"]})
    with feed.open_feed(settings_of) as other, pytest.raises(DataError) as caught:
        other.restore(state)
    assert f"{place} was {places['a']!r} and is {places['c']!r}" in str(caught.value)


@pytest.mark.slow
def test_commands_follow_a_place_in_gin(tmp_path, training_caches, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(training_caches["JAX_COMPILATION_CACHE_DIR"]))
    places = {name: write_texts(tmp_path / name, name) for name in ("here", "away")}
    own = {"MODEL_DIR": tmp_path / "run", "MIXTURE_OR_TASK_NAME": "texts", PLACE: places["here"], "TRAIN_STEPS": 2}

    def run(**more):
        bindings = SETTINGS | own | more
        return train.main(["--gin_file=quickstart.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())])

    # The cache is made by a process of its own unless this one has registered the task.
    assert run() == 0
    written = (tmp_path / "run" / "config.gin").read_text()
    assert written.startswith(f"{PLACE} = {str(places['here'])!r}\n")
    # From the run's configuration: from the cache, and from the texts themselves.
    assert evaluation.main([f"--model_dir={tmp_path / 'run'}"]) == 0
    assert infer.main([f"--model_dir={tmp_path / 'run'}", "--mode=score", "--num_examples=1"]) == 0
    line = json.loads((tmp_path / "run/inference/texts-validation-score.jsonl").read_text())
    assert line["targets"] == "here 0 " * 9
    with pytest.raises(UserError, match=r"texts/corpora\.location\.path was .*here' and is .*away'"):
        run(TRAIN_STEPS=4, **{PLACE: places["away"]})
    capsys.readouterr()
    given = ["--mixture=texts", f"--gin.{PLACE}={places['away']}", "--split=validation", "--examples=1", "--histogram="]
    inspect.main(given)
    assert "│ away 0 away 0 " in capsys.readouterr().out
