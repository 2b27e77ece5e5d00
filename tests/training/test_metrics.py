import json
import math
import os
import random
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.training import metrics
from t5x_ssm.training.metrics import MetricQueue, MetricsLog, MetricWindow, history, summarise_sums


def step_metrics(seed, skipped=False):
    draw = random.Random(seed)
    values = {
        "loss": draw.uniform(90, 120),
        "nats": draw.uniform(80, 100),
        "z_loss": draw.random() / 3,
        "correct": float(draw.randrange(40)),
        "weights": float(draw.randrange(30, 50)),
        "grad_norm": draw.random() * 7,
        "param_norm": draw.random() * 100,
        "update_norm": draw.random(),
        "learning_rate": draw.random() * 1e-3,
        "learning_rate/state_space": draw.random() * 1e-4,
        "skipped": 0.0,
    }
    if skipped:
        values |= {"loss": math.nan, "nats": math.nan, "grad_norm": math.inf, "skipped": 1.0}
    return values


def test_window_by_hand():
    window = MetricWindow()
    first = {"loss": 12.0, "nats": 10.0, "correct": 3.0, "weights": 6.0, "grad_norm": 1.0, "skipped": 0.0}
    second = {"loss": 6.0, "nats": 5.0, "correct": 3.0, "weights": 2.0, "grad_norm": 4.0, "skipped": 0.0}
    spoiled = {
        "loss": math.nan,
        "nats": math.nan,
        "correct": 1.0,
        "weights": 7.0,
        "grad_norm": math.nan,
        "skipped": 1.0,
    }
    window.add(first | {"param_norm": 3.0, "learning_rate": 0.1}, {"step": 0.5, "data": 0.25})
    window.add(second | {"param_norm": 4.0, "learning_rate": 0.2}, {"step": 1.0})
    window.add(spoiled | {"param_norm": 9.0, "learning_rate": 0.3}, {"step": 1.5})
    line = window.close(bytes_per_token=4.0)
    expected = {
        "loss": 18 / 8,
        "nats_per_token": 15 / 8,
        "perplexity": math.exp(15 / 8),
        "bits_per_token": 15 / 8 / math.log(2),
        "bits_per_byte": 15 / 32 / math.log(2),
        "accuracy": 6 / 8,
        "grad_norm": 2.5,
        "grad_norm_max": 4.0,
        "param_norm": 4.0,
        "learning_rate": 0.2,
        "steps": 3,
        "tokens": 15.0,
        "skipped": 1,
        "steps_total": 3,
        "tokens_total": 15.0,
        "skipped_total": 1,
        "time/step_seconds": 1.0,
        "time/data_seconds": 0.25 / 3,
        "time/tokens_per_second": 5.0,
    }
    assert line.keys() == expected.keys()
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-12), name

    assert window.steps == 0
    window.add(first)
    line = window.close()
    assert (line["steps"], line["tokens"], line["steps_total"], line["tokens_total"]) == (1, 6.0, 4, 21.0)
    assert line["grad_norm_max"] == 1.0 and line["skipped_total"] == 1 and "bits_per_byte" not in line


def test_a_window_of_skipped_steps_has_counts_and_no_loss():
    window = MetricWindow()
    window.add(step_metrics(0, skipped=True))
    line = window.close()
    assert line["skipped"] == 1 and line["tokens"] > 0
    assert not {"loss", "grad_norm", "learning_rate"} & line.keys()


@pytest.mark.parametrize("killed_after", range(1, 9))
def test_a_resumed_window_is_the_uninterrupted_one_to_the_bit(killed_after):
    def run(window, steps):
        lines = []
        for step in steps:
            window.add(step_metrics(step, skipped=step == 3), {"step": 0.1 + step / 7})
            if step % 4 == 0:
                lines.append(window.close(3.3))
        return lines

    whole = run(MetricWindow(), range(1, 13))
    window = MetricWindow()
    lines = run(window, range(1, killed_after + 1))
    saved = json.dumps(window.state(), allow_nan=False)
    run(window, range(killed_after + 1, 13))  # what the killed process still did must not leak into the saved state
    resumed = MetricWindow()
    resumed.restore(json.loads(saved))
    assert lines + run(resumed, range(killed_after + 1, 13)) == whole


def test_bits_per_byte_from_counted_bytes():
    line = summarise_sums({"nats": 2 * math.log(2), "weights": 1.0, "bytes": 4.0}, bytes_per_token=100.0)
    assert line["bits_per_byte"] == pytest.approx(0.5) and "bytes" not in line
    assert summarise_sums({"nats": 0.0, "weights": 0.0}) == {}
    assert summarise_sums({"nats": 1e4, "weights": 1.0})["perplexity"] == math.inf


