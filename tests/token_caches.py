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
) -> None:
    """Writes one split of a task, in two shards where it has two documents; a document is a list of token ids."""
    half = len(documents) // 2
    shards = []
    for index, part in enumerate([slice(0, half), slice(half, None)] if half else [slice(None)]):
        shards.append(_write_shard(directory / f"{index:05d}", documents[part], byte_lengths[part]))
    total = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    manifest = {"format": 2, "task": task, **total, "dtype": "<u2", "vocabulary": vocabulary, "shards": shards}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _write_shard(folder: pathlib.Path, documents: Sequence[Sequence[int]], byte_lengths: Sequence[int]) -> dict:
    folder.mkdir(parents=True)
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "offsets.npy", np.cumsum([0] + [len(d) for d in documents]).astype(np.int64))
    np.save(folder / "bytes.npy", np.array(byte_lengths, np.int64))
    files = {}
    for name in ("tokens.bin", "offsets.npy", "bytes.npy"):
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
