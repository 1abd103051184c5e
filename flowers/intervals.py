"""The interval of an accuracy, which evaluations and the report share."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval, in percent, of a proportion of n independent trials (Wilson 1927)."""
    from scipy.stats import binomtest  # here, as training starts without: it takes a second

    # scipy's, not statsmodels' proportion_confint: the ends of 0 and n correct are exactly 0 and
    # 100, where statsmodels gives 99.99999999999999 for 1020 of 1020, less than the accuracy.
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high
