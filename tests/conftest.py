"""What all tests share: the CPU as device, quiet TensorFlow, and which markers run by default."""

import os

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
