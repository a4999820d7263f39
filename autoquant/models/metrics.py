"""Metrics by name or by the user's function, and how much of one a recipe may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from autoquant.errors import UserError
from autoquant.models import sample_statistics as per_sample
from autoquant.models import scores
from autoquant.models.direction import name_of
from autoquant.models.evidence import (
    Evidence,
    StatisticsEvidence,
    function_evidence,
    stack,
)
from autoquant.registry import Registry

if TYPE_CHECKING:
    from autoquant.models.task import Task

Array = np.ndarray


class MetricInfo(Protocol):
    """What a number means: enough to compare two of them."""

    @property
    def name(self) -> str:
        """The metric's name, for people."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""

    @property
    def bounded(self) -> bool:
        """Whether it is a fraction such as accuracy, of which 1% is one point (0.01)."""

    @property
    def reference(self) -> bool:
        """Whether it compares with the float model's outputs, which then stand for targets."""


class Metric(MetricInfo, Protocol):
    """A metric of outputs and targets."""

    def evidence(self, batches: Iterable[tuple[Any, Any]]) -> Evidence:
        """Return what is needed to score ``batches`` of (outputs, targets); read once, lazily."""

    def per_sample_loss(self, evidence: Evidence) -> Array | None:
        """Return a loss a sample [n], smaller is better; None where the metric has none."""


def _identity(stats: Array) -> Array:
    return stats


@dataclass(frozen=True)
class StatisticMetric:
    """A metric that follows from per-sample statistics [n, k].

    ``of_totals`` ([r, m] → [r]) scores sums over samples of ``terms`` ([n, k] → [n, m]), or
    ``of_samples`` ([r, n, k] → [r]) the samples themselves, for many resamples at once. ``point``
    ([n, k] → float) is the same by the library that defines it, where one does. ``loss``
    ([n, k] → [n]) is set where the metric decomposes over samples. ``right_or_wrong`` says that the
    statistics are how many positions are right and how many count.
    """

    name: str
    higher_is_better: bool
    bounded: bool
    statistics: Callable[[Any, Any], Array]
    of_totals: Callable[[Array], Array] | None = None
    terms: Callable[[Array], Any] = _identity
    of_samples: Callable[[Array], Array] | None = None
    point: Callable[[Array], float] | None = None
    loss: Callable[[Array], Array] | None = None
    reference: bool = False
    right_or_wrong: bool = False

    def score(self, stats: Array) -> float:
        """Return the metric of samples with statistics [n, k]; NaN where it is undefined."""
        if self.point is not None:
            return float(self.point(stats))
        assert self.of_totals is not None
        return float(self.of_totals(stats.sum(axis=0, keepdims=True))[0])

    def evidence(self, batches: Iterable[tuple[Any, Any]]) -> StatisticsEvidence:
        """Return the statistics of ``batches``; raise TrialError where outputs do not fit."""
        return self.of_statistics([self.statistics(o, t) for o, t in batches])

    def of_statistics(self, parts: Sequence[Array]) -> StatisticsEvidence:
        """Return the evidence of batches whose statistics [n, k] are known."""
        return StatisticsEvidence(
            name=self.name,
            stats=stack(self.name, parts),
            point=self.score,
            of_totals=self.of_totals,
            terms=self.terms,
            of_samples=self.of_samples,
        )

    def per_sample_loss(self, evidence: Evidence) -> Array | None:
        """Return a loss a sample [n], smaller is better; None where the metric has none."""
        if self.loss is None or not isinstance(evidence, StatisticsEvidence):
            return None
        return self.loss(evidence.stats)


@dataclass(frozen=True)
class FunctionMetric:
    """The user's own function of all outputs and all targets of a split."""

    function: Callable[[Any, Any], Any]
    higher_is_better: bool
    bounded: bool = False
    reference: bool = False

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.function)

    def evidence(self, batches: Iterable[tuple[Any, Any]]) -> Evidence:
        """Return the outputs and targets of ``batches``, on the CPU."""
        return function_evidence(self.name, self.function, batches)

    def per_sample_loss(self, evidence: Evidence) -> Array | None:
        """Return None: a function of all samples says nothing about one."""
        return None


@dataclass(frozen=True)
class ModelMetric:
    """The number that the user's ``evaluate(model)`` returns; it has no evidence."""

    name: str
    higher_is_better: bool
    bounded: bool = False
    reference: bool = False


METRICS: Registry[StatisticMetric] = Registry("metric")
"""Every metric that a task may name."""

