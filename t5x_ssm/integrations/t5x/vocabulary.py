"""The vocabulary of a task as T5X's models want it: given to the model, and checked against the network.

Importing this module registers the project's tasks: T5X locks gin's configuration before it asks for one, and some tasks
are configurable.
"""

from typing import Any

import seqio

import tasks
from t5x_ssm.data.feed import check_vocabulary
from tasks import cache, vocabularies

tasks.register()


def task_vocabulary(mixture_or_task_name: str, network: Any, feature: str = "targets") -> seqio.Vocabulary:
    """The vocabulary of a feature of a seqio task or mixture, for T5X's `vocabulary`.

    Args:
      mixture_or_task_name: a task of the project, or one that is already registered.
      network: the module whose `vocab_size` must hold all ids.
      feature: 'inputs' or 'targets'.

    Raises:
      UserError: there is no such task, or the network's embedding is too small.
    """
    provider = cache.registered(mixture_or_task_name, ())
    vocabulary = provider.output_features[feature].vocabulary
    check_vocabulary(vocabularies.describe(vocabulary), embedding_size=network.vocab_size)
    return vocabulary
