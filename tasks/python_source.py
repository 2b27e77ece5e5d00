"""seqio data sources whose examples Python makes, and what went wrong in them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf


class PythonSource(seqio.DataSource):
    """A source that Python reads, shard by shard; a split is one shard unless a subclass says otherwise.

    Attributes:
      failure: the last error in reading. TensorFlow hides what a generator raises in an error of its own, so whoever reads
        looks here for it.
    """

    failure: Exception | None = None

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        """Names of the shards of a split."""
        return [split]

    def generated(
        self, examples: Callable[[], Iterator[Mapping[str, Any]]], signature: Mapping[str, tf.TensorSpec]
    ) -> tf.data.Dataset:
        """The examples as a dataset that keeps an error in making them as `failure`.

        Args:
          examples: begins anew; called for each iteration of the dataset.
          signature: shape and type of each feature.
        """

        def remembering() -> Iterator[Mapping[str, Any]]:
            self.failure = None
            try:
                yield from examples()
            except Exception as error:
                self.failure = error
                raise

        return tf.data.Dataset.from_generator(remembering, output_signature=dict(signature))
