"""How often the study's 95% intervals hold the truth: simulated runs whose truth is known.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --difference  # of two models that are equally good

Prints a Markdown table, for docs/study.md. Beside the interval of the study stand Student's t over
the seeds and the bootstrap that draws seeds and images anew and takes percentiles.

A run is right about an image if a sum of normal numbers is positive: one of the seed; one of the
image, its difficulty, which all seeds share; and one of the pair. A fifth of the images are in
clusters of three near-duplicates, which have nearly the same numbers. The accuracy over all seeds
and images is then a value of the normal distribution, without any error of its own.
"""

import argparse
import itertools
from typing import NamedTuple

import numpy as np
from scipy import stats

from flowers.study import statistics

ACCURACIES = (0.3, 0.6, 0.9, 0.98)
SEEDS = (1, 2, 3, 5)
IMAGES = (200, 718, 6149)  # the last two: the test images that are shared, and the official ones
SPREADS = (0.0, 0.5, 1.0, 2.0, 3.0)  # standard deviation of the accuracy over seeds, in points

DUPLICATES = 0.2  # of the images
CLUSTER = 3  # images
ALIKE = 0.95  # correlation of near-duplicates
ROUNDS = 200  # of the bootstrap


class Setting(NamedTuple):
    accuracy: float
    n_seeds: int
    n_images: int
    spread: float
    shared: float  # the part of the variance between images that all seeds share


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repetitions", type=int, default=1000, help="of each setting (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--shared",
        type=float,
        default=0.8,
        help="the part of the variance between images that all seeds share (default: %(default)s)",
    )
    parser.add_argument(
        "--spreads",
        type=float,
        nargs="+",
        default=SPREADS,
        help="standard deviations of the accuracy over seeds, in points (default: %(default)s)",
    )
    parser.add_argument(
        "--difference", action="store_true", help="the interval of a difference, alone"
    )
    args = parser.parse_args()

    if args.difference:
        print("| seeds | images | spread of seeds | study |\n|---:|---:|---:|---:|")
    else:
        print("| seeds | images | spread of seeds | study | Student's t | bootstrap | half-width |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
    cases = itertools.product(SEEDS, IMAGES, args.spreads)
    for i, (n_seeds, n_images, spread) in enumerate(cases):
        if n_seeds == 1 and spread > 0:
            continue  # says nothing about other seeds
        rows = []
        for accuracy in ACCURACIES:
            # Seeds do not double or halve the number of errors.
            possible = min(spread / 100, (1 - accuracy) / 4)
            setting = Setting(accuracy, n_seeds, n_images, possible, args.shared)
            measure = coverage_of_difference if args.difference else coverage
            rows.append(measure(setting, args.repetitions, [args.seed, i]))
        print(table_row(n_seeds, n_images, spread, np.array(rows)), flush=True)


def table_row(n_seeds: int, n_images: int, spread: float, rows: np.ndarray) -> str:
    """Coverages from the least to the most of the accuracies.

    rows: (accuracies, 5), see `coverage`; or (accuracies, 1), of a difference.
    """
    cells = [str(n_seeds), f"{n_images:,}", f"{spread:g}"]
    for column in range(min(3, rows.shape[1])):
        low, high = rows[:, column].min(), rows[:, column].max()
        cells.append("-" if np.isnan(low) else f"{100 * low:.1f}-{100 * high:.1f}")
    if rows.shape[1] > 1:
        study, student = rows[1, 3:]  # at 60%
        cells.append(f"{study:.1f}" if np.isnan(student) else f"{study:.1f} ({student:.1f})")
    return f"| {' | '.join(cells)} |"


def coverage(setting: Setting, repetitions: int, seed: int | list[int]) -> np.ndarray:
    """How often each interval holds the truth, and how wide two of them are, (5,).

    The share of the repetitions of the study's interval, of Student's t and of the bootstrap; the
    median half-width of the first two in points. With one seed, nan for Student's.
    """
    rng = np.random.default_rng(seed)
    truth = 100 * setting.accuracy
    held, widths = [], []
    for _ in range(repetitions):
        correct, clusters = simulate(setting, rng)
        intervals = [
            statistics.mean_interval(correct, clusters),
            student(correct),
            naive_bootstrap(correct, rng),
        ]
        held.append([low <= truth <= high for _, low, high in intervals])
        widths.append([(high - low) / 2 for _, low, high in intervals[:2]])
    result = np.concatenate([np.mean(held, axis=0), np.median(widths, axis=0)])
    if setting.n_seeds == 1:
        result[[1, 4]] = np.nan
    return result


def coverage_of_difference(setting: Setting, repetitions: int, seed: int | list[int]) -> np.ndarray:
    """How often the interval of the difference of two equal models holds 0, (1,)."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(repetitions):
        # Twice as many seeds of one model: each half of them is a model, on the same images.
        both = setting._replace(n_seeds=2 * setting.n_seeds)
        correct, clusters = simulate(both, rng)
        a, b = np.split(correct, 2)
        _, low, high = statistics.difference_interval(a, b, clusters)
        held.append(low <= 0 <= high)
    return np.array([np.mean(held)])


def simulate(setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whether each run is right, (seeds, images) bool, and the cluster of each image, (images,)."""
    n_images = setting.n_images
    n_clusters = int(DUPLICATES * n_images) // CLUSTER
    single = np.arange(n_images - CLUSTER * n_clusters)
    clusters = np.concatenate([np.repeat(np.arange(n_clusters), CLUSTER), n_clusters + single])

    def draw(rows: int) -> np.ndarray:
        """Normal numbers of variance 1, nearly the same within a cluster: (rows, images)."""
        of_cluster = rng.standard_normal((rows, clusters[-1] + 1), dtype=np.float32)
        own = rng.standard_normal((rows, n_images), dtype=np.float32)
        return ALIKE**0.5 * of_cluster[:, clusters] + (1 - ALIKE) ** 0.5 * own

    # The slope of the normal distribution turns points of accuracy into a shift of the sum.
    threshold = stats.norm.ppf(setting.accuracy)
    shift = setting.spread / stats.norm.pdf(threshold)
    of_seed = shift * rng.standard_normal((setting.n_seeds, 1))
    of_image = setting.shared**0.5 * draw(1)
    of_pair = (1 - setting.shared) ** 0.5 * draw(setting.n_seeds)
    # The seeds add their variance to the 1 of the rest: the mean moves so that the accuracy stays.
    mean = threshold * (1 + shift**2) ** 0.5
    return mean + of_seed + of_image + of_pair > 0, clusters


def student(correct: np.ndarray) -> statistics.Interval:
    """Student's t over the accuracies of the seeds, which sees no images."""
    accuracies = 100 * correct.mean(axis=1)
    mean = accuracies.mean()
    if len(correct) == 1:
        return mean, np.nan, np.nan
    half_width = stats.t.ppf(0.975, len(correct) - 1) * stats.sem(accuracies)
    return mean, mean - half_width, mean + half_width


def naive_bootstrap(correct: np.ndarray, rng: np.random.Generator) -> statistics.Interval:
    """Percentiles of the mean with seeds and images drawn anew, images each on its own."""
    n_seeds, n_images = correct.shape
    # Images that the same seeds are right about are alike: draw how many of each kind, 2^n kinds.
    bits = (1 << np.arange(n_seeds)) @ correct
    kinds = np.bincount(bits, minlength=1 << n_seeds)
    counts = rng.multinomial(n_images, kinds / n_images, size=ROUNDS)  # (rounds, kinds)
    right = np.arange(len(kinds)) >> np.arange(n_seeds)[:, None] & 1  # (seeds, kinds)
    accuracies = counts @ right.T / n_images  # (rounds, seeds)
    drawn = rng.integers(n_seeds, size=accuracies.shape)
    means = np.take_along_axis(accuracies, drawn, axis=1).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * correct.mean(), 100 * low, 100 * high


if __name__ == "__main__":
    main()
