"""Which rows processes feed, on meshes of devices that are only numbers; and the arrays of one process on eight devices."""

import types

import jax
import numpy as np
import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import batch_parts
from t5x_ssm.parallel.mesh import AXES


def mesh(processes, **sizes):
    """A mesh whose devices, in its order, are of these processes."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array([types.SimpleNamespace(process_index=process) for process in processes], object)
    return types.SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (mesh([0, 0, 1, 1], data=4), [(0, 2), (1, 2)]),
        (mesh([0, 0, 1, 1], data=2, model=2), [(0, 2), (1, 2)]),
        # An axis over both processes: they feed the same.
        (mesh([0, 1], model=2), [(0, 1), (0, 1)]),
        (mesh([0, 0, 1, 1], sequence=4), [(0, 1), (0, 1)]),
        (mesh([0, 1, 2, 3], fsdp=2, model=2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (mesh([0, 1, 0, 1], fsdp=2, model=2), [(0, 1), (0, 1)]),
        # The mesh's order is not that of the processes.
        (mesh([1, 1, 0, 0], data=2, fsdp=2), [(1, 2), (0, 2)]),
        (mesh([0, 1, 0, 1], data=4), [(0, 2), (1, 2)]),
    ],
)
def test_processes_feed_the_rows_that_their_devices_hold(given, expected):
    assert [batch_parts.share(given, process) for process in range(len(expected))] == expected


def test_rows_that_are_shared_in_part_are_refused():
    # Three shards of two devices: processes 0 and 1 have the middle one in common.
    uneven = mesh([0, 0, 0, 1, 1, 1], data=3, model=2)
    with pytest.raises(UserError, match=r"MeshConfig \(data 3, fsdp 1, sequence 1, model 2\)"):
        batch_parts.share(uneven, 0)


def test_the_whole_batch_of_one_process():
    small = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    batch = {"tokens": np.arange(12).reshape(4, 3), "targets": np.arange(4), "pairs": np.arange(24).reshape(4, 2, 3)}
    for name, array in batch_parts.to_global(batch, small).items():
        np.testing.assert_array_equal(array, batch[name])
