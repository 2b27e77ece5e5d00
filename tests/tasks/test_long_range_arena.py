"""The arena's tasks: values by hand, the generated sets' published properties, and the folders of the others."""

import pathlib
import pickle
import statistics
import wave

import numpy as np
import pytest

from tasks.corpora.settings import CorpusError
from tasks.long_range_arena import listops, local, pathfinder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),  # the example of the paper
        ("[MIN 7 3 9 ]", 3),
        ("[MED 1 2 ]", 1),  # 1.5, rounded down
        ("[MED 9 0 4 ]", 4),
        ("[MED 8 2 6 4 ]", 5),
        ("[SM 9 9 5 ]", 3),
        ("[SM [MAX 1 8 ] [MIN 5 6 ] [SM 4 6 ] ]", 3),
        ("[MAX [SM 5 5 ] [SM 1 0 ] ]", 1),
        ("7", 7),
    ],
)
def test_listops_values_by_hand(text, value):
    ids = listops.encode(text)
    assert listops.value(ids) == value
    assert listops.decode([*ids, listops.EOS_ID]) == text
    assert all(3 <= i < listops.VOCABULARY_SIZE == 18 for i in ids)


def read(symbols):
    """(tree, rest) of an expression; a tree is a digit or [operator, …]."""
    first, rest = symbols[0], symbols[1:]
    if not first.startswith("["):
        return int(first), rest
    node = [first]
    while rest[0] != "]":
        argument, rest = read(rest)
        node.append(argument)
    return node, rest[1:]


def depth(tree):
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree[1:]))


def nodes(tree):
    return [tree] if isinstance(tree, int) else [tree, *(n for argument in tree[1:] for n in nodes(argument))]


def evaluate(tree):
    if isinstance(tree, int):
        return tree
    functions = {"[MAX": max, "[MIN": min, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}
    return functions[tree[0]]([evaluate(argument) for argument in tree[1:]])


def test_listops_expressions_are_of_the_published_kind():
    sizes, operators = [], []
    for seed in range(40):
        ids = listops.expression(np.random.default_rng(seed))
        tree, rest = read(listops.decode(ids).split())
        assert not rest
        assert 500 < len(ids) < 2000 and depth(tree) <= 10
        assert listops.value(ids) == evaluate(tree)
        inner = [node for node in nodes(tree) if not isinstance(node, int)]
        sizes += [len(node) - 1 for node in inner]
        operators += [node[0] for node in inner]
    assert set(sizes) == set(range(2, 11))
    assert set(operators) == {"[MAX", "[MIN", "[MED", "[SM"}
    assert listops.expression(np.random.default_rng(1)) == listops.expression(np.random.default_rng(1))


@pytest.mark.parametrize("settings", [pathfinder.PATHFINDER, pathfinder.PATHX])
def test_pathfinder_images(settings):
    drawn = [pathfinder.image(np.random.default_rng(seed), settings) for seed in range(4)]
    for pixels, label in drawn:
        assert pixels.shape == (settings.size, settings.size) and pixels.dtype == np.uint8
        assert pixels.max() == 255 and pixels.min() == 0 and label in (0, 1)
        # Two curves of 14 dashes, at most a third of the image.
        assert 2 * 14 < np.count_nonzero(pixels > 60) < settings.size**2 / 3
    assert len({pixels.tobytes() for pixels, _ in drawn}) == 4
    again, label = pathfinder.image(np.random.default_rng(3), settings)
    np.testing.assert_array_equal(again, drawn[3][0])
    assert label == drawn[3][1]


def test_pathfinder_labels_say_whether_the_circles_mark_one_curve(monkeypatch):
    beginnings, ends = ((4, 4), (4, 26)), ((26, 4), (26, 26))

    def full(*_):  # So that no distractor fits.
        return pathfinder._Canvas(np.zeros((32, 32)), np.ones((32, 32))), beginnings, ends

    monkeypatch.setattr(pathfinder, "_two_curves", full)
    labels = set()
    for seed in range(20):
        pixels, label = pathfinder.image(np.random.default_rng(seed), pathfinder.PATHFINDER)
        marked = [curve for curve in (0, 1) if pixels[beginnings[curve]]]
        finished = [curve for curve in (0, 1) if pixels[ends[curve]]]
        assert len(marked) == len(finished) == 1
        assert label == (marked == finished)
        labels.add((label, *marked))
    assert len(labels) == 4


