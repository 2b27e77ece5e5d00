import json

import jax
import numpy as np
import pytest

from t5x_ssm.training.goodput import Goodput, device_figures
from t5x_ssm.training.metrics import MetricsLog, history


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def spend(goodput, clock, step, *, data=1.0, stepping=4.0, checkpoint=0.0):
    goodput.stepping(step)
    with goodput.spent_on("data"):
        clock.now += data
    clock.now += stepping
    with goodput.spent_on("checkpoint"):
        clock.now += checkpoint


def seconds(goodput):
    fields = goodput.summary()
    return {name.split("/")[-1].removesuffix("_seconds"): value for name, value in fields.items() if value}


def test_every_second_has_one_cause_over_all_starts(tmp_path):
    clock = Clock()
    first = Goodput(tmp_path, clock=clock)
    clock.now += 10
    spend(first, clock, 1)
    spend(first, clock, 2, checkpoint=2)
    first.keep(2)
    clock.now += 7  # Not written down before the end: killed.

    clock.now += 20
    second = Goodput(tmp_path, clock=clock)
    clock.now += 3
    spend(second, clock, 2)  # The checkpoint was that of step 1.
    spend(second, clock, 3)
    found = seconds(second)
    goodput = found.pop("goodput")
    assert found == {
        "startup": 13, "data": 4, "steps": 12, "repeated": 4, "checkpoint": 2, "down": 27, "total": 62
    }  # fmt: skip
    assert goodput == pytest.approx(12 / 62)
    assert "19.4% in new steps; repeated 6.5%" in second.text()
    assert json.loads((tmp_path / "goodput.json").read_text())["step"] == 2


def test_compilation_is_counted_once_where_spans_nest():
    clock = Clock()
    goodput = Goodput(None, clock=clock)
    with goodput:
        clock.now += 1
        clock.now += 2
        jax.monitoring.record_event_duration_secs("/jax/core/compile/inner", 2.0)
        clock.now += 3
        jax.monitoring.record_event_duration_secs("/jax/core/compile/outer", 5.5)
        jax.monitoring.record_event_duration_secs("/jax/another/event", 1.0)
        goodput.stepping(1)
        clock.now += 4
    jax.monitoring.record_event_duration_secs("/jax/core/compile/after", 4.0)
    assert seconds(goodput) == {"startup": 0.5, "compilation": 5.5, "steps": 4, "total": 10, "goodput": 0.4}


def test_a_broken_file_costs_the_sums_and_not_the_run(tmp_path):
    (tmp_path / "goodput.json").write_text("{")
    assert seconds(Goodput(tmp_path)).get("down") is None


def test_a_line_of_timings_alone_is_a_timing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, {"loss": 1.0, "time/step_seconds": 2.0})
    log.write(3, {"time/run/goodput": 0.5}, split="goodput")
    log.close()
    assert history(tmp_path / "metrics.jsonl", timings=False) == [{"step": 3, "split": "train", "loss": 1.0}]
    assert len(history(tmp_path / "metrics.jsonl")) == 2


def test_device_figures():
    line = {"time/tokens_per_second": 8000.0, "time/step_seconds": 2.0, "time/data_seconds": 0.5}
    known = device_figures(line, devices=4, flops_per_token=6e9, peak_flops=100e12)
    assert known["time/tokens_per_second_per_device"] == 2000
    np.testing.assert_allclose(known["time/model_flops_utilization"], 2000 * 6e9 / 100e12)
    assert known["time/data_share"] == 0.25
    unknown = device_figures(line, devices=4, flops_per_token=6e9, peak_flops=None)
    assert unknown.keys() == known.keys() - {"time/model_flops_utilization"}
