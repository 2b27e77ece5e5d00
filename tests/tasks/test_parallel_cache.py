"""Caching by several processes, killed and started again: the same files as one process makes without a break."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import tasks
from tasks import cache

ROOT = pathlib.Path(cache.__file__).parents[1]
FILES, DOCUMENTS = 6, 40


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(FILES):
        lines = "".join(json.dumps({"text": f"file {number} document {i} " * 50}) + "\n" for i in range(DOCUMENTS))
        (root / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return root


def start(corpus, output, processes):
    command = [sys.executable, "-m", "tasks.cache", "--mixture=texts", f"--output_dir={output}"]
    command += [f"--processes={processes}", f"--gin.texts/corpora.location.path={corpus}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def contents(output):
    return {
        str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.suffix in (".bin", ".npy", ".json")
    }


@pytest.mark.slow
def test_killed_and_started_again_with_other_workers_it_is_the_same_cache(corpus, tmp_path, monkeypatch):
    tasks.register()
    monkeypatch.setenv("T5X_SSM_TEXTS", str(corpus))
    cache.build("texts", tmp_path / "one", modules=())
    monkeypatch.delenv("T5X_SSM_TEXTS")
    expected = contents(tmp_path / "one")
    assert sum(name.endswith("tokens.bin") for name in expected) == 2 * FILES

    killed = start(corpus, tmp_path / "two", 2)
    while not (made := sorted((tmp_path / "two").glob("texts/.making-*/*/0*"))) and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert made and not list((tmp_path / "two").glob("texts/*.json"))
    before = {path.name: (path / "tokens.bin").stat().st_mtime_ns for path in made}
    (split,) = {path.parent.name for path in made}

    again = start(corpus, tmp_path / "two", 2)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert contents(tmp_path / "two") == expected
    (folder,) = (path for path in (tmp_path / "two" / "texts").iterdir() if path.is_dir())
    after = {name: (folder / split / name / "tokens.bin").stat().st_mtime_ns for name in before}
    assert after == before
    assert pathlib.Path(out.splitlines()[-1]).is_file()
