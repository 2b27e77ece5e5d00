"""Registers the arena's tasks with seqio; see the package."""

import functools

import seqio

from tasks.long_range_arena import generated, listops, local, pathfinder
from tasks.long_range_arena.source import register
from tasks.vocabularies import byte_vocabulary

_PIXELS = seqio.PassThroughVocabulary(256)
_SAMPLES = seqio.PassThroughVocabulary(1 << 16)
_SYMBOLS = seqio.PassThroughVocabulary(listops.VOCABULARY_SIZE, eos_id=listops.EOS_ID)

for _name, _vocabulary, _classes in (
    ("lra_listops", _SYMBOLS, listops.NUM_CLASSES),
    ("lra_pathfinder", _PIXELS, pathfinder.NUM_CLASSES),
    ("lra_pathx", _PIXELS, pathfinder.NUM_CLASSES),
):
    register(
        _name,
        functools.partial(generated.shards, _name),
        functools.partial(generated.read, _name),
        vocabulary=_vocabulary,
        num_classes=_classes,
        describe=functools.partial(generated.describe, _name),
    )
for _name, _vocabulary, _classes, _texts in (
    ("lra_text", byte_vocabulary(), 2, ("inputs",)),
    ("lra_retrieval", byte_vocabulary(), 2, ("inputs", "inputs2")),
    ("lra_image", _PIXELS, 10, ("inputs",)),
    ("speech_commands", _SAMPLES, len(local.WORDS), ("inputs",)),
):
    _shards, _read = local.READERS[_name]
    register(
        _name,
        _shards,
        _read,
        vocabulary=_vocabulary,
        num_classes=_classes,
        texts=_texts,
        describe=functools.partial(local.describe, _name),
    )
