"""From per-sample statistics to the metrics' values: plain functions of arrays.

SciPy and scikit-learn define the point values where they have the metric; the functions of totals
[r, m] and of samples [r, n, k] give the same for many bootstrap resamples at once. They import
lazily, for both libraries take longer to import than most metrics to compute.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autoquant.libraries import library

Array = np.ndarray


def ratio(totals: Array) -> Array:
    """Return column 0 over column 1; 0/0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[..., 0] / totals[..., 1]


def noise_ratio(totals: Array) -> Array:
    """Return noise over signal, 0 where there is neither (a silent model kept silent)."""
    return np.where(totals[..., 0] == 0, 0.0, ratio(totals))


def perplexity(totals: Array) -> Array:
    """Return exp(nats per token)."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(totals))


def share(stats: Array) -> Array:
    """Return each sample's own ratio; a sample without anything that counts has loss 0."""
    return stats[:, 0] / np.where(stats[:, 1] == 0, 1.0, stats[:, 1])


def miss(stats: Array) -> Array:
    """Return the share of positions that are wrong."""
    return np.where(stats[:, 1] == 0, 0.0, 1.0 - share(stats))


def correlation(samples: Array) -> Array:
    """Return Pearson's r of samples [..., m, 2] over axis −2; NaN where one side is constant."""
    constant = np.any(samples.max(axis=-2) == samples.min(axis=-2), axis=-1)
    centred = samples - samples.mean(axis=-2, keepdims=True)
    products = (centred[..., 0] * centred[..., 1]).sum(axis=-1)
    norms = np.sqrt((centred**2).sum(axis=-2)).prod(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(constant, np.nan, products / norms)


def rank_correlation(samples: Array) -> Array:
    """Return Spearman's rho: Pearson's r of the ranks, ties at their mean rank."""
    return correlation(library("scipy.stats").rankdata(samples, axis=-2))


def pearson(stats: Array) -> float:
    """Return SciPy's Pearson r of [n, 2]; NaN where one side is constant."""
    if _constant(stats):
        return math.nan
    return float(library("scipy.stats").pearsonr(stats[:, 0], stats[:, 1]).statistic)


def spearman(stats: Array) -> float:
    """Return SciPy's Spearman rho of [n, 2]; NaN where one side is constant."""
    if _constant(stats):
        return math.nan
    return float(library("scipy.stats").spearmanr(stats[:, 0], stats[:, 1]).statistic)


def _constant(stats: Array) -> bool:
    """Return whether a correlation is undefined: a constant side (SciPy would warn)."""
    return bool((stats == stats[0]).all(axis=0).any())


def _class_pairs(stats: Array) -> tuple[Array, Array, bool]:
    """Return samples [m] and (predicted, true) [m, 2] of positions that count; if two classes."""
    pairs = stats[:, 1:].reshape(len(stats), -1, 2)
    counts = ~np.isnan(pairs[..., 0])
    return np.nonzero(counts)[0], pairs[counts].astype(np.int64), stats[:, 0].max() <= 2


def f1(stats: Array) -> float:
    """Return F1 of class 1 where there are two classes, else the mean F1 over classes present."""
    _, pairs, binary = _class_pairs(stats)
    if not len(pairs):
        return math.nan
    average = "binary" if binary else "macro"
    return float(
        library("sklearn.metrics").f1_score(
            pairs[:, 1], pairs[:, 0], average=average, zero_division=0.0
        )
    )


def f1_terms(stats: Array) -> Any:
    """Return, sparse [n, 2c]: a class's true positives, and its predictions plus its targets."""
    sample, pairs, binary = _class_pairs(stats)
    classes = np.array([1]) if binary else np.unique(pairs)
    hits = pairs[:, 0] == pairs[:, 1]
    rows = np.concatenate([sample[hits], sample, sample])
    labels = np.concatenate([pairs[hits, 0], pairs[:, 0], pairs[:, 1]])
    kind = np.repeat([0, 1], [hits.sum(), 2 * len(pairs)])
    known = np.isin(labels, classes)
    columns = 2 * np.searchsorted(classes, labels[known]) + kind[known]
    ones = np.ones(len(columns))
    return (
        library("scipy.sparse")
        .coo_array((ones, (rows[known], columns)), (len(stats), 2 * len(classes)))
        .tocsr()
    )


def f1_of_totals(totals: Array) -> Array:
    """Return the mean over the classes present of 2·TP / (predictions + targets)."""
    hits, either = totals[:, 0::2], totals[:, 1::2]
    scores = 2 * hits / np.maximum(either, 1)
    return scores.sum(axis=1) / np.maximum((either > 0).sum(axis=1), 1)