def test_queue_returns_steps_late_in_order_and_all_when_drained():
    queue = MetricQueue(lag=2)
    out = [queue.push(step, {"loss": jnp.float32(step / 3)}, context=f"batch {step}") for step in range(1, 5)]
    assert [[entry[0] for entry in ready] for ready in out] == [[], [], [1], [2]]
    step, values, context = out[2][0]
    assert (step, values, context) == (1, {"loss": float(np.float32(1 / 3))}, "batch 1")
    assert isinstance(values["loss"], float)
    assert [entry[0] for entry in queue.drain()] == [3, 4]
    assert queue.drain() == []


def write_history(path, steps):
    log = MetricsLog(path)
    for step in steps:
        log.write(step, {"loss": step / 3, "time/step_seconds": random.random()})
        log.write(step, {"nats_per_token": step / 7}, split="eval/books")
    log.close()


def test_history_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write_history(path, [10, 20])
    assert history(path, split="train", timings=False) == [
        {"step": 10, "split": "train", "loss": 10 / 3},
        {"step": 20, "split": "train", "loss": 20 / 3},
    ]
    assert [(row["step"], row["split"]) for row in history(path)] == [
        (10, "train"),
        (10, "eval/books"),
        (20, "train"),
        (20, "eval/books"),
    ]
    assert "time/step_seconds" in history(path)[0]


def test_values_that_are_not_finite_become_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(1, {"perplexity": math.inf, "loss": 1.0})
    log.close()
    assert history(tmp_path / "m.jsonl") == [{"step": 1, "split": "train", "perplexity": None, "loss": 1.0}]


@pytest.mark.parametrize("torn", ["", '{"step": 40, "split": "tr', '{"step": 30, "split": "train"}', "\x00\x00"])
def test_resume_drops_later_lines_and_a_torn_one(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_history(path, [10, 20, 30])
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + torn)
    assert len(history(path)) == 6

    log = MetricsLog(path, resume_step=20)
    assert path.read_text() == "".join(whole[:4])
    log.write(30, {"loss": 0.5})
    log.close()
    assert [row["step"] for row in history(path, "train")] == [10, 20, 30]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_history_with_nothing_to_drop_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_history(path, [10, 20])
    inode = path.stat().st_ino
    MetricsLog(path, resume_step=25).close()
    assert path.stat().st_ino == inode and len(history(path)) == 4
    MetricsLog(path, resume_step=0).close()
    assert history(path) == []


def test_lines_that_cannot_be_read_are_kept_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_history(path, [10])
    path.write_text('{"step": 5, "spl{"step": 6}\n' + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1,"):
        history(path)
    MetricsLog(path, resume_step=10).close()
    assert [row["step"] for row in history(path)] == [10, 10]
    assert (tmp_path / "metrics.jsonl.unreadable").read_text() == '{"step": 5, "spl{"step": 6}\n'


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"loss": 1.0})
    write = os.write
    monkeypatch.setattr(metrics.os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(OSError):
        log.write(2, {"loss": 2.0})
    monkeypatch.undo()
    log.write(3, {"loss": 3.0})
    log.close()
    assert [row["step"] for row in history(path)] == [1, 3]


def test_a_disabled_log_touches_nothing(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "events", enabled=False)
    log.write(1, {"loss": 1.0})
    log.sync()
    log.close()
    assert os.listdir(tmp_path) == []


def events(path):
    """The events of an event file, read by the TFRecord layout."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_events(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", resume_step=6, tensorboard_dir=tmp_path / "events")
    log.write(8, {"loss": 0.25, "learning_rate/state_space": 0.5})
    log.sync()
    (first,) = (tmp_path / "events").iterdir()
    found = events(first)
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars == [(8, "train/loss", 0.25), (8, "train/learning_rate/state_space", 0.5)]
    # SessionLog.START = 1 at step 7: TensorBoard forgets what earlier files say from there on.
    assert [(e.step, e.session_log.status) for e in found if e.HasField("session_log")] == [(7, 1)]
    assert "tfevents" in first.name

    # A run that is killed and started again within a second must not overwrite the file of the first.
    again = MetricsLog(tmp_path / "m.jsonl", resume_step=8, tensorboard_dir=tmp_path / "events")
    assert len(list((tmp_path / "events").iterdir())) == 2 and events(first) == found
    again.close()
    log.close()
    log.close()


def test_tokens_may_be_counted_apart_from_examples():
    window = MetricWindow()
    for correct in (3.0, 4.0):
        sums = {"loss": 8.0, "correct": correct, "weights": 4.0, "tokens": 100.0, "skipped": 0.0}
        window.add(sums, {"step": 0.5})
    line = window.close()
    assert line["loss"] == 2.0 and line["accuracy"] == 7 / 8
    assert line["tokens"] == line["tokens_total"] == 200 and line["time/tokens_per_second"] == 200
    assert not {"nats_per_token", "perplexity"} & line.keys()
    assert summarise_sums({"correct": 3.0, "weights": 4.0, "tokens": 100.0}) == {"accuracy": 0.75}
