"""seqio registrations of the project's corpora, and the tools that prepare them.

Importing `tasks` registers nothing and costs nothing, so that a machine which trains from a token cache needs neither
seqio nor TensorFlow. A registering module is imported by its name (`import tasks.embedded` in Python or in a gin file
of T5X), or all of them at once by `register()`. Importing them reads no disk and no network beyond the import itself:
a source is opened when its data is asked for.
"""

import importlib

REGISTERING_MODULES = (
    "tasks.embedded",
    "tasks.synthetics",
    "tasks.corpora.books",
    "tasks.corpora.code",
    "tasks.corpora.mathematics",
    "tasks.corpora.benchmarks",
    "tasks.corpora.web",
    "tasks.corpora.pile",
    "tasks.corpora.mixtures",
    "tasks.long_range_arena.registered",
    "tasks.pairs.summarization",
    "tasks.pairs.glue",
    "tasks.pairs.superglue",
)


def register() -> None:
    """Registers every task and mixture of this package with seqio; a second call does nothing."""
    for module in REGISTERING_MODULES:
        importlib.import_module(module)
