"""Each statistic against a published worked example or an independent computation."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
from conftest import ROOT
from scipy import optimize, special, stats

from flowers.evaluate import wilson
from flowers.intervals import holm, paired_difference
from flowers.study import statistics

# Crampton 1947, R's data set ToothGrowth: supplement (VC, OJ) x dose (0.5, 1, 2 mg) x ten
# guinea pigs.
TOOTH_GROWTH = np.array(
    [
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
FACTORS = ["strategy", "architecture", "rate"]


def sum_of_squares(values):
    return ((values - values.mean()) ** 2).sum()


# -----------------------------------------------------------------------------
# intervals and tests


def test_the_interval_of_one_seed_is_wilson_s():
    for right, n in ((81, 263), (0, 20), (20, 20), (1, 29)):
        correct = np.arange(n)[None] < right
        expected = (100 * right / n, *wilson(right, n))
        assert statistics.mean_interval(correct) == pytest.approx(expected)


def test_variances_are_those_of_an_analysis_of_variance():
    """Mean squares of the table seeds x images, by summing over its cells."""
    rng = np.random.default_rng(0)
    correct = rng.random((3, 40)) < rng.random(40)
    n, images = correct.shape
    of_seed, of_image, mean = correct.mean(1), correct.mean(0), correct.mean()
    residual = sum(
        (correct[s, i] - of_seed[s] - of_image[i] + mean) ** 2
        for s in range(n)
        for i in range(images)
    ) / (n - 1)
    seeds = sum((of_seed - mean) ** 2) / (n - 1)
    of_images, of_seeds = statistics._variances(correct, np.arange(images))
    assert of_images == pytest.approx(sum((of_image - mean) ** 2) / images**2)
    assert of_seeds == pytest.approx(max(0, seeds - residual / images**2 / 2))


def test_seeds_that_agree_have_the_interval_of_their_images():
    """Two seeds of 12.1% had Student's interval [12.1, 12.1]."""
    correct = np.tile(np.arange(240) < 29, (2, 1))
    assert statistics.mean_interval(correct) == pytest.approx((29 / 2.4, *wilson(29, 240)))


def test_the_interval_of_two_seeds_grows_smoothly_with_what_they_differ_by():
    """600 of 1,000 images right against 642 gave a half-width of 5 points, against 643 24."""
    image = np.arange(1000)
    widths = []
    for right in range(601, 660):
        _, low, high = statistics.mean_interval(np.stack([image < 600, image < right]))
        widths.append(high - low)
    steps = np.diff(widths)
    assert (steps >= 0).all()
    assert steps.max() < 0.5
    assert widths[-1] > 2 * widths[0]


def test_the_spread_of_seeds_is_moderated_as_in_smyth_2004():
    """Three seeds of 50, 50 and 59%, by hand; all images are one draw, and so without chance."""
    correct = np.arange(100) < np.array([[50], [50], [59]])
    clusters = np.arange(100) // 100
    p = 0.53
    s0_squared = 0.01**2 * p * (1 - p) / 0.25
    s_squared = np.var([0.5, 0.5, 0.59], ddof=1)
    moderated = (1 * s0_squared + 2 * s_squared) / (1 + 2)
    t = 3.182446  # of a printed table: 3 degrees of freedom
    half_width = statistics._seed_half_width(correct, clusters)
    assert half_width == pytest.approx(t * math.sqrt(moderated / 3), rel=1e-6)

    # A difference has that of each of its models.
    _, low, high = statistics.difference_interval(correct, correct[:1], clusters)
    assert (high - low) / 200 == pytest.approx(math.hypot(half_width, 1.959964 / 100), rel=1e-6)


def test_intervals_do_not_depend_on_the_order_and_a_cluster_is_one_draw():
    rng = np.random.default_rng(0)
    correct = rng.random((3, 300)) < rng.random(300)
    once = statistics.mean_interval(correct)
    twice = np.repeat(correct, 2, axis=1)
    clusters = np.repeat(np.arange(300), 2)
    order = rng.permutation(600)
    assert statistics.mean_interval(twice[:, order], clusters[order]) == pytest.approx(once)

    a, b = correct, rng.random((2, 300)) < 0.5
    difference, low, high = statistics.difference_interval(a, b)
    assert difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert statistics.difference_interval(b, a) == pytest.approx((-difference, -high, -low))


def test_equal_models_do_not_differ_and_have_an_interval():
    correct = np.tile(np.arange(200) < 150, (2, 1))
    difference, low, high = statistics.difference_interval(correct, correct)
    assert difference == 0
    assert -2 < low < -0.5
    assert 0.5 < high < 2
    right = np.ones((2, 200), bool)
    assert statistics.difference_interval(right, ~right)[::2] == (100.0, 100.0)


