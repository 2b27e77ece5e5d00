"""Start to first step of the quickstart's training: `python -m benchmarks.startup [--repeats=3]`.

Runs the real command with an empty and with a warm compilation cache, and clocks from the start of the process to the first
line of its history. The token cache is made beforehand. Writes benchmarks/results/startup.json.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import report, timing
from t5x_ssm.data import feed as feed_lib


def first_step_seconds(folder: pathlib.Path, compilation_cache: pathlib.Path) -> float:
    """Trains one step of a new run; seconds until its line of history stands on disk."""
    command = [sys.executable, "-m", "t5x_ssm.train", "--gin_file=quickstart.gin", f"--gin.MODEL_DIR={folder}"]
    command += ["--gin.TRAIN_STEPS=1", "--gin.WARMUP_STEPS=1", "--gin.EVAL_PERIOD=0", "--gin.EVAL_STEPS=1"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    history = folder / "metrics.jsonl"
    while process.poll() is None and not (history.exists() and history.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    feed_lib.open_feed(
        feed_lib.DatasetConfig("embedded_books_code_math", {"targets": 512}, split="train", batch_size=8)
    ).close()
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for repeat in range(repeats):
            cache = folder / f"cache{repeat}"
            cold.append(first_step_seconds(folder / f"cold{repeat}", cache))
            warm.append(first_step_seconds(folder / f"warm{repeat}", cache))
    report.write(
        "startup",
        {
            "cold_seconds": report.spread(cold),
            "warm_seconds": report.spread(warm),
            "warm_over_cold": timing.ratios(warm, cold),
        },
    )


if __name__ == "__main__":
    main()
