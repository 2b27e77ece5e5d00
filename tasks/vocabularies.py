"""Vocabularies: bytes, SentencePiece and GPT-2's, and what identifies a vocabulary in a cache or a checkpoint.

`load` opens one by name or path, `deferred` only when it is first used. A description is a small JSON-able dict, so that the token cache, a checkpoint and a model that only knows its
vocabulary size can be compared without importing seqio.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tasks.cache_files import CacheError

if TYPE_CHECKING:
    import seqio

# The layout of seqio's byte vocabulary (ByT5, arXiv:2105.13626): pad 0, EOS 1, unknown 2, then the 256 bytes.
PAD_ID, EOS_ID, FIRST_BYTE_ID, BYTE_VOCABULARY_SIZE = 0, 1, 3, 259


# By name: T5's own SentencePiece model (32,000 pieces), with the 100 sentinels that T5 adds.
T5_MODEL, T5_SENTINELS = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model", 100


class VocabularyError(CacheError):
    """A vocabulary that cannot be opened; the message is for the user."""


def load(name: str) -> "seqio.Vocabulary":
    """Opens a vocabulary.

    Args:
      name: 'bytes'; 't5'; the path of a SentencePiece model (…model, local or gs://) or of a `tokenizer.json` of Hugging
        Face; a folder with GPT-2's `vocab.json` and `merges.txt`. ':100' after it adds so many sentinels at the end.

    Raises:
      VocabularyError: if there is none; the message names the file.
    """
    import seqio

    path, colon, count = name.rpartition(":")
    if not (colon and count.isdigit()):
        path, count = name, "0"
    sentinels = int(count)
    if path == "bytes":
        return seqio.ByteVocabulary(extra_ids=sentinels)
    if path == "t5":
        return seqio.SentencePieceVocabulary(T5_MODEL, extra_ids=sentinels or T5_SENTINELS)
    if path.endswith(".model"):
        if not path.startswith("gs://") and not os.path.isfile(path):
            raise VocabularyError(
                f"There is no SentencePiece model {path}; python -m tasks.train_vocabulary makes one."
            )
        return seqio.SentencePieceVocabulary(path, extra_ids=sentinels)
    if path.endswith(".json") or os.path.isdir(path):
        from tasks.byte_pairs import BytePairVocabulary

        return BytePairVocabulary(path, extra_ids=sentinels)
    raise VocabularyError(
        f"{name!r} is no vocabulary. There are 'bytes', 't5', a path that ends in .model (SentencePiece) or in .json "
        "(tokenizers), and a folder with vocab.json and merges.txt; ':100' after it adds 100 sentinels."
    )


def deferred(choose: Callable[[], str]) -> "seqio.Vocabulary":
    """A vocabulary that calls `choose` for its name, and opens it, when it is first used."""
    from tasks.deferred_vocabulary import DeferredVocabulary

    return DeferredVocabulary(choose)


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

    The hash covers the class, the ids and, for vocabularies made from files, their contents; it does not depend on where
    they lie. A vocabulary without padding has `bos_id` in its description, the id that documents begin with as inputs;
    all others have 0 there, as seqio has it.
    """
    vocabulary = getattr(vocabulary, "opened", vocabulary)
    described = {
        "name": type(vocabulary).__name__,
        "size": int(vocabulary.vocab_size),
        "extra_ids": int(vocabulary.extra_ids or 0),
        "pad_id": _optional_int(vocabulary.pad_id),
        "eos_id": _optional_int(vocabulary.eos_id),
        "unk_id": _optional_int(vocabulary.unk_id),
    }
    if described["pad_id"] is None:
        described["bos_id"] = int(vocabulary.bos_id)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    model = getattr(vocabulary, "sp_model", None) or getattr(vocabulary, "contents", None)
    if isinstance(model, bytes):
        digest.update(model)
    described["hash"] = digest.hexdigest()[:32]
    return described


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