def test_95_percent_of_the_intervals_hold_the_truth():
    """Three seeds that differ by two points; the naive bootstrap holds it nine times in ten."""
    coverage = load_coverage()
    setting = coverage.Setting(0.6, 3, 2000, 0.02, 0.8)
    study, student, naive, *_ = coverage.coverage(setting, 400, 0)
    assert 0.925 <= study <= 0.985  # three standard errors of 400 repetitions around 95.5%
    assert naive < 0.9
    assert student > 0.85

    of_difference = coverage.coverage_of_difference(setting, 200, 0)
    assert 0.92 <= of_difference <= 0.995


def load_coverage():
    """benchmarks/coverage.py as a module: the folder is no package."""
    spec = importlib.util.spec_from_file_location("coverage_of", ROOT / "benchmarks/coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wilson_of_newcombe_1998():
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3."""
    for correct, n, low, high in (
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ):
        assert wilson(correct, n) == pytest.approx((low, high), abs=0.005)


def test_mcnemar_of_a_published_table():
    """R's exact2x2: b = 9, c = 2 gives p = 0.06543; and the sum of binomial terms."""
    a = np.array([True] * 21 + [True] * 9 + [False] * 2 + [False] * 12)
    b = np.array([True] * 21 + [False] * 9 + [True] * 2 + [False] * 12)
    assert statistics.mcnemar(a, b) == (9, 2, pytest.approx(0.06543, abs=5e-6))
    assert statistics.mcnemar(b, a)[:2] == (2, 9)
    assert statistics.mcnemar(a, a) == (0, 0, 1.0)

    for only_a, only_b in ((1, 8), (5, 5), (0, 6)):
        a = np.array([True] * only_a + [False] * only_b)
        n = only_a + only_b
        fewer = min(only_a, only_b)
        tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
        assert statistics.mcnemar(a, ~a)[2] == pytest.approx(min(1, 2 * tail))


def test_holm_of_worked_examples():
    """R: p.adjust(p, "holm")."""
    for p_values, corrected in (
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
        ([0.04, 0.001, 0.5, 0.01], [0.08, 0.004, 0.5, 0.03]),
        ([0.9, 0.8], [1, 1]),
    ):
        assert holm(p_values) == pytest.approx(corrected)
    assert len(holm([])) == 0


def constrained_statistic(only_a, only_b, n, difference):
    """The score statistic of a difference, its nuisance parameter found by a numeric search.

    The likelihood of (only a right, only b right, neither alone) is greatest at that parameter, the
    probability that b alone is right, if that of a is it and the difference.
    """
    rest = n - only_a - only_b

    def loss(q):
        p = np.array([q + difference, q, 1 - 2 * q - difference])
        return -special.xlogy([only_a, only_b, rest], np.maximum(p, 1e-300)).sum()

    ends = max(0.0, -difference), (1 - difference) / 2
    q = optimize.minimize_scalar(loss, method="bounded", bounds=ends, options={"xatol": 1e-9})
    variance = n * (2 * q.x + difference - difference**2)
    return (only_a - only_b - n * difference) / math.sqrt(variance)


@pytest.mark.parametrize(
    "only_a, only_b, n", [(4, 0, 8), (3, 2, 8), (0, 7, 8), (1, 0, 1), (9, 20, 60), (1.5, 0.5, 3.5)]
)
def test_ends_of_a_paired_difference_are_those_that_the_score_test_just_rejects(only_a, only_b, n):
    low, high = (end / 100 for end in paired_difference(only_a, only_b, n))
    assert low < (only_a - only_b) / n < high or high == 1 or low == -1
    if low > -1:
        statistic = constrained_statistic(only_a, only_b, n, low)
        assert statistic == pytest.approx(statistics.Z, abs=2e-4)
    if high < 1:
        statistic = constrained_statistic(only_a, only_b, n, high)
        assert statistic == pytest.approx(-statistics.Z, abs=2e-4)


def test_paired_difference_of_extremes():
    # By hand: with no image that only one has right, z(D)^2 = n D / (1 - D) for D > 0.
    end = 100 * statistics.Z**2 / (8 + statistics.Z**2)
    assert paired_difference(0, 0, 8) == pytest.approx((-end, end))
    assert paired_difference(8, 0, 8)[1] == 100
    low, high = paired_difference(3, 1, 8)
    assert paired_difference(1, 3, 8) == pytest.approx((-high, -low))
    # Of many images it is the interval of the study, near enough.
    a = np.arange(1000) < 600
    b = (np.arange(1000) >= 60) & (np.arange(1000) < 630)
    _, *wald = statistics.difference_interval(a[None], b[None])
    assert paired_difference(60, 30, 1000) == pytest.approx(wald, abs=0.1)


@pytest.mark.parametrize("n", [3, 8])
def test_paired_difference_of_few_images_holds_the_truth(n):
    """By the probabilities of all outcomes, not by drawing some; over many truths."""
    outcomes = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]
    counts = np.array([(a, b, n - a - b) for a, b in outcomes])
    score = np.array([paired_difference(a, b, n) for a, b in outcomes])
    wald = []
    for a, b in outcomes:
        one = np.arange(n) < a
        other = (np.arange(n) >= a) & (np.arange(n) < a + b)
        wald.append(statistics.difference_interval(one[None], other[None])[1:])

    held = {"score": [], "wald": []}
    grid = np.linspace(0, 1, 21)
    for p_a, p_b in itertools.product(grid, grid):
        if p_a + p_b > 1:
            continue
        probabilities = stats.multinomial.pmf(counts, n, [p_a, p_b, max(1 - p_a - p_b, 0)])
        truth = 100 * (p_a - p_b)
        for name, (low, high) in (("score", score.T), ("wald", np.transpose(wald))):
            inside = (low <= truth + 1e-9) & (truth <= high + 1e-9)
            held[name].append(probabilities[inside].sum())
    assert 0.95 < np.mean(held["score"]) < 0.98
    assert min(held["score"]) > 0.85
    # Why the interval of the study is not taken: too often it holds the truth too rarely.
    rarely = {name: np.mean(np.array(values) < 0.93) for name, values in held.items()}
    assert rarely["score"] < 0.05
    assert rarely["wald"] > 0.25


