"""Decisions that all processes of a run take together.

A process that raises alone leaves the others waiting in the next collective. So whatever one process reads from a disk,
and whatever can fail on one process only, passes through here: everyone learns of it, and everyone goes on or raises.

Every function is a collective: all processes call it, in the same order, from their main thread.
"""

import collections
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ssm import errors

T = TypeVar("T")


def gather_json(value: Any) -> list[Any]:
    """Returns every process's `value`, in the order of the processes. Values are JSON-able."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([data.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def succeed_together(function: Callable[[], T]) -> T:
    """Calls `function` on every process; returns this process's result, or raises on all when it raised on any.

    All processes raise an error of the same class: that of the lowest process that failed.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as e:
        error = e
    reports = gather_json(None if error is None else [type(error).__name__, str(error)])
    first = next((report for report in reports if report is not None), None)
    if first is None:
        return result
    name, message = first
    if error is not None and type(error).__name__ == name:
        raise error
    known = getattr(errors, name, None)
    is_user_error = isinstance(known, type) and issubclass(known, errors.UserError)
    raise (known if is_user_error else RuntimeError)(message) from error


def ask_first(function: Callable[[], T]) -> T:
    """Calls `function` on process 0 only and returns its JSON-able result, or raises its error, on all."""
    result = succeed_together(lambda: function() if jax.process_index() == 0 else None)
    return gather_json(result)[0]


def barrier() -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("barrier")


class LateAny:
    """Whether any process has said yes, known `lag` questions later, so that no question waits for the devices.

    The question travels as a computation of its own behind the train step of the same number. All processes get the
    same answer at the same question.
    """

    def __init__(self, lag: int = 2):
        mesh = Mesh(np.asarray(jax.devices()), ("devices",))
        self._split = NamedSharding(mesh, PartitionSpec("devices"))
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._local = jax.local_device_count()
        self._lag = lag
        self._asked: collections.deque[jax.Array] = collections.deque()

    def ask(self, yes: bool) -> bool:
        """Asks anew; returns the answer to the question that was asked `lag` calls ago, False before there is one."""
        said = np.full(self._local, yes, np.int32)
        self._asked.append(self._any(jax.make_array_from_process_local_data(self._split, said)))
        return len(self._asked) > self._lag and bool(self._asked.popleft())
