"""GPT-2's byte-pair vocabulary (Radford et al. 2019), through the `tokenizers` library, from local files."""

import pathlib
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks.vocabularies import VocabularyError

END_OF_TEXT = "<|endoftext|>"


class BytePairVocabulary(seqio.Vocabulary):
    """Byte pairs under their published ids. Id 0 is a token like any other, so there is no padding: the token cache can
    be trained on, while seqio's own feature converters, which pad with 0, cannot tell padding from text.

    Attributes:
      contents: what the vocabulary was read from, for its hash.
    """

    def __init__(self, path: str, extra_ids: int = 0):
        """
        Args:
          path: a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`.
          extra_ids: sentinels at the end.

        Raises:
          VocabularyError: if files are missing or broken, or there is no <|endoftext|>.
        """
        try:
            import tokenizers
        except ImportError:
            raise VocabularyError(
                f"The vocabulary {path} needs the library tokenizers; install t5x_ssm[data]."
            ) from None
        given = pathlib.Path(path)
        files = [given / "vocab.json", given / "merges.txt"] if given.is_dir() else [given]
        try:
            self.contents = b"\n".join(file.read_bytes() for file in files)
            if given.is_dir():
                self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(files[0]), str(files[1])))
                self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
                self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
            else:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(given))
        except Exception as error:  # The library raises bare Exceptions.
            raise VocabularyError(f"The vocabulary {path} cannot be read: {error}.") from error
        # Text that happens to spell a special token stays text.
        self._tokenizer.encode_special_tokens = True
        self._end = self._tokenizer.token_to_id(END_OF_TEXT)
        if self._end is None:
            raise VocabularyError(f"The vocabulary {path} has no {END_OF_TEXT}, which ends documents.")
        super().__init__(extra_ids=extra_ids)

    @property
    def bos_id(self) -> int:
        return self._end

    @property
    def eos_id(self) -> int:
        return self._end

    @property
    def unk_id(self) -> None:
        return None

    @property
    def pad_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def _encode(self, s: str) -> Sequence[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i < self._base_vocab_size], skip_special_tokens=True)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):
            return tf.constant(self._encode(text.numpy().decode("utf-8", "replace")), tf.int32)

        ids = tf.py_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda i: tf.constant(self._decode(i.numpy().tolist())), [ids], tf.string)
