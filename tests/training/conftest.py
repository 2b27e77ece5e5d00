"""The fixture `store`, for tests that use the clients of an object store in their own process."""

import pytest
from object_store import ObjectStore


@pytest.fixture(scope="session")
def running_store():
    """One for all tests of a process: Orbax and TensorStore remember where they found a bucket."""
    with ObjectStore() as found:
        yield found


@pytest.fixture
def store(running_store, monkeypatch):
    """An empty object store that answers for gs://bucket."""
    for name, value in running_store.environment.items():
        monkeypatch.setenv(name, value)
    running_store.objects.clear()
    running_store.forbidden = ()
    return running_store
