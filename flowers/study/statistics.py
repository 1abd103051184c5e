"""The statistics of the study: arrays in, numbers out.

Intervals over images and seeds, paired tests between models, the overlap of lists of classes, and
two answers to "what is a difference owed to?": a division of the variance and one of the gain.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from flowers.intervals import mcnemar_p

Interval = tuple[float, float, float]  # estimate, lower end, upper end
Division = dict[str, dict[str, float]]  # variance, gain or share -> factor -> value

Z = float(stats.norm.ppf(0.975))
# What is assumed of seeds before any is seen: the standard deviation of the accuracy over them is
# about one point at 50%, and in proportion to sqrt(p (1 - p)) elsewhere: 0.6 points at 90%. It
# counts as much as one more seed. See `_seed_half_width`.
SEED_SPREAD = 0.01
SEED_FREEDOM = 1


# -----------------------------------------------------------------------------
# intervals and tests


def mean_interval(correct: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """Return the accuracy over seeds and images with its 95% interval, in percent.

    What the interval is about is the mean over all seeds and all images that might have been
    drawn. The half-width is that of two independent sources: its square is (1.96 s_images)^2 +
    (t s_seeds)^2 / n (the squares of half-widths add up, as in Zou and Donner 2008; the variances
    are those of a crossed design, see `_variances`). Two or three seeds say little about their
    spread, so it is moderated by what is assumed of seeds, as in Smyth (2004): see
    `_seed_half_width`. The ends are Wilson's (1927), of as many images as would give that
    half-width; so they stay within 0 and 100, and with one seed and no near-duplicates they are
    Wilson's.

    With one seed the interval is over images alone and says nothing about other seeds. Seeds that
    agree on every image count as one: so do those of `linear`, which does not depend on them.
    benchmarks/coverage.py measures how often it holds the truth.

    Args:
        correct: (seeds, images) bool, whether each run is right about each image.
        clusters: (images,) int from 0; images of one cluster are near-duplicates, drawn together.
    """
    n_images = correct.shape[1]
    if clusters is None:
        clusters = np.arange(n_images)
    mean = float(correct.mean())
    of_images, _ = _variances(correct, clusters)
    squared = Z**2 * of_images + _seed_half_width(correct, clusters) ** 2

    spread = mean * (1 - mean)
    if spread == 0:  # all right or all wrong: as many trials as there are clusters
        ratio = Z**2 / len(np.unique(clusters))
    else:
        ratio = squared / spread  # Wilson's z^2 / n
    centre = (mean + ratio / 2) / (1 + ratio)
    half_width = math.sqrt(ratio * spread + ratio**2 / 4) / (1 + ratio)
    # Rounding must not leave 100 of 100 images outside.
    low = min(centre - half_width, mean)
    high = max(centre + half_width, mean)
    return 100 * mean, 100 * max(low, 0.0), 100 * min(high, 1.0)


def difference_interval(
    a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None
) -> Interval:
    """Return by how much a is more accurate than b, with its 95% interval, in points.

    As `mean_interval`, with the images paired: what varies over them is the difference. Seeds are
    independent draws, also where both lists have the same numbers: a seed gives another model with
    every other setting. Half an image that a alone has right, and half a one that b alone has, are
    added to the variance (Agresti and Min 2005): two models that agree everywhere have an interval.

    Args:
        a, b: (seeds of a, images) and (seeds of b, images) bool, of the same images.
        clusters: see `mean_interval`.
    """
    n_images = a.shape[1]
    if clusters is None:
        clusters = np.arange(n_images)
    difference = a.mean(axis=0) - b.mean(axis=0)  # (images,)
    of_images, _ = _variances(difference[None], clusters)
    squared = Z**2 * (of_images + 1 / n_images**2)
    for correct in (a, b):
        squared += _seed_half_width(correct, clusters) ** 2
    estimate = float(difference.mean())
    low = max(estimate - math.sqrt(squared), -1.0)
    high = min(estimate + math.sqrt(squared), 1.0)
    return 100 * estimate, 100 * low, 100 * high


def _variances(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean of values (seeds, images) over images, and that of one seed.

    A crossed design: each seed sees the same images. The part of the images is the sum of squares
    of what each cluster adds to the mean. The seeds' means vary for two reasons: one seed is better
    than another everywhere, or on these images by chance. The variance between seeds is that of
    their means less half of what chance alone would give: less all of it, few seeds would seem to
    agree too well.

    Returns:
        The two variances, in the unit of values squared. With one seed the second is 0.
    """
    n_seeds, n_images = values.shape
    deviations = values - values.mean(axis=1, keepdims=True)
    # What each cluster adds to the mean of each seed, (seeds, clusters).
    added = np.array([np.bincount(clusters, row) for row in deviations]) / n_images
    mean_added = added.mean(axis=0)  # (clusters,)
    of_images = float((mean_added**2).sum())
    if n_seeds == 1:
        return of_images, 0.0
    between_seeds = values.mean(axis=1).var(ddof=1)
    by_chance = ((added - mean_added) ** 2).sum() / (n_seeds - 1)
    return of_images, max(float(between_seeds - by_chance / 2), 0.0)


