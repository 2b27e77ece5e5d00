"""Token caches made by hand from the documented format, so that readers are tested against it and not the writer."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

VOCABULARY = {
    "name": "ByteVocabulary",
    "size": 259,
    "extra_ids": 0,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "hash": "ab",
}


def write_split(directory: pathlib.Path, task: str, documents: list[list[int]], byte_lengths: list[int]) -> None:
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


@pytest.fixture
def make_cache(tmp_path):
    """make_cache({task: {split: documents}}, rates=…, name=…) writes a cache and returns the mixture file's path.

    A document is a list of token ids; its text is as long as its ids above 2.
    """

    def make(tasks, rates=None, name="mixture", root=tmp_path):
        components = []
        for index, (task, splits) in enumerate(tasks.items()):
            for split, documents in splits.items():
                lengths = [sum(token > 2 for token in document) for document in documents]
                write_split(root / task / "made" / split, task, documents, lengths)
            rate = rates[index] if rates else 1.0
            components.append({"task": task, "rate": rate, "directory": f"{task}/made"})
        path = root / name / "made.json"
        path.parent.mkdir(exist_ok=True)
        mixture = {"format": 1, "name": name, "components": components, "vocabulary": VOCABULARY, "environment": {}}
        path.write_text(json.dumps(mixture))
        return path

    return make


@pytest.fixture
def counting_documents():
    """counting_documents(n, first): documents of uneven lengths whose n tokens are first, first + 1, …: every token
    says where it stands. With EOS at their ends where there is room."""

    def make(count, first=3):
        tokens, documents, length = list(range(first, first + count)), [], 1
        while tokens:
            documents.append(tokens[:length])
            tokens = tokens[length:]
            length = length * 3 % 17 + 1
        return documents

    return make
