"""Statistics for a handful of seeds.

What is compared runs on the same seeds, with the same data order and initialisation, and a claim measures the
difference seed by seed: their common luck cancels, and the interval below is Student's paired one (Student, 1908).
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev


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


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean: ``mean ± t_{(1+c)/2, n-1} sd / sqrt(n)``, as (low, high).

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    mean = fmean(values)
    reach = t_quantile((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach
