"""Vocabularies: the byte vocabulary, and what identifies a vocabulary in a cache or a checkpoint.

A description is a small JSON-able dict, so that the token cache, a checkpoint and a model that only knows its
vocabulary size can be compared without importing seqio.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import seqio

# The layout of seqio's byte vocabulary (ByT5, arXiv:2105.13626): pad 0, EOS 1, unknown 2, then the 256 bytes.
PAD_ID, EOS_ID, FIRST_BYTE_ID, BYTE_VOCABULARY_SIZE = 0, 1, 3, 259


def byte_vocabulary() -> "seqio.ByteVocabulary":
    """seqio's byte vocabulary without sentinels: 259 ids."""
    import seqio

    return seqio.ByteVocabulary(extra_ids=0)


def encode_bytes(text: str | bytes) -> list[int]:
    """Ids of the byte vocabulary, without EOS; equal to seqio's, without importing it."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    return [byte + FIRST_BYTE_ID for byte in data]


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes that ids of the byte vocabulary stand for; special ids stand for nothing."""
    return bytes(id - FIRST_BYTE_ID for id in ids if FIRST_BYTE_ID <= id < BYTE_VOCABULARY_SIZE)


def describe(vocabulary: "seqio.Vocabulary") -> dict[str, Any]:
    """Says what a vocabulary is: name, size, special ids, and a hash that changes when its encoding may change.

    The hash covers the class, the ids and, for vocabularies made from a file (SentencePiece), the file's contents;
    it does not depend on where that file lies.
    """
    described = {
        "name": type(vocabulary).__name__,
        "size": int(vocabulary.vocab_size),
        "extra_ids": int(vocabulary.extra_ids or 0),
        "pad_id": _optional_int(vocabulary.pad_id),
        "eos_id": _optional_int(vocabulary.eos_id),
        "unk_id": _optional_int(vocabulary.unk_id),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    model = getattr(vocabulary, "sp_model", None)
    if isinstance(model, bytes):
        digest.update(model)
    described["hash"] = digest.hexdigest()[:32]
    return described


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
