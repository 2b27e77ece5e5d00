"""The textbook convolution that FlashConv is measured against."""

import numpy as np
import pytest

from benchmarks.flashconv import textbook


@pytest.mark.parametrize("length,lags", [(1, 1), (7, 7), (8, 3)])
def test_both_directions_are_sums_over_lags(length, lags):
    random = np.random.default_rng(0)
    u, past, future = random.normal(size=(2, length, 3)), random.normal(size=(3, lags)), random.normal(size=(3, lags))
    expected = np.zeros_like(u)
    for i in range(length):
        for j in range(length):
            if 0 <= i - j < lags:
                expected[:, i] += past[:, i - j] * u[:, j]
            if 0 <= j - i - 1 < lags:
                expected[:, i] += future[:, j - i - 1] * u[:, j]
    found = textbook(u.astype(np.float32), past.astype(np.float32), anticausal_HL=future.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
