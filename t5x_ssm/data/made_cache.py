"""The token cache of a mixture, made where it is missing; of several processes by one, while the others wait."""

import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

from t5x_ssm.errors import DataError
from tasks import cache
from tasks.corpora import settings

logger = logging.getLogger(__name__)


def find_or_make(
    name: str,
    cache_dir: str | os.PathLike | None,
    module: str | None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
) -> pathlib.Path:
    """The mixture file of a cache, see `tasks.cache.find`.

    Args:
      name: a registered seqio task or mixture.
      cache_dir: where caches lie; `tasks.cache.default_cache_dir()` if None.
      module: a module to import for its registrations when the cache is made.
      process_index, process_count, barrier: see `t5x_ssm.data.feed.open_feed`.

    Raises:
      CacheError, DataError: it cannot be made.
    """
    cache_dir = cache_dir or cache.default_cache_dir()
    path = cache.find(name, cache_dir)
    if process_count > 1 and barrier is not None:
        try:
            if path is None and process_index == 0:
                path = make(name, cache_dir, module)
        finally:
            # Also after a failure: the others would wait for ever. They fail in the same way.
            barrier()
        path = path or cache.find(name, cache_dir)
    return path or make(name, cache_dir, module)


def make(name: str, cache_dir: str | os.PathLike, module: str | None) -> pathlib.Path:
    """Runs `tasks.cache`: here if the program has registered the task itself, else in a process of its own.

    The other process keeps TensorFlow's memory, threads and claim on accelerators out of a training process.
    """
    logger.info("There is no token cache of %s in %s yet; making it (once).", name, cache_dir)
    modules = ["tasks", module] if module else ["tasks"]
    seqio = sys.modules.get("seqio")
    if seqio and name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        return cache.build(name, cache_dir, modules=modules[1:])
    command = [sys.executable, "-m", "tasks.cache", f"--mixture={name}", f"--cache_dir={cache_dir}"]
    command += [f"--module={m}" for m in modules[1:]]
    command += [f"--gin.{parameter}={value!r}" for parameter, value in settings.given().items()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if lines and lines[-1].startswith("tasks.cache: "):
            raise DataError(lines[-1].removeprefix("tasks.cache: "))
        raise RuntimeError(f"Making the token cache of {name} failed:\n{done.stderr}")
    return pathlib.Path(done.stdout.strip().splitlines()[-1])
