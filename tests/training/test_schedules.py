import math

import numpy as np
import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.training import schedules


def points(schedule, ordinals):
    """The rates of the n-th updates, n from 1."""
    return np.array([schedule(n - 1) for n in ordinals])


def test_warmup_cosine():
    rates = points(schedules.warmup_cosine(2.0, 4, 12, 0.1), [1, 2, 4, 6, 8, 10, 12, 50])
    quarter, three_quarters = (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.75))
    np.testing.assert_allclose(rates, [0.5, 1.0, 2.0, 2 * quarter, 1.1, 2 * three_quarters, 0.2, 0.2], rtol=1e-6)


def test_rsqrt():
    np.testing.assert_allclose(points(schedules.rsqrt(0.5, 4), [1, 4, 16, 64]), [0.125, 0.5, 0.25, 0.125], rtol=1e-6)


def test_rsqrt_is_the_schedule_of_t5_after_the_warmup():
    n = np.array([100, 101, 1000, 524288])
    np.testing.assert_allclose(points(schedules.rsqrt(100**-0.5, 100), n), 1 / np.sqrt(n), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "middle", "late"),
    [("linear", 0.5, 0.25), ("sqrt", 1 - 0.5**0.5, 1 - 0.75**0.5), ("cosine", 0.5, (1 + math.cos(0.75 * math.pi)) / 2)],
)
def test_wsd(shape, middle, late):
    schedule = schedules.wsd(1.0, warmup_steps=2, total_steps=12, decay_steps=4, final_fraction=0.2, decay_shape=shape)
    rates = points(schedule, [1, 2, 5, 8, 10, 11, 12, 13])
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.2 + 0.8 * middle, 0.2 + 0.8 * late, 0.2, 0.2], rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(points(schedules.constant(0.3), [1, 2, 1000]), [0.3, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(points(schedules.constant(0.3, 3), [1, 3, 4]), [0.1, 0.3, 0.3], rtol=1e-6)


def test_phases_that_fill_the_whole_run():
    np.testing.assert_allclose(points(schedules.warmup_cosine(1.0, 4, 4, 0.0), [1, 4]), [0.25, 1.0], rtol=1e-6)
    np.testing.assert_allclose(points(schedules.wsd(1.0, 0, 2, 2), [1, 2]), [0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: schedules.warmup_cosine(1.0, 11, 10), "warmup_steps=11"),
        (lambda: schedules.warmup_cosine(1.0, -1, 10), "warmup_steps"),
        (lambda: schedules.warmup_cosine(1.0, 1, 0), "total_steps"),
        (lambda: schedules.warmup_cosine(1.0, 2.5, 10), "warmup_steps"),
        (lambda: schedules.warmup_cosine(-1.0, 1, 10), "peak"),
        (lambda: schedules.warmup_cosine(math.nan, 1, 10), "peak"),
        (lambda: schedules.warmup_cosine(1.0, 1, 10, final_fraction=1.5), "final_fraction"),
        (lambda: schedules.rsqrt(1.0, 0), "warmup_steps"),
        (lambda: schedules.wsd(1.0, 5, 10, 6), "decay_steps=6"),
        (lambda: schedules.wsd(1.0, 5, 10, -1), "decay_steps"),
        (lambda: schedules.wsd(1.0, 1, 10, 2, decay_shape="exponential"), "decay_shape"),
        (lambda: schedules.constant(math.inf), "value"),
    ],
)
def test_nonsense_is_refused_by_name(make, setting):
    with pytest.raises(UserError, match=setting):
        make()
