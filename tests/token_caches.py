"""Token caches written by hand from the documented format, so that readers are tested against it and not the writer."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

VOCABULARY = {
    "name": "ByteVocabulary",
    "size": 259,
    "extra_ids": 0,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "hash": "ab",
}


def write_split(
    directory: pathlib.Path,
    task: str,
    documents: Sequence[Sequence[int]],
    byte_lengths: Sequence[int],
    vocabulary: Mapping[str, object] = VOCABULARY,
    labels: Sequence[int] | None = None,
) -> None:
    """Writes one split of a task, in two shards where it has two documents; a document is a list of token ids.

    With `labels` it is a labelled task; it may have twice as many documents, which then are pairs.
    """
    half = len(documents if labels is None else labels) // 2
    texts = 1 if labels is None else len(documents) // len(labels)
    shards = []
    for index, part in enumerate([slice(0, half), slice(half, None)] if half else [slice(None)]):
        own = slice(part.start and part.start * texts, part.stop and part.stop * texts)
        shard = documents[own], byte_lengths[own], None if labels is None else labels[part]
        shards.append(_write_shard(directory / f"{index:05d}", *shard))
    total = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    manifest = {"format": 2, "task": task, **total, "dtype": "<u2", "vocabulary": vocabulary, "shards": shards}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _write_shard(folder, documents, byte_lengths, labels) -> dict:
    folder.mkdir(parents=True)
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "offsets.npy", np.cumsum([0] + [len(d) for d in documents]).astype(np.int64))
    np.save(folder / "bytes.npy", np.array(byte_lengths, np.int64))
    names = ["tokens.bin", "offsets.npy", "bytes.npy"]
    if labels is not None:
        np.save(folder / "labels.npy", np.array(labels, np.int64))
        names.append("labels.npy")
    files = {}
    for name in names:
        content = (folder / name).read_bytes()
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"documents": len(documents), "tokens": len(tokens), "bytes": sum(byte_lengths), "files": files}


def write_mixture(
    root: pathlib.Path,
    name: str,
    tasks: Mapping[str, Mapping[str, Sequence[Sequence[int]]]],
    rates: Sequence[float] | None = None,
    vocabulary: Mapping[str, object] = VOCABULARY,
) -> pathlib.Path:
    """Writes a cache of {task: {split: documents}} and returns the mixture file's path.

    A document's text is as long as its ids above 2 are many.
    """
    components = []
    for index, (task, splits) in enumerate(tasks.items()):
        for split, documents in splits.items():
            lengths = [sum(token > 2 for token in document) for document in documents]
            write_split(root / task / "made" / split, task, documents, lengths, vocabulary)
        components.append({"task": task, "rate": rates[index] if rates else 1.0, "directory": f"{task}/made"})
    path = root / name / "made.json"
    path.parent.mkdir(exist_ok=True)
    mixture = {"format": 2, "name": name, "components": components, "vocabulary": vocabulary, "environment": {}}
    path.write_text(json.dumps(mixture))
    return path


def write_labelled(
    root: pathlib.Path,
    name: str,
    splits: Mapping[str, tuple[Sequence[Sequence[int]], Sequence[int]]],
    classes: int,
    size: int = 259,
) -> pathlib.Path:
    """Writes a cache of a labelled task, {split: (documents, labels)}, and returns the mixture file's path."""
    vocabulary = {**VOCABULARY, "size": size, "classes": classes}
    for split, (documents, labels) in splits.items():
        write_split(root / name / "made" / split, name, documents, [0] * len(documents), vocabulary, labels)
    path = root / name / "made.json"
    component = {"task": name, "rate": 1.0, "directory": f"{name}/made"}
    mixture = {"format": 2, "name": name, "components": [component], "vocabulary": vocabulary, "environment": {}}
    path.write_text(json.dumps(mixture))
    return path
