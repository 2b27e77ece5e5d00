"""Memory of the host that a process frees, where the devices are CPUs.

The arrays of a step come and go with it, and its temporaries are one large block. glibc gives large blocks back to the system as soon
as they are freed, and so every page of them is mapped and cleared again in the next step: a third of the time of a small language
model (`python -m benchmarks.host_memory`).
"""

import ctypes

import jax

# Of glibc's malloc.h: how much that is free stays, and how many blocks may be mappings of their own.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
KEPT_BYTES = (1 << 31) - 1  # the most that mallopt takes


def keep_freed_memory() -> bool:
    """Has this process keep what it frees, up to 2 GiB; before the first use of a device, and only where devices are CPUs.

    Programs then run in the thread that calls them: glibc keeps large blocks for a process's first thread alone. The next step's
    batch is ready by then in any case, and a program has all cores.

    Returns:
      Whether there was an allocator that could be asked (glibc's can).
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or jax.default_backend() != "cpu":
        return False
    return all([mallopt(name, value) == 1 for name, value in ((_TRIM_THRESHOLD, KEPT_BYTES), (_MMAP_MAX, 0))])
