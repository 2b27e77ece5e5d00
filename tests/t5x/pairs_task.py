"""A seqio task of inputs and targets, registered when this is imported: some words, and the same backwards."""

import numpy as np
import seqio

PAIRS_TASK = "words_backwards"
WORDS = (
    "state",
    "space",
    "models",
    "carry",
    "what",
    "they",
    "have",
    "read",
    "in",
    "a",
    "vector",
    "of",
    "fixed",
    "size",
)
SPLITS = {"train": 1000, "validation": 6}


def texts(split: str) -> list[str]:
    random = np.random.default_rng(SPLITS[split])
    return [" ".join(random.choice(WORDS, random.integers(1, 4))) for _ in range(SPLITS[split])]


def examples(split, shuffle_files=False, seed=None):
    import tensorflow as tf

    del shuffle_files, seed
    backwards = [" ".join(reversed(text.split())) for text in texts(split)]
    return tf.data.Dataset.from_tensor_slices({"inputs": texts(split), "targets": backwards})


def mean_length(targets, predictions):
    """Characters of a prediction: a metric that says something of a model that has learnt nothing."""
    del targets
    return {"mean_length": float(np.mean([len(text) for text in predictions]))}


feature = seqio.Feature(vocabulary=seqio.ByteVocabulary(extra_ids=0), add_eos=True)
seqio.TaskRegistry.add(
    PAIRS_TASK,
    source=seqio.FunctionDataSource(examples, splits=tuple(SPLITS)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features={"inputs": feature, "targets": feature},
    metric_fns=[mean_length],
)
