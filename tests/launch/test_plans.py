"""What `launch.compile --search` and `launch.plans` ask the compiler, and what they make of its answers; no compiler is used."""

import json
import types

import pytest

from launch import compile as compile_lib
from launch import plans
from t5x_ssm import config as config_lib


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler: 8 devices, more rows give more tokens/s, 'full' fits 4 rows a shard and all others 1."""
    asked = []

    def answer(run, name, topology, slices, folder):
        rows, policy = run["train_dataset_cfg"].batch_size // 4, run["model"].network.remat_policy
        asked.append((policy, rows))
        if rows > compiler.fit[policy]:
            raise compile_lib.DoesNotFit(f"{policy} with {rows} rows")
        rate = rows * {"projections": 150, "full": 100}[policy]
        return {"hbm_free": 0.5, "predicted": {"tokens_per_second": {"in_turn": rate}}, "asked": (policy, rows)}

    compiler = types.SimpleNamespace(asked=asked, fit={"projections": 1, "full": 4})
    monkeypatch.setattr(compile_lib, "cached_plan", answer)
    monkeypatch.setattr(compile_lib.chips, "topology_devices", lambda topology, slices: [None] * 8)
    return compiler


def search(tmp_path):
    options = types.SimpleNamespace(topology="v5e:2x4", slices=1)
    # 8 devices with two-way split channels: 4 shards of the batch.
    arguments = config_lib.Arguments(("models/gss_1_3b.gin",), ("mesh.MeshConfig.model=2",), (), options)
    return compile_lib.search(arguments, "gss_1_3b", tmp_path)


def test_search_gives_the_fastest_that_fits_and_asks_for_nothing_larger_than_what_does_not(compiler, tmp_path, capsys):
    assert search(tmp_path)["asked"] == ("full", 4)
    assert compiler.asked == [("projections", 1), ("projections", 2), *(("full", rows) for rows in (1, 2, 4, 8))]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "2 rows a shard, rematerialization 'projections': does not fit"
    assert printed[4] == "4 rows a shard, rematerialization 'full': 50% of HBM free, 400 tokens/s if nothing overlaps"


def test_a_search_in_which_nothing_fits_is_refused(compiler, tmp_path):
    compiler.fit = {"projections": 0, "full": 0}
    with pytest.raises(compile_lib.DoesNotFit, match="full with 1 rows"):
        search(tmp_path)


def plan(name="gss_7b", topology="v5p:4x4x8", slices=1, devices=128, parameters=7_006_085_120, collectives=()):
    both = {"overlapped": 1.0, "in_turn": 2.0}
    return {
        "name": name,
        "program": "0123",
        "topology": topology,
        "slices": slices,
        "devices": devices,
        "parameters": parameters,
        "batch": 2 * devices,
        "length": 4096,
        "bytes": {"used": 20 * 2**30, "hbm": 95 * 2**30},
        "hbm_free": 0.79,
        "flops": {"program": 816e12, "program_times_passes": 843e12},
        "collectives": list(collectives),
        "predicted": {"seconds": both, "utilisation": {"overlapped": 0.8, "in_turn": 0.4}, "bound_by": "hbm"},
        "compile_seconds": 123.4,
    }


def test_tables_say_what_plans_say():
    collectives = [{"kind": "all-reduce", "bytes": 48_000_000_000}, {"kind": "all-gather", "bytes": 1_500_000_000}]
    rows = plans.table([plan(), plan("gss_1_3b", parameters=1_300_000_000, collectives=collectives)]).splitlines()
    assert len(rows) == 4
    assert rows[2] == (
        "| gss_1_3b | 1.30B | v5p:4x4x8 | 256 x 4096 | 20.0 of 95 GiB | 79% | 816 | 843 | 50 GB | hbm | 1.0 to 2.0 s "
        "| 40% to 80% | 123 s |"
    )
    # One that does not say of which program it is.
    earlier = {name: value for name, value in plan().items() if name != "program"}
    assert plans.table([earlier]).splitlines()[2].startswith("| gss_7b † | 7.01B |")
    two = plan(topology="v5p:4x4x4", slices=2, collectives=collectives)
    rows = plans.weak_table([plan(topology="v5p:8x8x8", devices=512), two]).splitlines()
    assert rows[2] == ("| gss_7b | 2 x v5p:4x4x4 | 128 | 8192 | 816.0 | 49.50 GB | 48.00 GB | 20.0 GiB | 123 s |")
    assert "| v5p:8x8x8 | 512 | 8192 |" in rows[3]


def test_what_is_predicted_under_half_of_the_peak_is_explained():
    seconds = {"compute": 1.0, "hbm": 0.7, "interconnect": 0.2, "network": 0.1, "overlapped": 1.0, "in_turn": 2.0}
    slow = plan() | {"predicted": {"seconds": seconds, "utilisation": {"overlapped": 0.8, "in_turn": 0.4}}}
    assert plans.bounds_table([slow]).splitlines()[2:] == [
        "| gss_7b | v5p:4x4x8 | 40% to 80% | 0.80 s | 0.20 s | 0.70 s | 0.20 s | 0.10 s | memory traffic |"
    ]
    # Half of the peak is enough.
    fast = plan() | {"predicted": {"seconds": seconds, "utilisation": {"overlapped": 1.0, "in_turn": 0.5}}}
    assert plans.bounds_table([fast]) == ""
    # 0.3 s of the model's arithmetic in steps of 1 s at best.
    never = {"compute": 0.4, "hbm": 1.0, "interconnect": 0.1, "network": 0.0, "overlapped": 1.0, "in_turn": 1.5}
    small = plan() | {"predicted": {"seconds": never, "utilisation": {"overlapped": 0.3, "in_turn": 0.2}}}
    (line,) = plans.bounds_table([small, fast]).splitlines()[2:]
    assert line.endswith("| 0.30 s | 0.10 s | 1.00 s | 0.10 s | 0.00 s | memory traffic, however well it overlaps |")


def test_weak_scaling_keeps_the_tokens_of_a_chip():
    questions = plans.weak_scaling("gss_7b")
    chips = [plans.math.prod(map(int, q.topology[4:].split("x"))) * q.slices for q in questions]
    assert {64, 4096} <= set(chips) and {q.slices for q in questions} == {1, 2, 4}
    for question, count in zip(questions, chips, strict=True):
        settings = dict(binding.split("=") for binding in question.bindings)
        assert int(settings["BATCH_SIZE"]) * 4096 / count == 8192
        assert int(settings["mesh.MeshConfig.data"]) == question.slices


def test_every_plan_asks_for_a_configuration_that_is_complete():
    for name in {question.name for question in plans.PLANS}:
        run = compile_lib.load(config_lib.Arguments((f"models/{name}.gin",), (), (), None))
        lengths = run["train_dataset_cfg"].task_feature_lengths
        assert run["train_dataset_cfg"].batch_size * max(lengths.values()) >= 2**21
        assert max(lengths.values()) >= 4096


def test_tables_are_put_between_their_comments(tmp_path, monkeypatch):
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(plan()))
    marks = ("<!-- {}: written by launch.plans -->\n", "<!-- end of {} -->\n")
    document = tmp_path / "scaling.md"
    document.write_text("Before.\n{}old\n{}After.\n".format(*(mark.format("plans") for mark in marks)))
    monkeypatch.setattr(plans, "TABLES", (("plans", folder, plans.table),))
    plans.write_tables(document)
    plans.write_tables(document)
    lines = document.read_text().splitlines()
    assert lines[0] == "Before." and lines[-1] == "After." and "old" not in lines
    assert [line for line in lines if line.startswith("| gss_7b")] == [plans.table([plan()]).splitlines()[2]]
