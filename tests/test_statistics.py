"""Each statistic against a published worked example or an independent computation."""

import itertools
import math

import numpy as np
import pytest

from flowers.evaluate import wilson
from flowers.study import statistics


def test_t_interval_of_a_textbook_sample():
    """Student's sleep data, differences of the ten patients: R's t.test gives 1.58 [0.70, 2.46]."""
    assert statistics.t_interval(
        [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    ) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)
    mean, low, high = statistics.t_interval([3.0])
    assert mean == 3 and math.isnan(low) and math.isnan(high)


def test_wilson_of_newcombe_1998():
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3."""
    for k, n, low, high in (
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ):
        assert wilson(k, n) == pytest.approx((low, high), abs=0.005)


def test_mcnemar_of_a_published_table():
    """R's exact2x2: b = 9, c = 2 gives p = 0.06543; and the sum of binomial terms."""
    a = np.array([True] * 21 + [True] * 9 + [False] * 2 + [False] * 12)
    b = np.array([True] * 21 + [False] * 9 + [True] * 2 + [False] * 12)
    assert statistics.mcnemar(a, b) == (9, 2, pytest.approx(0.06543, abs=5e-6))
    assert statistics.mcnemar(b, a)[:2] == (2, 9)
    assert statistics.mcnemar(a, a) == (0, 0, 1.0)
    for only_a, only_b in ((1, 8), (5, 5), (0, 6)):
        x = np.array([True] * only_a + [False] * only_b)
        tail = sum(math.comb(only_a + only_b, k) for k in range(min(only_a, only_b) + 1)) / 2 ** (
            only_a + only_b
        )
        assert statistics.mcnemar(x, ~x)[2] == pytest.approx(min(1, 2 * tail))


def test_holm_of_worked_examples():
    """R: p.adjust(p, "holm")."""
    assert statistics.holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert statistics.holm([0.04, 0.001, 0.5, 0.01]) == pytest.approx([0.08, 0.004, 0.5, 0.03])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1]) and len(statistics.holm([])) == 0


def test_overlap_by_enumeration():
    population, a = range(9), {0, 1, 2, 3}
    draws = [len(a & set(b)) for b in itertools.combinations(population, 3)]
    for b in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        both, expected, p = statistics.overlap(list(a), b, 9)
        assert both == len(a & set(b)) and expected == pytest.approx(np.mean(draws))
        assert p == pytest.approx(np.mean([d >= both for d in draws]))


TOOTH_GROWTH = np.array(
    [  # Crampton 1947: supplement (VC, OJ) x dose (0.5, 1, 2 mg) x ten guinea pigs; R's data set ToothGrowth
        [
            [4.2, 11.5, 7.3, 5.8, 6.4, 10, 11.2, 11.2, 5.2, 7],
            [16.5, 16.5, 15.2, 17.3, 22.5, 17.3, 13.6, 14.5, 18.8, 15.5],
            [23.6, 18.5, 33.9, 25.5, 26.4, 32.5, 26.7, 21.5, 23.3, 29.5],
        ],
        [
            [15.2, 21.5, 17.6, 9.7, 14.5, 10, 8.2, 9.4, 16.5, 9.7],
            [19.7, 23.3, 23.6, 26.4, 20, 25.2, 25.8, 21.2, 14.5, 27.3],
            [25.5, 26.4, 22.4, 24.5, 24.8, 30.9, 26.4, 27.3, 29.4, 23],
        ],
    ]
)


def test_variance_shares_of_a_textbook_two_way_anova():
    """R: aov(len ~ supp * factor(dose)) has the sums of squares 205.4, 2426.4, 108.3 and 712.1."""
    shares = statistics.variance_shares(TOOTH_GROWTH, ["supplement", "dose"])
    squares = {k: v * ((TOOTH_GROWTH - TOOTH_GROWTH.mean()) ** 2).sum() for k, v in shares.items()}
    assert squares == pytest.approx(
        {"supplement": 205.35, "dose": 2426.434, "interaction": 108.319, "seeds": 712.106}, abs=1e-3
    )


