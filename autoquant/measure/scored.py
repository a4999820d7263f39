"""What a metric makes of a pass over a split, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoquant.models.evidence import Evidence
from autoquant.models.metrics import Metric, StatisticMetric

FEWEST_TO_STOP = 64
"""Samples after which a candidate may be stopped."""
STOP_ERRORS = 3.0
"""Standard errors by which a candidate must be beyond the limit to be stopped early."""


class Scored:
    """The batches that a metric has seen; no batch is looked at twice.

    Of a metric that follows from statistics of samples these are kept, of any other the outputs and
    targets themselves. ``kept`` are the float model's outputs on the first batches: a metric that
    compares takes them for the targets. ``outputs`` are held as long as there are such to compare
    with, and are None beyond.
    """

    def __init__(self, metric: Metric, kept: Sequence[Any]) -> None:
        self.metric = metric
        self.outputs: list[Any] = []
        self._kept = kept
        self._targets: list[Any] = []
        self._statistics: list[np.ndarray] = []

    def add(self, outputs: Any, targets: Any) -> None:
        """Take the next batch; TrialError where its outputs do not fit the metric."""
        index, metric = len(self.outputs), self.metric
        self.outputs.append(outputs)
        if not isinstance(metric, StatisticMetric):
            self._targets.append(targets)
            return
        wanted = self._kept[index] if metric.reference else targets
        self._statistics.append(metric.statistics(outputs, wanted))
        if index >= len(self._kept):  # nothing is compared with it
            self.outputs[index] = None

    def evidence(self) -> Evidence:
        """Return the evidence of all batches so far."""
        if isinstance(self.metric, StatisticMetric):
            return self.metric.of_statistics(self._statistics)
        return self.metric.evidence(list(zip(self.outputs, self._targets, strict=True)))

    def hopeless(self, limit: float, rival: Evidence | None) -> bool:
        """Return whether the paired loss against ``rival`` is surely beyond ``limit`` already.

        False for a metric that is not bounded, or says nothing about one sample.
        """
        if not self.metric.bounded or rival is None:
            return False
        theirs = self.metric.per_sample_loss(rival)
        if theirs is None:
            return False
        ours = self.metric.per_sample_loss(self.evidence())
        if ours is None or len(ours) < FEWEST_TO_STOP:
            return False
        worse = ours - theirs[: len(ours)]
        error = float(worse.std(ddof=1)) / math.sqrt(len(worse))
        return float(worse.mean()) - STOP_ERRORS * error > limit