for _metric in (
    StatisticMetric(
        "accuracy",
        True,
        True,
        per_sample.correct,
        scores.ratio,
        loss=scores.miss,
        right_or_wrong=True,
    ),
    StatisticMetric(
        "top5",
        True,
        True,
        per_sample.correct_in_top5,
        scores.ratio,
        loss=scores.miss,
        right_or_wrong=True,
    ),
    StatisticMetric(
        "f1",
        True,
        True,
        per_sample.predicted_and_true,
        scores.f1_of_totals,
        scores.f1_terms,
        point=scores.f1,
    ),
    StatisticMetric("mse", False, False, per_sample.squared_error, scores.ratio, loss=scores.share),
    StatisticMetric(
        "mae", False, False, per_sample.absolute_error, scores.ratio, loss=scores.share
    ),
    StatisticMetric(
        "pearson",
        True,
        True,
        per_sample.value_pairs,
        point=scores.pearson,
        of_samples=scores.correlation,
    ),
    StatisticMetric(
        "spearman",
        True,
        True,
        per_sample.value_pairs,
        point=scores.spearman,
        of_samples=scores.rank_correlation,
    ),
    StatisticMetric(
        "perplexity", False, False, per_sample.token_loss, scores.perplexity, loss=scores.share
    ),
    StatisticMetric(
        "word_error_rate", False, True, per_sample.word_errors, scores.ratio, loss=scores.share
    ),
    StatisticMetric(
        "token_error_rate", False, True, per_sample.token_errors, scores.ratio, loss=scores.share
    ),
    StatisticMetric(
        "kl", False, False, per_sample.divergence, scores.ratio, loss=scores.share, reference=True
    ),
    StatisticMetric(
        "noise_to_signal",
        False,
        False,
        per_sample.noise_and_signal,
        scores.noise_ratio,
        loss=scores.share,
        reference=True,
    ),
):
    METRICS.register(_metric.name)(_metric)


def resolve_metric(task: Task, example_outputs: Any) -> Metric:
    """Return the task's metric; without one, fidelity to the float model.

    Fidelity is ``kl`` where ``example_outputs`` (one batch of the float model's, after
    ``outputs_of``) look like classifier logits: 2-D floating point, two classes or more, rows not
    of unit length (those are embeddings). Otherwise it is ``noise_to_signal``, the inverse of the
    signal-to-quantization-noise ratio: SQNR in dB = −10 · log10(noise_to_signal). Both are 0 for
    the float model. Raises UserError for a task that has only ``evaluate``.
    """
    if task.evaluate is not None:
        raise UserError(f"{task.source}: evaluate(model) is the metric; it has no outputs to score")
    if isinstance(task.metric, str):
        return METRICS.get(task.metric)
    if task.metric is not None:
        return FunctionMetric(task.metric, task.higher_is_better is not False)
    return METRICS.get("kl" if _looks_like_logits(example_outputs) else "noise_to_signal")


def _looks_like_logits(outputs: Any) -> bool:
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
        return False
    if not outputs.is_floating_point() or outputs.shape[1] < 2:
        return False
    lengths = outputs.detach().float().norm(dim=1)
    return not bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2))


def model_metric(task: Task) -> ModelMetric:
    """Return the metric of a task that has ``evaluate``; higher is better unless it says not."""
    return ModelMetric("evaluate", task.higher_is_better is not False)


def drop(metric: MetricInfo, float_value: float, quantized_value: float) -> float:
    """Return how much worse the quantized value is, in the metric's unit; negative is better."""
    worse = float_value - quantized_value
    return worse if metric.higher_is_better else -worse


@dataclass(frozen=True)
class MaxDrop:
    """The drop that a user accepts: a share (``percent``) or a number in the metric's unit."""

    value: float
    percent: bool

    def absolute(self, metric: MetricInfo, float_value: float) -> float:
        """Return it in the metric's unit.

        1% is one point (0.01) of a bounded or a reference metric, and 1% of |float_value| of any
        other. Raises UserError for a number that would allow a bounded metric to lose everything.
        """
        if not self.percent:
            if metric.bounded and self.value >= 1:
                raise UserError(
                    f"max drop {self} is the whole range of {metric.name}: "
                    f"write {self}% for points, or a number below 1"
                )
            return self.value
        scale = 1.0 if metric.bounded or metric.reference else abs(float_value)
        return self.value * scale

    def __str__(self) -> str:
        return f"{self.value * 100:.12g}%" if self.percent else f"{self.value:.12g}"


def parse_max_drop(text: str | float) -> MaxDrop:
    """Return the drop that "1%" or 0.01 stands for; raise UserError for anything senseless."""
    words = str(text).strip()
    percent = words.endswith("%")
    try:
        value = float(words.removesuffix("%"))
    except ValueError:
        value = math.nan
    if isinstance(text, bool) or not math.isfinite(value):
        raise UserError(f"max drop {words!r} is no number: write a share such as 1% or 0.01")
    if value < 0:
        raise UserError(
            f"max drop {words!r} is negative: write how much worse is allowed, 0 or more"
        )
    if percent and value > 100:
        raise UserError(f"max drop {words!r} is above 100%: write a share such as 1%")
    return MaxDrop(value / 100 if percent else value, percent)
