"""The statistics of the study: intervals over seeds, paired tests, overlap of class lists, and who a gain is owed to. Arrays in, numbers out."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float, float]  # estimate, low, high


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval of Student's t over independent runs; with one value the interval is nan."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Images that only a, and only b, has right, and the exact two-sided p that both have as many (McNemar 1947; binomial).

    a, b: (N,) bool, correct or not on the same images.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return (
        only_a,
        only_b,
        float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number, step-down (Holm 1979): those below alpha hold together with error at most alpha."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def overlap(a: Sequence, b: Sequence, population: int) -> tuple[int, float, float]:
    """Items in both lists, how many chance would put there, and the hypergeometric p of at least as many."""
    both = len(set(a) & set(b))
    return (
        both,
        len(a) * len(b) / population,
        float(stats.hypergeom.sf(both - 1, population, len(a), len(b))),
    )


def variance_shares(y: np.ndarray, factors: Sequence[str]) -> dict[str, float]:
    """Shares of the sum of squares (eta squared, summing to 1) of a balanced design: each factor, all their interactions, `seeds` the rest.

    y: (levels of factor 1, ..., levels of factor k, seeds).
    """
    effects: dict[tuple, np.ndarray] = {}
    for subset in (
        s
        for size in range(len(factors) + 1)
        for s in itertools.combinations(range(len(factors)), size)
    ):
        mean = y.mean(axis=tuple(i for i in range(y.ndim) if i not in subset), keepdims=True)
        effects[subset] = mean - sum(
            effect for inner, effect in effects.items() if set(inner) < set(subset)
        )
    squares = {s: (effect**2).sum() * y.size / effect.size for s, effect in effects.items() if s}
    total = max(((y - y.mean()) ** 2).sum(), 1e-300)
    shares = {name: squares[(i,)] / total for i, name in enumerate(factors)}
    shares["interaction"] = sum(v for s, v in squares.items() if len(s) > 1) / total
    return {k: float(v) for k, v in shares.items()} | {
        "seeds": float(1 - sum(squares.values()) / total)
    }


def shapley(players: Sequence[str], value: Callable[[frozenset], float]) -> dict[str, float]:
    """What each player adds to value(), averaged over all orders in which they may come (Shapley 1953); sums to value(all) - value(none)."""
    orders = list(itertools.permutations(players))
    return {
        player: sum(
            value(frozenset(o[: o.index(player) + 1])) - value(frozenset(o[: o.index(player)]))
            for o in orders
        )
        / len(orders)
        for player in players
    }


def chosen_value(
    choose: np.ndarray, measure: np.ndarray, reference: Sequence[int], free: Sequence[int]
) -> float:
    """The accuracy in `measure` where `choose` is best, with the factors in `free` (axes) free and the others at their reference level.

    choose, measure: (levels of factor 1, ..., of factor k), accuracies on two sets of images, so that choosing does not flatter.
    """
    at = tuple(slice(None) if i in free else slice(r, r + 1) for i, r in enumerate(reference))
    return float(measure[at].flat[choose[at].argmax()])


def gains(
    choose: np.ndarray, measure: np.ndarray, factors: Sequence[str], reference: Sequence[int]
) -> dict[str, float]:
    """Gain over the reference, in the unit of the tables, by Shapley's division, `alone` by each factor, and what only comes together.

    Keys: a factor's Shapley share; `alone FACTOR`; `interaction`, the total less the sum of those; `total`.
    """

    def value(free: frozenset) -> float:
        axes = [factors.index(f) for f in free]
        return (
            chosen_value(choose, measure, reference, axes)
            + chosen_value(measure, choose, reference, axes)
        ) / 2

    none = value(frozenset())
    alone = {f"alone {f}": value(frozenset([f])) - none for f in factors}
    total = value(frozenset(factors)) - none
    return {
        **shapley(factors, value),
        **alone,
        "interaction": total - sum(alone.values()),
        "total": total,
    }


def decompose(
    correct: np.ndarray,
    factors: Sequence[str],
    reference: Sequence[int],
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """`variance`: shares of the variance of accuracy between trained cells; `gain`: see `gains`, in points; `share`: Shapley parts of the total.

    Each with its 95% percentile interval over bootstrap rounds that draw images, and seeds within a cell, anew.
    correct: (levels of factor 1, ..., of factor k, seeds, images) bool; level 0 of factor 1 is the untrained model, the same in all its cells.
    """
    rng = np.random.default_rng(seed)
    *levels, seeds, n = correct.shape
    flat = correct.reshape(-1, n).astype(float)
    half = np.zeros(n, bool)
    half[rng.permutation(n)[: n // 2]] = True

    def measures(weights: np.ndarray, draw: np.ndarray) -> dict[tuple, float]:
        a, b = (
            np.take_along_axis(
                (100 * flat @ (weights * part) / (weights * part).sum()).reshape(*levels, seeds),
                draw,
                -1,
            )
            for part in (half, ~half)
        )
        share = half.mean()
        gain = gains(a.mean(-1), b.mean(-1), factors, reference)
        total = gain["total"] if abs(gain["total"]) > 1e-9 else math.nan
        return (
            {
                ("variance", k): v
                for k, v in variance_shares((share * a + (1 - share) * b)[1:], factors).items()
            }
            | {("gain", k): v for k, v in gain.items()}
            | {("share", f): gain[f] / total for f in factors}
        )

    estimate = measures(np.ones(n), np.broadcast_to(np.arange(seeds), (*levels, seeds)))
    drawn = []
    for _ in range(rounds):
        weights = np.zeros(n)
        for part in (half, ~half):
            weights[part] = rng.multinomial(part.sum(), np.full(part.sum(), 1 / part.sum()))
        drawn.append(measures(weights, rng.integers(seeds, size=(*levels, seeds))))
    result: dict[str, dict[str, Interval]] = {}
    for (kind, key), value in estimate.items():
        low, high = (
            np.nanpercentile([d[kind, key] for d in drawn], [2.5, 97.5])
            if drawn and not math.isnan(value)
            else (math.nan, math.nan)
        )
        result.setdefault(kind, {})[key] = (value, float(low), float(high))
    return result
