"""Evidence: what a metric keeps of a model's outputs, enough to score any choice of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from autoquant.errors import TaskError, TrialError
from autoquant.models.trees import batch_size, concat, take, to_device
from autoquant.models.usercode import file_of, guarded

FEWEST_RESAMPLES = 200
"""Fewer than these give no useful percentile interval, so no limit goes below."""


class Evidence(Protocol):
    """The outputs of one model on ``n`` samples, in order, as one metric sees them."""

    @property
    def n(self) -> int:
        """Number of samples."""

    @property
    def max_resamples(self) -> int:
        """Number of bootstrap resamples that takes about a second."""

    def score(self) -> float:
        """Return the metric on all samples; raise TrialError where it is not a finite number."""

    def score_at(self, indices: np.ndarray) -> float:
        """Return the metric on samples ``indices`` [m], repeats allowed; NaN where undefined."""

    def scores_at(self, indices: np.ndarray) -> np.ndarray:
        """Return the metric for every row of ``indices`` [r, m]: float64 [r], NaN undefined."""


def finite(name: str, value: float) -> float:
    """Return ``value``, or raise TrialError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise TrialError(f"metric {name} is {value}")
    return value


@dataclass(frozen=True, eq=False)
class StatisticsEvidence:
    """Per-sample statistics [n, k] with the functions that score them.

    ``point`` scores [n, k]. For many resamples at once there is either ``of_totals`` ([r, m] → [r],
    of sums over samples of ``terms`` [n, m], dense or sparse) or ``of_samples`` ([r, n, k] → [r]).
    """

    name: str
    stats: np.ndarray
    point: Callable[[np.ndarray], float]
    of_totals: Callable[[np.ndarray], np.ndarray] | None
    terms: Callable[[np.ndarray], Any]
    of_samples: Callable[[np.ndarray], np.ndarray] | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.stats)

    @property
    def max_resamples(self) -> int:
        """Number of bootstrap resamples that takes about a second."""
        # Measured: sums cost some 15 ns a resampled sample, ranks twenty times as much.
        budget = 50_000_000 if self.of_totals is not None else 2_000_000
        return max(FEWEST_RESAMPLES, budget // self.n)

    @cached_property
    def _terms(self) -> Any:
        return self.terms(self.stats)

    def score(self) -> float:
        """Return the metric on all samples; raise TrialError where it is not a finite number."""
        return finite(self.name, self.point(self.stats))

    def score_at(self, indices: np.ndarray) -> float:
        """Return the metric on the samples ``indices`` [m]; NaN where undefined."""
        return float(self.point(self.stats[indices]))

    def scores_at(self, indices: np.ndarray) -> np.ndarray:
        """Return the metric for every row of ``indices`` [r, m]: float64 [r]."""
        if self.of_totals is not None:
            return self.of_totals(_counts(indices, self.n) @ self._terms)
        assert self.of_samples is not None
        return self.of_samples(self.stats[indices])


def _counts(indices: np.ndarray, n: int) -> np.ndarray:
    """Return how often each of ``n`` samples occurs in each row of ``indices``: [r, n]."""
    rows = len(indices)
    flat = (indices + n * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * n).reshape(rows, n).astype(np.float64)


def stack(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the statistics of all batches as one [n, k]; short rows are filled up with NaN."""
    if not parts:
        raise TrialError(f"metric {name} got no outputs")
    width = max(part.shape[1] for part in parts)
    padded = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts
    ]
    return np.concatenate(padded)


@dataclass(frozen=True, eq=False)
class FunctionEvidence:
    """Outputs and targets, on the CPU, with the user's function of both."""

    name: str
    outputs: Any
    targets: Any
    function: Callable[[Any, Any], Any]

    @property
    def n(self) -> int:
        """Number of samples."""
        return batch_size(self.outputs)

    @property
    def max_resamples(self) -> int:
        """Number of bootstrap resamples: a fixed number, for a user's function may be slow."""
        return FEWEST_RESAMPLES

    def score(self) -> float:
        """Return the function's value; raise TrialError where it fails or is not finite."""
        return finite(self.name, self._call(self.outputs, self.targets))

    def score_at(self, indices: np.ndarray) -> float:
        """Return the function's value on the samples ``indices`` [m]; NaN where it fails."""
        try:
            return self._call(take(self.outputs, indices), take(self.targets, indices))
        except TrialError:
            # A resample may hold one class only, where e.g. an AUC is undefined.
            return math.nan

    def scores_at(self, indices: np.ndarray) -> np.ndarray:
        """Return the function's value for every row of ``indices`` [r, m]: float64 [r]."""
        return np.array([self.score_at(row) for row in indices])

    def _call(self, outputs: Any, targets: Any) -> float:
        def failed(reason: str) -> TrialError:
            return TrialError(f"metric {self.name} failed: {reason}")

        with guarded(failed, file_of(self.function)):
            value = self.function(outputs, targets)
        return as_float(f"metric {self.name}", value)


def as_float(what: str, value: Any) -> float:
    """Return a user's number (float, NumPy scalar, one-element tensor) as a float.

    Raises TrialError for anything else, with ``what`` returned it and the type that it has.
    """
    single = isinstance(value, torch.Tensor | np.ndarray) and np.prod(value.shape) == 1
    if single or isinstance(value, int | float | np.number):
        try:
            return float(value.item() if single else value)
        except (TypeError, ValueError):
            pass
    shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
    raise TrialError(f"{what} returned {type(value).__name__}{shape}, not one number")


def function_evidence(
    name: str, function: Callable[[Any, Any], Any], batches: Iterable[tuple[Any, Any]]
) -> FunctionEvidence:
    """Return all batches' outputs and targets, joined.

    Batches that can not be joined (outputs padded to unlike lengths) become a list of samples.
    Targets may be None in every batch: the function then gets None.
    """
    pairs = [(to_device(outputs, "cpu"), to_device(targets, "cpu")) for outputs, targets in batches]
    if not pairs:
        raise TrialError(f"metric {name} got no outputs")
    try:
        for outputs, targets in pairs:
            sizes = (batch_size(outputs), None if targets is None else batch_size(targets))
            if sizes[1] not in (None, sizes[0]):
                raise TrialError(f"metric {name}: {sizes[0]} outputs for {sizes[1]} targets")
    except TaskError as error:
        raise TrialError(f"metric {name}: outputs can not be split into samples: {error}") from None
    outputs, targets = (_join([pair[side] for pair in pairs]) for side in (0, 1))
    return FunctionEvidence(name, outputs, targets, function)


def _join(trees: list[Any]) -> Any:
    joined = concat(trees)
    if joined is not None or all(tree is None for tree in trees):
        return joined
    return [_sample(tree, i) for tree in trees for i in range(batch_size(tree))]


def _sample(tree: Any, i: int) -> Any:
    """Return sample ``i`` without the batch dimension."""
    if isinstance(tree, torch.Tensor):
        return tree[i] if tree.ndim else tree
    if isinstance(tree, list):
        return tree[i]
    if isinstance(tree, dict):
        return {key: _sample(part, i) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_sample(part, i) for part in tree)
    return tree
