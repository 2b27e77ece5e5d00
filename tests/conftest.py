"""What all tests share: the CPU as device, quiet TensorFlow, and which markers run by default."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(os.path.dirname(__file__), "..", ".hypothesis"))

OPT_IN = ("nightly", "aot")


def pytest_collection_modifyitems(config, items):
    """Leaves out the opt-in tests unless -m names their marker."""
    expression = config.getoption("-m") or ""
    left_out = [
        item for item in items if any(item.get_closest_marker(name) and name not in expression for name in OPT_IN)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def training_caches(tmp_path_factory):
    """Environment of training commands: a token cache made by hand, and a compilation cache that all of them share."""
    from training_command import write_corpus

    root = tmp_path_factory.mktemp("caches")
    (root / "tokens").mkdir()
    write_corpus(root / "tokens")
    return {"T5X_SSM_CACHE_DIR": root / "tokens", "JAX_COMPILATION_CACHE_DIR": root / "xla"}


@pytest.fixture(scope="session")
def running_store():
    """One object store for all tests of a process: Orbax and TensorStore remember where they found a bucket."""
    from object_store import ObjectStore

    with ObjectStore() as found:
        yield found


@pytest.fixture
def store(running_store, monkeypatch):
    """An empty object store that answers for gs://bucket in this process."""
    for name, value in running_store.environment.items():
        monkeypatch.setenv(name, value)
    running_store.objects.clear()
    running_store.forbidden = ()
    return running_store
