import argparse

import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.parallel.processes import Place, add_flags, place


def placed(*flags, **environment):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return place(parser.parse_args(flags), environment)


FLAGS = ("--coordinator=host:1234", "--num_processes=4", "--process_id=3")
ENVIRONMENT = {"JAX_COORDINATOR_ADDRESS": "other:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


def test_flags_then_environment():
    assert placed(*FLAGS) == placed(*FLAGS, **ENVIRONMENT) == Place("host:1234", 4, 3)
    assert placed(**ENVIRONMENT) == Place("other:99", 2, 0)
    assert placed("--process_id=1", **ENVIRONMENT) == Place("other:99", 2, 1)


def test_one_process_is_none():
    assert placed() is None
    assert placed("--num_processes=1") is None
    assert placed("--num_processes=1", **ENVIRONMENT) is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (FLAGS[:2], "--process_id must"),
        (FLAGS[1:], "--coordinator must"),
        (FLAGS[::2], "--num_processes must"),
        (("--coordinator=h:1", "--num_processes=2", "--process_id=2"), "--process_id=2"),
        (("--coordinator=h:1", "--num_processes=0", "--process_id=0"), "--num_processes=0"),
        (("--coordinator=host", "--num_processes=2", "--process_id=0"), "--coordinator=host"),
    ],
)
def test_half_a_place_is_refused(flags, named):
    with pytest.raises(UserError, match=named):
        placed(*flags)


def test_a_word_in_the_environment_is_refused():
    with pytest.raises(UserError, match="--process_id is 'first'"):
        placed(**ENVIRONMENT | {"JAX_PROCESS_ID": "first"})