def test_overlap_by_enumeration():
    a = {0, 1, 2, 3}
    draws = [len(a & set(b)) for b in itertools.combinations(range(9), 3)]
    for b in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        both, expected, p_value = statistics.overlap(list(a), b, 9)
        assert both == len(a & set(b))
        assert expected == pytest.approx(np.mean(draws))
        assert p_value == pytest.approx(np.mean([draw >= both for draw in draws]))


# -----------------------------------------------------------------------------
# the division of the variance


def test_variance_shares_of_a_textbook_two_way_anova():
    """R: aov(len ~ supp * factor(dose)) has the sums of squares 205.4, 2426.4, 108.3 and 712.1."""
    shares = statistics.variance_shares(TOOTH_GROWTH, ["supplement", "dose"])
    total = sum_of_squares(TOOTH_GROWTH)
    squares = {name: share * total for name, share in shares.items()}
    expected = {"supplement": 205.35, "dose": 2426.434, "interaction": 108.319, "seeds": 712.106}
    assert squares == pytest.approx(expected, abs=1e-3)


def test_variance_shares_of_three_factors_equal_least_squares():
    """Each share from the drop in residual of a nested dummy regression.

    For a balanced design it is the same in any order.
    """
    noise = np.random.default_rng(0).normal(size=(2, 3, 2, 4))
    interaction = np.arange(3)[:, None, None] * np.arange(2)[None, :, None]
    y = noise + interaction
    index = np.indices(y.shape).reshape(4, -1)  # (factors and seeds, observations)

    def residual(groups):
        """Sum of squares that is left with a dummy for each cell of each group of factors."""
        columns = []
        for group in groups:
            shape = [y.shape[i] for i in group]
            cell = np.ravel_multi_index(index[list(group)], shape)
            columns.append(np.eye(math.prod(shape))[cell])
        design = np.hstack(columns)
        coefficients, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
        return ((y.ravel() - design @ coefficients) ** 2).sum()

    total = sum_of_squares(y)
    all_cells = residual([(0, 1, 2)])
    expected = {
        "a": total - residual([(0,)]),
        "b": total - residual([(1,)]),
        "c": total - residual([(2,)]),
        "interaction": residual([(0,), (1,), (2,)]) - all_cells,
        "seeds": all_cells,
    }
    expected = {name: squares / total for name, squares in expected.items()}
    assert statistics.variance_shares(y, ["a", "b", "c"]) == pytest.approx(expected)


# -----------------------------------------------------------------------------
# the division of the gain


