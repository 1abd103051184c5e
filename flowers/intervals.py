"""The interval of an accuracy and the test of a difference, for evaluations, report and page."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval, in percent, of a proportion of n independent trials (Wilson 1927)."""
    from scipy.stats import binomtest  # here, as training starts without: it takes a second

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
