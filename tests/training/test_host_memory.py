"""What a process frees it keeps: counted in page faults, which come back with every run where it does not."""

import ctypes
import subprocess
import sys

import pytest

RUNS = """
import resource, sys
import jax, jax.numpy as jnp
from t5x_ssm.training.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# Sixteen MiB go in, as much comes out, and twice as much is in between.
run = jax.jit(lambda x: jnp.sort(jnp.sort(x, axis=0) + 1, axis=1))
x = jnp.ones((2048, 2048))
for _ in range(4):
    before = faults()
    jax.block_until_ready(run(x))
    found = faults() - before
print(found)
"""


def faults(way):
    return int(subprocess.run([sys.executable, "-c", RUNS, way], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator has no mallopt")
def test_freed_blocks_are_not_given_back():
    assert faults("kept") < 0.1 * faults("given_back")
