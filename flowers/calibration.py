"""How far probabilities can be believed: scores of them, and the temperature that mends them.

Of N images and C classes, with the probability p[i, c] of class c for image i, whose class is y[i]:

    NLL    =  mean over i of  -log p[i, y[i]]                          in nats
    Brier  =  mean over i of  sum over c of (p[i, c] - [c = y[i]])^2   from 0 to 2
    ECE    =  sum over bins b of  n_b / N * |accuracy_b - confidence_b|  in percent

Brier 1950; Guo et al. 2017, with the bins of equal mass of Nixon et al. 2019. An image's confidence
is the probability of its best class. All arrays are numpy's, so that no torch is needed here.
"""

import math

import numpy as np
from scipy.special import log_softmax

FILE = "calibration.json"  # in the folder of a run with --holdout
BINS = 15
ROUNDS = 1000  # of the bootstrap
# The temperature is searched between 1 / MOST and MOST.
MOST = 100.0


# -----------------------------------------------------------------------------
# scores of probabilities


def scores(logits: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """NLL (nats), Brier score (0 to 2) and ECE (percent) of logits (N, C) and labels (N,).

    predicted: (N,), the best class of each image; of equal logits it may be any.

    Each with the ends of its 95% interval, `_low` and `_high`: percentiles of a bootstrap over
    images. Every resample of the ECE has the noise of the sample once more, and absolute values
    do not cancel it: its bootstrap lies too high. So its interval is moved down by as much as the
    mean of the bootstrap is above the ECE of the sample, and ends at 0.
    """
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)  # (N, C)
    probabilities = np.exp(log_probabilities)
    n = len(labels)
    rows = np.arange(n)
    is_label = np.zeros_like(probabilities)
    is_label[rows, labels] = 1
    nll_of_image = -log_probabilities[rows, labels]  # (N,)
    brier_of_image = ((probabilities - is_label) ** 2).sum(1)  # (N,)

    confidence = probabilities.max(1)
    gaps = np.zeros((n, BINS))  # an image's part in the gap of its bin
    gaps[rows, assign_bins(confidence)] = (predicted == labels) - confidence

    # All three are functions of sums over images, so a resample is a count for each image.
    columns = np.column_stack([nll_of_image, brier_of_image, gaps])  # (N, 2 + BINS)
    nll, brier, ece = _from_means(columns.mean(0, keepdims=True))
    resampled_nll, resampled_brier, resampled_ece = _from_means(_resample_means(columns))
    excess = resampled_ece.mean() - ece[0]
    return (
        _with_interval("nll", nll, resampled_nll)
        | _with_interval("brier", brier, resampled_brier)
        | _with_interval("ece", ece, np.maximum(resampled_ece - excess, 0))
    )


def _from_means(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL, Brier score and ECE, (R,) each, from the means (R, 2 + BINS) of R samples."""
    return means[:, 0], means[:, 1], 100 * abs(means[:, 2:]).sum(1)


def _resample_means(columns: np.ndarray) -> np.ndarray:
    """The means (ROUNDS, K) of columns (N, K) over N rows drawn with replacement; always the same.

    Percentile bootstrap of Efron and Tibshirani 1993, chapter 13.
    """
    n = len(columns)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(ROUNDS):
        times_drawn = np.bincount(rng.integers(n, size=n, dtype=np.int32), minlength=n)
        means.append(times_drawn @ columns / n)
    return np.array(means)


def _with_interval(name: str, value: np.ndarray, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {name: float(value[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def assign_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each image (N,), from 0 to BINS - 1, by its confidence (N,).

    Bins have equal numbers of images, up to one. Images of equal confidence share a bin, whatever
    their order, and bins may then be empty. Fewer than BINS images have a bin each.
    """
    # The digits of predictions.csv, so that its scores give the same bins.
    _, kind, sizes = np.unique(np.round(confidence, 6), return_inverse=True, return_counts=True)
    # The middle of the places, from 0 to N, that images of one confidence take when sorted.
    ends = np.cumsum(sizes)
    middle = (ends - sizes / 2)[kind]
    return (BINS * middle / len(confidence)).astype(int)


# -----------------------------------------------------------------------------
# temperature


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The T > 0 for which the NLL of logits (N, C) / T is least (Guo et al. 2017, section 4.2).

    None if there is no such T, or none between 1 / MOST and MOST: of images that are all right the
    NLL falls for ever as T goes to 0, and of answers that are worse than chance as T grows.
    """
    from scipy.optimize import minimize_scalar  # here, as training starts without

    end = math.log(MOST)
    # As a function of log T the NLL has one valley: it is convex in 1 / T.
    found = minimize_scalar(
        lambda log_t: nll(logits, labels, math.exp(log_t)),
        bounds=(-end, end),
        method="bounded",
        options={"xatol": 1e-6},
    )
    # The search ends a little inside the bounds.
    if abs(found.x) > 0.999 * end:
        return None
    return math.exp(found.x)


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean negative log-likelihood, in nats, of labels (N,) under logits (N, C) / T."""
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def temperature_in_words(temperature: float) -> str:
    """How a calibrated probability is marked, such as `calibrated (T = 1.37)`."""
    return f"calibrated (T = {temperature:.3g})"
