"""What a metric gives to answers that know nothing of the inputs: always the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.models.sample_statistics import IGNORE_INDEX, as_tensor, labels
from autoquant.models.trees import Tree

Array = np.ndarray


@dataclass(frozen=True)
class Chance:
    """The level of the best constant answer, and what that answer is, for people."""

    value: float
    answer: str


def chance_level(metric: str, targets: Sequence[Tree], classes: int | None = None) -> Chance | None:
    """Return what a metric of METRICS gives at chance; None where that is not known.

    ``targets`` are those of all batches, ``classes`` how many the outputs tell apart, where known.
    """
    if metric in ("accuracy", "top5", "f1"):
        return _of_classes(metric, targets)
    if metric in ("mse", "mae"):
        return _of_numbers(metric, targets)
    if metric in ("pearson", "spearman"):
        return Chance(0.0, "answers that have nothing to do with the targets")
    if metric in ("word_error_rate", "token_error_rate"):
        return Chance(1.0, "empty answers")
    if metric == "perplexity" and classes is not None:
        return Chance(float(classes), f"giving all {classes} classes the same probability")
    return None


def _of_classes(metric: str, targets: Sequence[Tree]) -> Chance | None:
    y = np.concatenate([labels(t, "targets").cpu().numpy().ravel() for t in targets])
    counts = np.unique(y[y != IGNORE_INDEX], return_counts=True)
    if not len(counts[0]):
        return None
    shares = np.sort(counts[1])[::-1] / counts[1].sum()
    if metric == "top5":
        return Chance(float(shares[:5].sum()), "the five most common classes every time")
    most = "the most common class every time"
    if metric == "accuracy":
        return Chance(float(shares[0]), most)
    if counts[0].max() > 1:  # the mean over classes of 2·TP / (predictions + targets)
        return Chance(float(2 * shares[0] / (1 + shares[0]) / len(shares)), most)
    share = float(np.mean(y[y != IGNORE_INDEX] == 1))
    return Chance(2 * share / (1 + share), "class 1 every time")


def _of_numbers(metric: str, targets: Sequence[Tree]) -> Chance:
    y = np.concatenate([as_tensor(t, "targets").double().cpu().numpy().ravel() for t in targets])
    if metric == "mse":
        return Chance(float(y.var()), "the mean of the targets every time")
    return Chance(float(np.abs(y - np.median(y)).mean()), "the median of the targets every time")
