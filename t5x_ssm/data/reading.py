"""Errors of `tasks`, which knows nothing of this package, as errors for the user."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_ssm.errors import DataError
from tasks.cache_files import CacheError


@contextlib.contextmanager
def for_the_user(tasks: Sequence[Any] = ()) -> Iterator[None]:
    """Turns a `CacheError` of `tasks` into a DataError.

    Args:
      tasks: seqio tasks that are read in the block. TensorFlow hides what their sources raise in an error of its own; a source
        keeps it as its `failure`.

    Raises:
      DataError: in place of a CacheError.
    """
    try:
        yield
    except Exception as error:
        failures = (getattr(task.source, "failure", None) for task in tasks)
        known = next((e for e in (error, *failures) if isinstance(e, CacheError)), None)
        if known is None:
            raise
        raise DataError(str(known)) from error
