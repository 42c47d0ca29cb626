"""Statistics against values derived by hand, from printed tables, or by simulation."""

import math
import random

import pytest

from canon.core.lab.statistics import (
    mean_interval,
    paired_bootstrap,
    paired_difference,
    paired_ratio,
    permutation_test,
    proportion_interval,
    sign_test,
    summarise,
    t_cdf,
    t_quantile,
)


def test_summary_by_hand():
    summary = summarise([2.0, 4.0, 9.0])  # deviations -3, -1, 4: variance 26 / 2
    assert summary.mean == 5
    assert summary.sd == pytest.approx(math.sqrt(13))
    assert summary.standard_error == pytest.approx(math.sqrt(13 / 3))
    assert str(summary) == "5 ± 3.6 (n = 3)"
    assert math.isnan(summarise([1.0]).sd)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


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


def test_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3), t = 4.3027
    interval = paired_difference([11, 22, 33], [10, 20, 30])
    assert interval.estimate == 2
    assert interval.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert interval.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert not interval.excludes(0)
    assert paired_difference([11, 22, 33], [10, 20, 30], confidence=0.9).excludes(0)
    with pytest.raises(ValueError, match="2 and 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="two values"):
        mean_interval([1.0])


def test_pairing_cancels_the_luck_that_seeds_share():
    seeds = [10.0, 50.0, 90.0]
    interval = paired_difference([seed + gain for seed, gain in zip(seeds, (1.0, 1.1, 0.9))], seeds)
    assert interval.low > 0.7


def test_intervals_cover_as_often_as_they_say():
    source = random.Random(0)
    hits = 0
    for _ in range(4000):
        a = [source.gauss(1, 1) for _ in range(4)]
        b = [source.gauss(0, 1) for _ in range(4)]
        hits += not paired_difference(a, b, confidence=0.9).excludes(1.0)
    assert hits / 4000 == pytest.approx(0.9, abs=0.02)


def test_ratio_is_geometric_and_inverts():
    interval = paired_ratio([2.0, 8.0], [1.0, 1.0])
    assert interval.estimate == pytest.approx(4)  # sqrt(2 * 8), not 5
    inverse = paired_ratio([1.0, 1.0], [2.0, 8.0])
    assert (inverse.low, inverse.high) == (pytest.approx(1 / interval.high), pytest.approx(1 / interval.low))
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0, 0.0], [1.0, 1.0])


def test_bootstrap_of_two_values_is_the_binomial_of_its_resamples():
    # differences 0 and 1: resampled means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    interval = paired_bootstrap([0.0, 1.0], [0.0, 0.0], confidence=0.6)
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.0, 1.0)
    middle = paired_bootstrap([0.0, 1.0], [0.0, 0.0], confidence=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_interval_for_many_pairs():
    source = random.Random(1)
    a = [source.gauss(0.3, 1) for _ in range(300)]
    bootstrap, student = paired_bootstrap(a, [0.0] * 300, resamples=3000), paired_difference(a, [0.0] * 300)
    assert bootstrap.low == pytest.approx(student.low, abs=0.02)
    assert bootstrap.high == pytest.approx(student.high, abs=0.02)


def test_sign_test_by_counting():
    assert sign_test([1, 1, 1, 1, 1], [0] * 5) == 2 / 32
    assert sign_test([1, 1, 1, 1, -1, 0], [0] * 6) == 2 * (1 + 5) / 32  # the tie is left out
    assert sign_test([1, -1], [0, 0]) == 1
    assert sign_test([0], [0]) == 1


def test_permutation_test_by_enumeration():
    assert permutation_test([1, 2, 3], [0, 0, 0]) == 2 / 8  # only +++ and ---
    assert permutation_test([1, 2, -3], [0, 0, 0]) == 1  # the observed sum is 0: nothing is nearer
    assert permutation_test([0.1, 0.2, 0.3, -0.1], [0.0] * 4) == 6 / 16  # 0.7 once, 0.5 twice, either sign
    assert permutation_test([0.0, 0.0], [0.0, 0.0]) == 1


def test_drawn_permutations_agree_with_all_of_them():
    source = random.Random(2)
    a = [source.gauss(0.5, 1) for _ in range(14)]
    exact = permutation_test(a, [0.0] * 14)
    drawn = permutation_test([*a, 0.0], [0.0] * 15, draws=8000)  # a pair without difference changes nothing
    assert drawn == pytest.approx(exact, abs=0.02)
    assert permutation_test([1.0] * 40, [0.0] * 40, draws=99) == 0.01  # never zero


def test_wilson_interval_by_hand():
    # z^2 = 3.841459 for 95 %; 8 of 10: centre (0.8 + 0.192073) / 1.384146
    interval = proportion_interval(8, 10)
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)
    none = proportion_interval(0, 10)
    assert none.low == pytest.approx(0, abs=1e-12)
    assert none.high == pytest.approx(3.841459 / (10 + 3.841459), abs=1e-5)
    with pytest.raises(ValueError, match="11 of 10"):
        proportion_interval(11, 10)
