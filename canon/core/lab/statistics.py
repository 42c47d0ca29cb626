"""Statistics for a handful of seeds: two methods run on the same seeds, compared seed by seed.

Pairing matters because seeds share data order and initialisation: their common luck cancels in the difference
``d_i = a_i - b_i``, whose spread is what counts. Standard library only; every formula names its source.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import NormalDist, fmean, stdev

EXACT_PAIRS = 14  # up to 2**14 sign patterns are enumerated; beyond, they are drawn


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (dividing by n - 1; nan for n = 1) of ``n`` values."""

    mean: float
    sd: float
    n: int

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, ``sd / sqrt(n)``."""
        return self.sd / math.sqrt(self.n)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.n == 1 else f"{self.mean:.4g} ± {self.sd:.2g} (n = {self.n})"


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside the interval: the difference from it is significant at this confidence."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and number of values.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to summarise")
    return Summary(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for whole degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, with ``theta = atan(t / sqrt(df))``.

    Raises:
        ValueError: ``df`` is below 1.
    """
    if df < 1:
        raise ValueError(f"degrees of freedom start at 1, not {df}")
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    if df % 2:  # A = 2/pi (theta + sin cos (1 + 2/3 cos^2 + (2 4)/(3 5) cos^4 + ...)), up to cos^(df-3)
        term, total = cosine, 0.0
        for power in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = 2 / math.pi * (theta + sine * total)
    else:  # A = sin (1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...), up to cos^(df-2)
        term, total = 1.0, 0.0
        for power in range(0, df - 1, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = sine * total
    return (1 + inside) / 2


@cache
def t_quantile(probability: float, df: int) -> float:
    """The ``t`` below which Student's distribution has the given probability, by bisection of :func:`t_cdf`.

    Raises:
        ValueError: the probability is not inside (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"a probability lies between 0 and 1, not {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    high = 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of a mean: ``mean ± t_{(1+c)/2, n-1} sd / sqrt(n)``.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    summary = summarise(values)
    reach = t_quantile((1 + confidence) / 2, summary.n - 1) * summary.standard_error
    return Interval(summary.mean, summary.mean - reach, summary.mean + reach, confidence)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of ``a_i - b_i`` with Student's paired interval (Student, 1908).

    Raises:
        ValueError: the lengths differ, or there are fewer than two pairs.
    """
    return mean_interval(_differences(a, b), confidence)


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Geometric mean of ``a_i / b_i`` with the interval ``exp`` of Student's interval of the mean log ratio.

    The right average for speed-ups: inverting every ratio inverts the result (Fleming and Wallace, 1986).

    Raises:
        ValueError: a value is not positive, the lengths differ, or there are fewer than two pairs.
    """
    if min(*a, *b) <= 0:
        raise ValueError("ratios are of positive numbers")
    logs = mean_interval(_differences([math.log(value) for value in a], [math.log(value) for value in b]), confidence)
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high), confidence)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``a_i - b_i`` with the percentile bootstrap interval: pairs are drawn with replacement.

    For many pairs, such as test items (Efron and Tibshirani, 1993, chapter 13; Koehn, 2004). With three seeds it has
    27 equally likely outcomes and is far too narrow: use :func:`paired_difference` there.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    differences = _differences(a, b)
    source = random.Random(seed)
    means = sorted(fmean(source.choices(differences, k=len(differences))) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return Interval(fmean(differences), _percentile(means, tail), _percentile(means, 1 - tail), confidence)


def sign_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the sign test, of ``a_i > b_i`` being as frequent as ``a_i < b_i``.

    ``min(1, 2 P(Binomial(n, 1/2) <= min(wins, losses)))`` over the ``n`` pairs that are not ties
    (Dixon and Mood, 1946). Five pairs cannot go below 0.0625.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    differences = _differences(a, b)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def permutation_test(a: Sequence[float], b: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test, of the differences having their signs by chance.

    The share of sign patterns whose mean is at least as far from zero as the observed one (Fisher, 1935). All
    ``2**n`` patterns for up to 14 pairs; beyond, ``(1 + hits) / (1 + draws)`` over drawn ones, which is never zero
    (Phipson and Smyth, 2010).

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    differences = _differences(a, b)
    observed = abs(math.fsum(differences))
    least = observed - 1e-12 * math.fsum(map(abs, differences))  # equal sums may differ in the last bit
    if len(differences) <= EXACT_PAIRS:
        patterns = product((1, -1), repeat=len(differences))
        hits = sum(abs(math.fsum(s * d for s, d in zip(signs, differences))) >= least for signs in patterns)
        return hits / 2 ** len(differences)
    source = random.Random(seed)
    hits = sum(abs(math.fsum(source.choice((1, -1)) * d for d in differences)) >= least for _ in range(draws))
    return (1 + hits) / (1 + draws)


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson, 1927); sound also near 0 and 1, where most others are not.

    Raises:
        ValueError: not ``0 <= successes <= trials`` with at least one trial.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is not a proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach), confidence)


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b) or not a:
        raise ValueError(f"pairs need as many values on both sides, not {len(a)} and {len(b)}")
    return [x - y for x, y in zip(a, b)]


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics (definition 7 of Hyndman and Fan, 1996)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
