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
