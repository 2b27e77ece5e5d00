"""seqio tasks over the embedded corpus, and their mixture: pretraining data that needs no download.

    embedded_books, embedded_code, embedded_math    one task per domain (see `tasks.embedded_corpus`)
    embedded_books_code_math                        books 1 : code 2 : math 1, counted in training sequences

Every task has the single feature `targets` over the byte vocabulary, each document closed by EOS. They are plain
seqio tasks, as usable under T5X as here.
"""

import functools

import seqio
import tensorflow as tf

from tasks import embedded_corpus
from tasks.embedded_corpus import documents
from tasks.pieces import split_long_documents
from tasks.vocabularies import byte_vocabulary

__all__ = ["MIXTURE_RATES", "documents", "split_long_documents"]

MIXTURE_RATES = {"embedded_books": 1, "embedded_code": 2, "embedded_math": 1}

# In pieces of the sequence length. It is small because a live pipeline's saved state holds the whole buffer.
_SHUFFLE_BUFFER_SIZE = 256

_FEATURES = {"targets": seqio.Feature(vocabulary=byte_vocabulary(), add_eos=True)}


def _open(split: str, shuffle_files: bool, seed: int | None = None, *, domain: str) -> tf.data.Dataset:
    texts = tf.constant(documents(domain, split))
    order = tf.data.Dataset.range(len(texts))
    if shuffle_files:
        # Numbers are shuffled, not texts: the shuffle buffer is part of a saved iterator state.
        order = order.shuffle(len(texts), seed=seed)
    return order.map(lambda i: {"targets": tf.gather(texts, i)})


def _register(domain: str) -> None:
    # A plain function: seqio insists on the names of its arguments.
    def open_domain(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return _open(split, shuffle_files, seed, domain=domain)

    # What the token cache needs to know about this source beyond its code; asked for when a cache is made.
    open_domain.describe_source = functools.partial(_describe, domain)
    seqio.TaskRegistry.add(
        f"embedded_{domain}",
        source=seqio.FunctionDataSource(open_domain, splits=embedded_corpus.SPLITS),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            seqio.CacheDatasetPlaceholder(),
            split_long_documents,
        ],
        output_features=_FEATURES,
        metric_fns=[],
        shuffle_buffer_size=_SHUFFLE_BUFFER_SIZE,
    )


def _describe(domain: str) -> dict:
    return {"environment": embedded_corpus.environment(domain)}


for _domain in embedded_corpus.DOMAINS:
    _register(_domain)
seqio.MixtureRegistry.add("embedded_books_code_math", list(MIXTURE_RATES.items()))
