"""Statistics against values derived by hand, from printed tables, or by simulation."""

import math
import random

import pytest

from canon.core.lab.statistics import mean_interval, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("df", "quantile"),  # 97.5 % points as printed in every textbook
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_t_quantiles_of_the_printed_table(df, quantile):
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=5e-4)
    assert t_quantile(0.025, df) == pytest.approx(-quantile, abs=5e-4)
    assert t_cdf(t_quantile(0.9, df), df) == pytest.approx(0.9)


def test_t_distribution_in_closed_form():
    for t in (-3.0, 0.0, 0.7, 5.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)  # Cauchy
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))
    with pytest.raises(ValueError, match="degrees of freedom"):
        t_cdf(1.0, 0)
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, 3)


def test_mean_interval_by_hand():
    # mean 2, sd 1, standard error 1/sqrt(3), t = 4.3027
    low, high = mean_interval([1, 2, 3])
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    with pytest.raises(ValueError, match="two values"):
        mean_interval([1.0])


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    covered = 0
    for _ in range(4000):
        low, high = mean_interval([draw.gauss(5, 2) for _ in range(3)], 0.8)
        covered += low <= 5 <= high
    assert covered / 4000 == pytest.approx(0.8, abs=0.02)