def _seed_half_width(correct: np.ndarray, clusters: np.ndarray) -> float:
    """The half-width of the 95% interval of the accuracy over seeds, as a fraction.

    The moderated variance of Smyth (2004): with s the standard deviation over n seeds,

        s_moderated^2 = (d0 s0^2 + (n - 1) s^2) / (d0 + n - 1)

    and t of d0 + n - 1 degrees of freedom. The assumption, s0 with its weight of d0 degrees, is
    fixed, not estimated from the other runs: SEED_SPREAD and SEED_FREEDOM. s0^2 is in proportion to
    p (1 - p), as the variance of a share of images is: where few mistakes are left, seeds can't
    differ by much.

    With one seed, or several that agree on every image, 0.
    """
    n_seeds = len(correct)
    if (correct == correct[0]).all():
        return 0.0
    mean = correct.mean()
    assumed = SEED_SPREAD**2 * 4 * mean * (1 - mean)
    _, observed = _variances(correct, clusters)
    freedom = SEED_FREEDOM + n_seeds - 1
    moderated = (SEED_FREEDOM * assumed + (n_seeds - 1) * observed) / freedom
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(moderated / n_seeds))


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
    return only_a, only_b, mcnemar_p(only_a, only_b)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values (K,) corrected for their number by the step-down method of Holm (1979).

    Rejecting those below alpha makes one or more false rejections with probability alpha at most.
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    # Not statsmodels': it collects garbage at each call, which takes the page 0.1 s.
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
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
    clusters: np.ndarray | None = None,
) -> dict[str, dict[str, Interval]]:
    """Divide variance and gain among the factors of a grid, with 95% bootstrap intervals.

    The bootstrap (Efron 1979, percentile intervals) draws images anew, within each of the two
    halves between which choosing and measuring alternate, and seeds anew within each cell. n drawn
    seeds vary less than n new ones would, by (n - 1) / n: what is drawn is each seed's deviation
    from the mean of its cell times sqrt(n / (n - 1)). Percentiles of two or three seeds are too
    narrow all the same (docs/study.md).

    Args:
        correct: (levels of factor 1, ..., levels of factor k, seeds, images) bool. Level 0 of
            factor 1 is the untrained model, the same in all its cells.
        reference: see `gains`.
        rounds: how many times to draw; with 0 the ends of the intervals are nan.
        clusters: (images,) int from 0. Images of one cluster, near-duplicates, are drawn together
            and lie in the same half.

    Returns:
        `variance`: shares of the variance of accuracy between the trained cells, see
        `variance_shares`; `gain`: see `gains`, in percentage points; `share`: the Shapley shares
        as fractions of the total gain, nan if there is none. Each value is an `Interval`.
    """
    rng = np.random.default_rng(seed)
    *levels, seeds, images = correct.shape
    percent = 100 * correct.reshape(-1, images).astype(float)  # (cells * seeds, images)
    if clusters is None:
        clusters = np.arange(images)
    n_clusters = clusters.max() + 1
    # A random half, the same in all rounds.
    in_first = np.zeros(n_clusters, bool)
    in_first[rng.permutation(n_clusters)[: n_clusters // 2]] = True
    first_half = in_first[clusters]  # (images,)

    def estimate(weights: np.ndarray, seed_index: np.ndarray, scale: float = 1.0) -> Division:
        """All divisions, with images (images,) weighted and seeds (levels ..., seeds) chosen.

        scale: of the deviations of the seeds from the mean of their cell.
        """
        accuracy = []
        for half in (first_half, ~first_half):
            half_weights = weights * half
            mean = percent @ half_weights / half_weights.sum()  # (cells * seeds,)
            of_seeds = mean.reshape(*levels, seeds)
            of_cells = of_seeds.mean(axis=-1, keepdims=True)
            scaled = of_cells + scale * (of_seeds - of_cells)
            accuracy.append(np.take_along_axis(scaled, seed_index, axis=-1))
        return _divide(*accuracy, first_half.mean(), factors, reference)

    # The estimate itself takes each image and each seed once.
    each_seed = np.broadcast_to(np.arange(seeds), (*levels, seeds))
    estimates = estimate(np.ones(images), each_seed)
    scale = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    resampled = []
    for _ in range(rounds):
        weights = _draw_clusters(in_first, rng)[clusters]
        seed_index = rng.integers(seeds, size=(*levels, seeds))
        resampled.append(estimate(weights, seed_index, scale))
    return _with_intervals(estimates, resampled)


def _draw_clusters(in_first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each cluster is drawn (K,), with replacement, as many as each half has."""
    weights = np.zeros(len(in_first))
    for half in (in_first, ~in_first):
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
