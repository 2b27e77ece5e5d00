"""Cutting long documents where seqio would trim them."""

import tensorflow as tf


def split_long_documents(
    dataset: tf.data.Dataset, sequence_length: dict[str, int] | None = None, feature: str = "targets"
) -> tf.data.Dataset:
    """Cuts documents into pieces of the sequence length, where seqio would trim them and lose the rest.

    Without a sequence length (the token cache takes whole documents) nothing changes. Pieces keep only `feature`.
    """
    length = (sequence_length or {}).get(feature)
    if length is None:
        return dataset

    def pieces(example):
        tokens = example[feature]
        count = (tf.size(tokens) + length - 1) // length
        return tf.data.Dataset.range(tf.cast(count, tf.int64)).map(
            lambda i: {feature: tokens[i * length : (i + 1) * length]}
        )

    return dataset.flat_map(pieces)