def test_shapley_of_the_glove_game():
    """One left glove, two right ones, a pair is worth 1: 2/3, 1/6, 1/6 (Shapley and Shubik)."""

    def value(gloves):
        return float("left" in gloves and len(gloves) > 1)

    shares = statistics.shapley(["left", "right", "other"], value)
    assert shares == pytest.approx({"left": 2 / 3, "right": 1 / 6, "other": 1 / 6})


def test_gains_of_a_hand_made_table():
    """strategy (none, tuned) x learning rate (low, high).

    Nothing by the rate alone, 10 by tuning alone, 30 together.
    """
    table = np.array([[50.0, 50.0], [60.0, 80.0]])
    gain = statistics.gains(table, table, ["strategy", "rate"], [0, 0])
    expected = {
        "strategy": (10 + 30) / 2,
        "rate": (0 + 20) / 2,
        "alone strategy": 10,
        "alone rate": 0,
        "interaction": 20,
        "total": 30,
    }
    assert gain == pytest.approx(expected)

    # Other images would have chosen the low rate.
    other_images = np.array([[50.0, 50.0], [60.0, 40.0]])
    assert statistics.chosen_value(other_images, table, [0, 0], [0, 1]) == 60
    assert statistics.chosen_value(table, other_images, [0, 0], [0, 1]) == 40


def test_decompose_recovers_what_was_put_in():
    """Accuracies of known effects: tuning adds 40 points, one architecture 10, the rate 0."""
    rng = np.random.default_rng(1)
    accuracy = np.full((3, 2, 2), 0.2)
    accuracy[1:] = 0.6
    accuracy[:, 1] += 0.1
    correct = rng.random((3, 2, 2, 3, 4000)) < accuracy[..., None, None]
    correct[0] = correct[0, :, :1, :1]  # the untrained model is one model
    result = statistics.decompose(correct, FACTORS, [0, 0, 0], rounds=200)

    truth = {"strategy": 40, "architecture": 10, "rate": 0, "total": 50, "alone strategy": 40}
    for name, points in truth.items():
        value, low, high = result["gain"][name]
        assert low - 0.5 <= points <= high + 0.5, (name, value, low, high)
        assert abs(value - points) < 2.5, (name, value, low, high)
        assert high - low < 6, (name, value, low, high)
    assert result["share"]["strategy"][0] == pytest.approx(0.8, abs=0.04)
    assert result["variance"]["architecture"][0] > 0.8
    for division in ("share", "variance"):
        assert sum(value for value, _, _ in result[division].values()) == pytest.approx(1)

    assert statistics.decompose(correct, FACTORS, [0, 0, 0], rounds=200) == result


def test_decompose_keeps_clusters_together():
    """With every image twice, half as much is known as there seems to be."""
    rng = np.random.default_rng(1)
    accuracy = np.array([0.3, 0.6])[:, None, None, None, None]
    once = rng.random((2, 2, 2, 2, 400)) < accuracy
    twice = np.repeat(once, 2, axis=-1)
    width = {}
    for name, correct, clusters in (
        ("once", once, None),
        ("blind", twice, None),
        ("clustered", twice, np.repeat(np.arange(400), 2)),
    ):
        result = statistics.decompose(correct, FACTORS, [0, 0, 0], 300, clusters=clusters)
        _, low, high = result["gain"]["strategy"]
        width[name] = high - low
    assert width["clustered"] == pytest.approx(width["once"], rel=1e-6)
    assert width["blind"] < 0.85 * width["once"]


def test_decompose_has_the_whole_spread_of_few_seeds():
    """Where only seeds vary: unscaled, the ends were the least and the best seed themselves."""
    clusters = np.repeat([0, 1], 100)  # a cluster in each half: images are no draw
    for right in ([64, 70], [60, 65, 76]):
        seeds = len(right)
        percent = np.array([[50] * seeds, right])  # the untrained model, the trained one
        correct = np.tile(np.arange(100), 2) < percent[..., None]
        result = statistics.decompose(correct, ["strategy"], [0], 1000, clusters=clusters)
        mean = np.mean(right)
        # All draws of one seed: 1 of 4 with two of them, 1 of 27 with three, more than 2.5%.
        scale = math.sqrt(seeds / (seeds - 1))
        least, best = (mean + scale * (end - mean) for end in (min(right), max(right)))
        assert result["gain"]["total"] == pytest.approx((mean - 50, least - 50, best - 50))


def test_decompose_without_any_difference_has_no_share():
    correct = np.ones((2, 2, 2, 2, 50), bool)
    result = statistics.decompose(correct, FACTORS, [0, 0, 0], rounds=5)
    assert result["gain"]["total"][0] == 0
    assert all(math.isnan(value) for value, _, _ in result["share"].values())
