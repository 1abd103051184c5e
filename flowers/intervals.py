"""The interval of an accuracy, and interval and test of a difference, for evaluations, report and
page."""

# scipy is imported where it is needed, as training starts without: it takes a second.

import functools
import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # of a normal distribution, 2.5% lies above it


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval, in percent, of a proportion of n independent trials (Wilson 1927)."""
    from scipy.stats import binomtest

    # scipy's, not statsmodels' proportion_confint: the ends of 0 and n correct are exactly 0 and
    # 100, where statsmodels gives 99.99999999999999 for 1020 of 1020, less than the accuracy.
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def mcnemar_p(only_a: int, only_b: int) -> float:
    """The two-sided p-value of the exact test of McNemar (1947).

    only_a, only_b: how many images only one of two models has right. Images on which they agree do
    not enter the test. With none, 1.
    """
    from scipy.stats import binomtest

    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values (K,) corrected for their number by the step-down method of Holm (1979).

    Rejecting those below alpha makes one or more false rejections with probability alpha at most.
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    # Not statsmodels': it collects garbage at each call, which takes the page 0.1 s.
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return corrected


@functools.cache  # classes have few images, and so the same counts again and again
def paired_difference(only_a: float, only_b: float, n: float) -> tuple[float, float]:
    """The 95% interval, in points, of the difference of two accuracies on the same n images.

    only_a, only_b: how many images only one of two models has right; the difference is a's accuracy
    minus b's. Counts may be fractions, where images are weighted.

    The score interval of Tango (1998): the differences D that the score test of paired proportions
    does not reject. Its statistic, with q the likeliest probability that b alone is right if the
    difference is D (the root of a quadratic equation), is

        z(D) = (only_a - only_b - n D) / sqrt(n (2 q + D (1 - D))).

    For few images, where `study.statistics.difference_interval` holds the truth too rarely: of 8,
    over all pairs of probabilities, that one holds it in less than 93% for half of the pairs, this
    one for 1% (by the probabilities of all outcomes, as in tests/test_statistics.py).
    """
    from scipy.optimize import brentq

    def statistic(difference: float) -> float:
        b = (2 * n - only_a + only_b) * difference - only_a - only_b
        c = -only_b * difference * (1 - difference)
        q = (math.sqrt(max(b**2 - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        # At the estimate itself, and of two models that agree everywhere, it may be 0 / 0.
        excess = only_a - only_b - n * difference
        return excess / math.sqrt(variance) if variance > 0 else 0.0

    estimate = (only_a - only_b) / n
    end = 1 - 1e-12  # at -1 and 1 the variance is 0
    low = high = estimate
    if estimate > -end:
        low = brentq(lambda difference: statistic(difference) - Z, -end, estimate)
    if estimate < end:
        high = brentq(lambda difference: statistic(difference) + Z, estimate, end)
    return 100 * low, 100 * high
