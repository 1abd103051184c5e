"""The statistics of the study: arrays in, numbers out.

Intervals over seeds, paired tests between models, the overlap of lists of classes, and two answers
to "what is a difference owed to?": a division of the variance and a division of the gain.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from statsmodels.stats import contingency_tables, multitest

Interval = tuple[float, float, float]  # estimate, lower end, upper end
Division = dict[str, dict[str, float]]  # variance, gain or share -> factor -> value


# -----------------------------------------------------------------------------
# intervals and tests


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent runs and its 95% interval (Student 1908).

    mean +- t(0.975, n - 1) * s / sqrt(n). With one value the ends of the interval are nan.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half_width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(mean - half_width), float(mean + half_width)


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Compare two models on the same images by the exact test of McNemar (1947).

    Args:
        a, b: (N,) bool, whether each model is right about each image.

    Returns:
        The number of images that only a has right, the number that only b has right, and the
        two-sided p-value of the hypothesis that both numbers are equal in the long run.
    """
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    # Images on which the models agree do not enter the exact test, so their cells stay 0.
    table = [[0, only_a], [only_b, 0]]
    p_value = contingency_tables.mcnemar(table, exact=True).pvalue
    return only_a, only_b, float(p_value)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values (K,) corrected for their number by the step-down method of Holm (1979).

    Rejecting those below alpha makes one or more false rejections with probability alpha at most.
    """
    if len(p_values) == 0:  # statsmodels divides by their number
        return np.empty(0)
    _, corrected, _, _ = multitest.multipletests(p_values, method="holm")
    return corrected


def overlap(a: Sequence, b: Sequence, population: int) -> tuple[int, float, float]:
    """Compare two lists drawn from `population` items with the hypergeometric distribution.

    Returns:
        The number of items in both lists, the number expected by chance, len(a) len(b) /
        population, and the probability that chance puts at least as many into both.
    """
    both = len(set(a) & set(b))
    expected = len(a) * len(b) / population
    # sf is P(X > x), so both - 1 gives P(X >= both).
    p_value = float(stats.hypergeom.sf(both - 1, population, len(a), len(b)))
    return both, expected, p_value


# -----------------------------------------------------------------------------
# what a difference is owed to


def variance_shares(y: np.ndarray, factors: Sequence[str]) -> dict[str, float]:
    """Divide the variance of a balanced factorial design: eta squared, SS_effect / SS_total.

    The effect of a set of factors is the mean of y over everything else, less the effects of all
    smaller sets within it (Fisher 1925). In a balanced design the sums of squares add up.

    Args:
        y: (levels of factor 1, ..., levels of factor k, seeds).
        factors: the k names.

    Returns:
        A share for each factor, for `interaction` (all sets of two factors or more together) and
        for `seeds` (what remains within the cells). They sum to 1.
    """
    effects: dict[tuple[int, ...], np.ndarray] = {}
    sums_of_squares = {}
    # From the grand mean, the effect of no factor, to the interaction of all of them.
    for size in range(len(factors) + 1):
        for subset in itertools.combinations(range(len(factors)), size):
            other_axes = tuple(axis for axis in range(y.ndim) if axis not in subset)
            mean = y.mean(axis=other_axes, keepdims=True)
            smaller = [effects[inner] for inner in effects if set(inner) < set(subset)]
            effect = mean - sum(smaller)
            effects[subset] = effect
            # An element of the effect stands for y.size / effect.size elements of y.
            sums_of_squares[subset] = (effect**2).sum() * y.size / effect.size
    del sums_of_squares[()]  # the grand mean is no variance

    total = ((y - y.mean()) ** 2).sum()
    total = max(total, 1e-300)  # if nothing varies, all shares but that of the seeds are 0
    shares = {}
    for axis, name in enumerate(factors):
        shares[name] = float(sums_of_squares[(axis,)] / total)
    interactions = [squares for subset, squares in sums_of_squares.items() if len(subset) > 1]
    shares["interaction"] = float(sum(interactions) / total)
    # What the cell means do not explain is the spread of the seeds within their cells.
    shares["seeds"] = float(1 - sum(sums_of_squares.values()) / total)
    return shares


def shapley(players: Sequence[str], value: Callable[[frozenset], float]) -> dict[str, float]:
    """Return what each player adds to a value, averaged over all orders of arrival (Shapley 1953).

    phi_i = mean over orders of value(those before i and i) - value(those before i).
    The results sum to value(all players) - value(no player).
    """
    # All k! orders: a study has three factors or four.
    orders = list(itertools.permutations(players))
    shares = {}
    for player in players:
        added = []
        for order in orders:
            before = frozenset(order[: order.index(player)])
            added.append(value(before | {player}) - value(before))
        shares[player] = sum(added) / len(orders)
    return shares


def chosen_value(
    choose: np.ndarray, measure: np.ndarray, reference: Sequence[int], free: Sequence[int]
) -> float:
    """Return the accuracy in `measure` of the cell that is best in `choose`.

    Choosing on some images and measuring on others keeps the choice from flattering the result.

    Args:
        choose, measure: (levels of factor 1, ..., levels of factor k), accuracies of the same
            cells on two sets of images.
        reference: a level for each factor.
        free: the factors (axes) that may take any level; the others stay at their reference.
    """
    cells = []
    for axis, level in enumerate(reference):
        cells.append(slice(None) if axis in free else slice(level, level + 1))
    best = choose[tuple(cells)].argmax()  # of equals, the first
    return float(measure[tuple(cells)].flat[best])


def gains(
    first_half: np.ndarray,
    second_half: np.ndarray,
    factors: Sequence[str],
    reference: Sequence[int],
) -> dict[str, float]:
    """Divide the gain of the best cell over the reference cell among the factors.

    Args:
        first_half, second_half: (levels of factor 1, ..., levels of factor k), accuracies on two
            halves of the images; each is used to choose while the other measures.
        reference: the level of each factor before anything is changed.

    Returns:
        In the unit of the accuracies: for each factor its Shapley share of the gain and, as
        `alone FACTOR`, the gain if only this factor is free; `total`, if all are free; and
        `interaction`, the total less the sum of those alone.
    """

    @functools.cache  # Shapley's formula asks for each set of factors several times
    def value(free: frozenset) -> float:
        axes = [factors.index(factor) for factor in free]
        # Both ways, so that each image measures once.
        forward = chosen_value(first_half, second_half, reference, axes)
        backward = chosen_value(second_half, first_half, reference, axes)
        return (forward + backward) / 2

    untouched = value(frozenset())
    result = shapley(factors, value)
    alone = {factor: value(frozenset([factor])) - untouched for factor in factors}
    for factor in factors:
        result[f"alone {factor}"] = alone[factor]
    total = value(frozenset(factors)) - untouched
    result["interaction"] = total - sum(alone.values())
    result["total"] = total
    return result


def decompose(
    correct: np.ndarray,
    factors: Sequence[str],
    reference: Sequence[int],
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Divide variance and gain among the factors of a grid, with 95% bootstrap intervals.

    The bootstrap (Efron 1979, percentile intervals) draws images anew, within each of the two
    halves between which choosing and measuring alternate, and seeds anew within each cell.

    Args:
        correct: (levels of factor 1, ..., levels of factor k, seeds, images) bool. Level 0 of
            factor 1 is the untrained model, the same in all its cells.
        reference: see `gains`.
        rounds: how many times to draw; with 0 the ends of the intervals are nan.

    Returns:
        `variance`: shares of the variance of accuracy between the trained cells, see
        `variance_shares`; `gain`: see `gains`, in percentage points; `share`: the Shapley shares
        as fractions of the total gain, nan if there is none. Each value is an `Interval`.
    """
    rng = np.random.default_rng(seed)
    *levels, seeds, images = correct.shape
    percent = 100 * correct.reshape(-1, images).astype(float)  # (cells * seeds, images)
    # A random half, the same in all rounds.
    first_half = np.zeros(images, bool)
    first_half[rng.permutation(images)[: images // 2]] = True

    def estimate(weights: np.ndarray, seed_index: np.ndarray) -> Division:
        """All divisions, with images (images,) weighted and seeds (levels ..., seeds) chosen."""
        accuracy = []
        for half in (first_half, ~first_half):
            half_weights = weights * half
            mean = percent @ half_weights / half_weights.sum()  # (cells * seeds,)
            mean = mean.reshape(*levels, seeds)
            accuracy.append(np.take_along_axis(mean, seed_index, axis=-1))
        return _divide(*accuracy, first_half.mean(), factors, reference)

    # The estimate itself takes each image and each seed once.
    each_seed = np.broadcast_to(np.arange(seeds), (*levels, seeds))
    estimates = estimate(np.ones(images), each_seed)
    resampled = []
    for _ in range(rounds):
        weights = _draw_images(first_half, rng)
        seed_index = rng.integers(seeds, size=(*levels, seeds))
        resampled.append(estimate(weights, seed_index))
    return _with_intervals(estimates, resampled)


def _draw_images(first_half: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn (images,), with replacement, as many as each half has."""
    weights = np.zeros(len(first_half))
    for half in (first_half, ~first_half):
        size = half.sum()
        weights[half] = rng.multinomial(size, np.full(size, 1 / size))
    return weights


def _divide(
    first_half: np.ndarray,
    second_half: np.ndarray,
    first_weight: float,
    factors: Sequence[str],
    reference: Sequence[int],
) -> Division:
    """`variance`, `gain` and `share` of accuracies (levels ..., seeds) on two halves of images."""
    gain = gains(first_half.mean(axis=-1), second_half.mean(axis=-1), factors, reference)
    total = gain["total"]
    if abs(total) < 1e-9:  # nothing to divide
        total = math.nan
    share = {factor: gain[factor] / total for factor in factors}
    accuracy = first_weight * first_half + (1 - first_weight) * second_half
    # Level 0 is the untrained model, which has no variance of its own.
    variance = variance_shares(accuracy[1:], factors)
    return {"variance": variance, "gain": gain, "share": share}


def _with_intervals(
    estimates: Division, resampled: list[Division]
) -> dict[str, dict[str, Interval]]:
    """Each estimate with the 2.5th and 97.5th percentile of its resampled values."""
    result = {}
    for kind, values in estimates.items():
        intervals = {}
        for key, value in values.items():
            low, high = math.nan, math.nan
            if resampled and not math.isnan(value):
                drawn = [division[kind][key] for division in resampled]
                # A round without any gain has no shares: its nan is left out.
                low, high = np.nanpercentile(drawn, [2.5, 97.5])
            intervals[key] = (value, float(low), float(high))
        result[kind] = intervals
    return result