def test_pathfinder_curves_keep_their_distance_and_turn_gently():
    settings = pathfinder.PATHX
    taken = np.zeros((128, 128))
    taken[64, 55:] = 1
    places, directions, weights = pathfinder._candidates((64, 50), 0.0, settings, 2, taken)
    np.testing.assert_allclose(np.hypot(*(places - [64, 50]).T), 7, atol=np.sqrt(2))  # both coordinates are cut
    # Ahead (angle 0 is to the right) is taken, and what turns by more than 90 degrees / 1.8 is never drawn.
    assert weights[np.abs(directions) > np.pi / 3.6].max() < 1e-12
    assert weights[np.abs(places[:, 0] - 64) > 3].max() > 0.1
    blocked = (np.abs(places[:, 0] - 64) <= 1) & (places[:, 1] >= 55)
    assert blocked.any() and not weights[blocked].any()


def write(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def examples(name, split):
    shards, read_shard = local.READERS[name]
    return [example for shard in shards(split) for example in read_shard(split, shard)]


def test_text_and_retrieval_are_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_SSM_LRA_TEXT", str(tmp_path / "imdb"))
    write(tmp_path / "imdb/train/neg/0_1.txt", b"bad")
    write(tmp_path / "imdb/train/pos/0_9.txt", b"good")
    assert examples("lra_text", "train") == [
        {"inputs": [101, 100, 103, 1], "targets": [0]},
        {"inputs": [106, 114, 114, 103, 1], "targets": [1]},
    ]
    with pytest.raises(CorpusError, match=r"'validation' of 'lra_text' needs .*imdb/test/neg.*T5X_SSM_LRA_TEXT"):
        examples("lra_text", "validation")

    monkeypatch.setenv("T5X_SSM_LRA_RETRIEVAL", str(tmp_path / "aan"))
    write(tmp_path / "aan/new_aan_pairs.eval.tsv", b"1.0\tP1\tP2\tb'ab'\tc\n0.0\tP1\tP3\tx\ty\n")
    assert examples("lra_retrieval", "validation") == [
        {"inputs": [100, 101, 1], "inputs2": [102, 1], "targets": [1]},
        {"inputs": [123, 1], "inputs2": [124, 1], "targets": [0]},
    ]
    write(tmp_path / "aan/new_aan_pairs.test.tsv", b"1.0\tP1\n")
    with pytest.raises(CorpusError, match="line 1: 2 fields"):
        examples("lra_retrieval", "test")


def test_images_are_grey_and_a_tenth_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_SSM_LRA_IMAGE", str(tmp_path))
    monkeypatch.setattr(local, "_HELD_OUT_IMAGES", 1)
    pixels = np.zeros((3, 3, 1024), np.uint8)
    pixels[0, 0], pixels[1, 1], pixels[2, 2] = 255, 255, 255
    contents = pickle.dumps({b"data": pixels.reshape(3, 3072), b"labels": [7, 8, 9]})
    for name in ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]:
        write(tmp_path / name, contents)
    train, held_out, test = (examples("lra_image", split) for split in ("train", "validation", "test"))
    assert [e["targets"][0] for e in train] == [7, 8] * 5
    assert [e["targets"][0] for e in held_out] == [9] * 5
    # 0.299, 0.587 and 0.114 of 255.
    assert [set(e["inputs"].tolist()) for e in test] == [{76}, {150}, {29}]
    write(tmp_path / "test_batch", pickle.dumps({b"data": np.zeros((3, 2))}))
    with pytest.raises(CorpusError, match="test_batch is no batch of CIFAR-10"):
        examples("lra_image", "test")
    write(tmp_path / "test_batch", pickle.dumps(pathlib.PurePosixPath("x")))
    with pytest.raises(CorpusError, match="PurePosixPath"):
        examples("lra_image", "test")


def test_words_are_samples_padded_with_silence(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_SSM_SPEECH_COMMANDS", str(tmp_path))
    for word in local.WORDS:
        (tmp_path / word).mkdir()
    for name in ("yes/a.wav", "yes/b.wav", "no/a.wav"):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(np.array([-32768, 1, 32767], "<i2").tobytes())
    write(tmp_path / "validation_list.txt", b"yes/b.wav\n")
    write(tmp_path / "testing_list.txt", b"")
    assert len(local.WORDS) == 35
    train = examples("speech_commands", "train")
    assert [e["targets"] for e in train] == [[local.WORDS.index("no")], [local.WORDS.index("yes")]]
    assert len(train[0]["inputs"]) == 16_000
    assert train[0]["inputs"][:5].tolist() == [0, 32769, 65535, 32768, 32768]
    assert len(examples("speech_commands", "validation")) == 1
