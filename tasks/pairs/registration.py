"""What all tasks of pairs have in common: texts are tokenised in the corpora's vocabulary and closed by the end of text."""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from tasks.corpora.tasks import vocabulary
from tasks.pairs.metrics import Metric
from tasks.pairs.source import RecordSource

# In examples. It is small because a live pipeline's saved state holds the whole buffer; a folder's records are shuffled
# before it.
_SHUFFLE_BUFFER_SIZE = 256

Fields = dict[str, tf.Tensor]


def register(
    name: str, source: RecordSource, make_pair: Callable[[Fields], Fields], metric_fns: Sequence[Metric]
) -> None:
    """Registers a task.

    The end of text is appended before seqio cuts to a length, so a text without one was cut: `t5x_ssm.data.pairs` counts them.

    Args:
      name: of the task.
      source: its records.
      make_pair: from a record to the texts `inputs` and `targets`, by TensorFlow.
      metric_fns: of predictions.
    """

    def to_pairs(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(make_pair, num_parallel_calls=tf.data.AUTOTUNE)

    features = {text: seqio.Feature(vocabulary=vocabulary(), add_eos=True) for text in ("inputs", "targets")}
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            to_pairs,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        output_features=features,
        metric_fns=list(metric_fns),
        shuffle_buffer_size=_SHUFFLE_BUFFER_SIZE,
    )
