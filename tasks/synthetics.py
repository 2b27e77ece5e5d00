"""seqio tasks over the synthetic languages of the H3 paper (see `tasks.synthetic_languages`).

    induction_head, associative_recall, associative_recall_40      `targets` is the whole sentence: what is trained on
    induction_head_answer, …                                       `targets` is the answer, `inputs` all before it: what is scored

Both have the same sentences in the splits train (5,000) and validation (500). The loss of the first is on all positions; an
evaluation of the second (`python -m t5x_ssm.infer --mode=score --task=induction_head_answer`) counts the answer alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks.synthetic_languages import LANGUAGES, SPLITS, Language, sentences

__all__ = ["SymbolVocabulary", "accuracy"]


class SymbolVocabulary(seqio.Vocabulary):
    """Symbols between spaces, by a list; nothing ends a text, and id 0 is both padding and the first symbol.

    Attributes:
      contents: the symbols in order, for the vocabulary's hash.
    """

    def __init__(self, symbols: Sequence[str]):
        self._symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.contents = " ".join(symbols).encode()
        super().__init__(extra_ids=0)

    @property
    def bos_id(self) -> None:
        return None

    @property
    def eos_id(self) -> None:
        return None

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return len(self._symbols)

    def _encode(self, s: str) -> Sequence[int]:
        unknown = [symbol for symbol in s.split() if symbol not in self._ids]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no symbol of this vocabulary: {' '.join(self._symbols)}")
        return [self._ids[symbol] for symbol in s.split()]

    def _decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._symbols[i] for i in ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        same = tf.strings.split(s)[:, None] == tf.constant(self._symbols)
        known = tf.debugging.Assert(tf.reduce_all(tf.reduce_any(same, axis=1)), ["no symbol of this vocabulary:", s])
        with tf.control_dependencies([known] if known is not None else []):
            return tf.argmax(same, axis=1, output_type=tf.int32)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.strings.reduce_join(tf.gather(tf.constant(self._symbols), ids), axis=-1, separator=" ")


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The percentage of predictions that are the target."""
    return {"accuracy": 100.0 * sum(t == p for t, p in zip(targets, predictions, strict=True)) / len(targets)}


def _open(split: str, language: Language, answer: bool) -> tf.data.Dataset:
    decode = SymbolVocabulary(language.symbols).decode
    rows = sentences(language, split).tolist()
    if not answer:
        return tf.data.Dataset.from_tensor_slices({"targets": [decode(row) for row in rows]})
    texts = {"inputs": [decode(row[:-1]) for row in rows], "targets": [decode(row[-1:]) for row in rows]}
    return tf.data.Dataset.from_tensor_slices(texts)


def _register(name: str, language: Language, answer: bool) -> None:
    # A plain function: seqio insists on the names of its arguments.
    def open_language(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        return _open(split, language, answer)

    open_language.describe_source = functools.partial(dict, language=dataclasses.asdict(language))
    features = ("inputs", "targets") if answer else ("targets",)
    vocabulary = SymbolVocabulary(language.symbols)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(open_language, splits=tuple(SPLITS)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()],
        output_features={feature: seqio.Feature(vocabulary, add_eos=False) for feature in features},
        metric_fns=[accuracy] if answer else [],
        shuffle_buffer_size=SPLITS["train"],
    )


for _name, _language in LANGUAGES.items():
    _register(_name, _language, answer=False)
    _register(f"{_name}_answer", _language, answer=True)
