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
    directory: pathlib.Path, task: str, documents: Sequence[Sequence[int]], byte_lengths: Sequence[int]
) -> None:
    """Writes one split of a task; a document is a list of token ids."""
    directory.mkdir(parents=True)
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(directory / "tokens.bin")
    np.save(directory / "offsets.npy", np.cumsum([0] + [len(d) for d in documents]).astype(np.int64))
    np.save(directory / "bytes.npy", np.array(byte_lengths, np.int64))
    files = {}
    for name in ("tokens.bin", "offsets.npy", "bytes.npy"):
        content = (directory / name).read_bytes()
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": 1, "task": task, "tokens": len(tokens), "dtype": "<u2", "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))


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
            write_split(root / task / "made" / split, task, documents, lengths)
        components.append({"task": task, "rate": rates[index] if rates else 1.0, "directory": f"{task}/made"})
    path = root / name / "made.json"
    path.parent.mkdir(exist_ok=True)
    mixture = {"format": 1, "name": name, "components": components, "vocabulary": vocabulary, "environment": {}}
    path.write_text(json.dumps(mixture))
    return path