def test_variance_shares_of_three_factors_equal_least_squares():
    """Each share from the drop in residual of a nested dummy regression, which for a balanced design is the same in any order."""
    y = (
        np.random.default_rng(0).normal(size=(2, 3, 2, 4))
        + np.arange(3)[:, None, None] * np.arange(2)[None, :, None]
    )
    index = np.indices(y.shape).reshape(4, -1)

    def rss(groups):
        design = np.hstack(
            [
                np.eye(math.prod(y.shape[i] for i in g))[
                    np.ravel_multi_index(index[list(g)], [y.shape[i] for i in g])
                ]
                for g in groups
            ]
        )
        return ((y.ravel() - design @ np.linalg.lstsq(design, y.ravel(), rcond=None)[0]) ** 2).sum()

    total = ((y - y.mean()) ** 2).sum()
    want = {
        "a": total - rss([(0,)]),
        "b": total - rss([(1,)]),
        "c": total - rss([(2,)]),
        "interaction": rss([(0,), (1,), (2,)]) - rss([(0, 1, 2)]),
        "seeds": rss([(0, 1, 2)]),
    }
    assert statistics.variance_shares(y, ["a", "b", "c"]) == pytest.approx(
        {k: v / total for k, v in want.items()}
    )


def test_shapley_of_the_glove_game():
    """One left glove, two right ones, a pair is worth 1: 2/3, 1/6, 1/6 (Shapley and Shubik's example)."""
    value = lambda s: float("left" in s and len(s) > 1)
    assert statistics.shapley(["left", "right", "other"], value) == pytest.approx(
        {"left": 2 / 3, "right": 1 / 6, "other": 1 / 6}
    )


def test_gains_of_a_hand_made_table():
    """strategy (none, tuned) x learning rate (low, high): nothing by the rate alone, 10 by tuning alone, 30 together."""
    table = np.array([[50.0, 50.0], [60.0, 80.0]])
    got = statistics.gains(table, table, ["strategy", "rate"], [0, 0])
    assert got == pytest.approx(
        {
            "strategy": (10 + 30) / 2,
            "rate": (0 + 20) / 2,
            "alone strategy": 10,
            "alone rate": 0,
            "interaction": 20,
            "total": 30,
        }
    )
    choose = np.array([[50.0, 50.0], [60.0, 40.0]])  # other images would have chosen the low rate
    assert (
        statistics.chosen_value(choose, table, [0, 0], [0, 1]) == 60
        and statistics.chosen_value(table, choose, [0, 0], [0, 1]) == 40
    )


def test_decompose_recovers_what_was_put_in():
    """Accuracies built from known effects: tuning adds 40 points, one architecture 10 more, the rate nothing."""
    rng = np.random.default_rng(1)
    p = np.full((3, 2, 2), 0.2)
    p[1:] = 0.6
    p[:, 1] += 0.1
    correct = rng.random((3, 2, 2, 3, 4000)) < p[..., None, None]
    correct[0] = correct[0, :, :1, :1]  # the untrained model is one model
    got = statistics.decompose(correct, ["strategy", "architecture", "rate"], [0, 0, 0], rounds=200)
    for name, truth in {
        "strategy": 40,
        "architecture": 10,
        "rate": 0,
        "total": 50,
        "alone strategy": 40,
    }.items():
        value, low, high = got["gain"][name]
        assert low - 0.5 <= truth <= high + 0.5 and abs(value - truth) < 2.5 and high - low < 6, (
            name,
            got["gain"][name],
        )
    assert got["share"]["strategy"][0] == pytest.approx(0.8, abs=0.04) and sum(
        v[0] for v in got["share"].values()
    ) == pytest.approx(1)
    assert got["variance"]["architecture"][0] > 0.8 and sum(
        v[0] for v in got["variance"].values()
    ) == pytest.approx(1)
    again = statistics.decompose(
        correct, ["strategy", "architecture", "rate"], [0, 0, 0], rounds=200
    )
    assert again == got


def test_decompose_without_any_difference_has_no_share():
    got = statistics.decompose(
        np.ones((2, 2, 2, 2, 50), bool), ["strategy", "architecture", "rate"], [0, 0, 0], rounds=5
    )
    assert got["gain"]["total"][0] == 0 and all(math.isnan(v[0]) for v in got["share"].values())
