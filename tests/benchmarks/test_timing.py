from benchmarks import timing


def test_runs_take_turns_after_a_round_that_is_not_counted():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    values = timing.in_turns(runs, 2, measure=lambda run: (run(), len(calls))[1])
    assert calls == ["a", "b"] * 3
    assert values == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_of_the_same_turn():
    assert timing.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 4.0, "repeats": 3}
