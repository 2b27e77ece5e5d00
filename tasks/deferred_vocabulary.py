"""A vocabulary that is chosen when it is first used, so that registering a task reads no setting and no file."""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from tasks import vocabularies


class DeferredVocabulary(seqio.Vocabulary):
    """Does as the vocabulary that `choose` names, see `vocabularies.load`. Another name later is another vocabulary."""

    def __init__(self, choose: Callable[[], str]):
        self._choose = choose
        self._by_name: dict[str, seqio.Vocabulary] = {}
        super().__init__()

    @property
    def opened(self) -> seqio.Vocabulary:
        """The vocabulary itself."""
        name = self._choose()
        if name not in self._by_name:
            self._by_name[name] = vocabularies.load(name)
        return self._by_name[name]

    @property
    def bos_id(self) -> int | None:
        return self.opened.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.opened.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.opened.unk_id

    @property
    def pad_id(self) -> int | None:
        return self.opened.pad_id

    @property
    def extra_ids(self) -> int:
        return self.opened.extra_ids

    @property
    def vocab_size(self) -> int:
        return self.opened.vocab_size

    @property
    def _base_vocab_size(self) -> int:
        return self.opened._base_vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.opened._encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.opened._decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return self.opened._encode_tf(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return self.opened._decode_tf(ids)
