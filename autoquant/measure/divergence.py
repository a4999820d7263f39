"""How far a model's outputs are from the float model's, which are kept to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoquant.errors import TrialError
from autoquant.measure.decoding import Steps, decoded, divergences
from autoquant.models.evidence import Evidence
from autoquant.models.metrics import METRICS, MetricInfo
from autoquant.models.sample_statistics import float_leaves

KEEP_BYTES = 1 << 30
"""Most bytes of float outputs that are kept to compare quantized ones with."""


@dataclass(frozen=True)
class Distance:
    """How far a model's outputs are from the float model's, sample by sample, as ``metric`` says.

    The float model's own outputs stand for the targets.
    """

    metric: MetricInfo
    evidence: Evidence


class FloatOutputs:
    """What the float model gave on each split, and the scores that it decoded by."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[Any]] = {}
        self._steps: dict[str, list[Steps]] = {}

    def keep(
        self, split: str, index: int, outputs: Any, given: Sequence[Any], *, needed: bool
    ) -> None:
        """Keep the outputs of batch ``index``, and the scores ``given`` that it was decoded by.

        As long as they fit, or are ``needed``; without the first ones none are of use.
        """
        kept = self._outputs.setdefault(split, [])
        if len(kept) == index:
            used = sum(bytes_of(o) for o in kept) + bytes_of(outputs)
            if used <= KEEP_BYTES or needed:
                kept.append(outputs)
        steps = self._steps.setdefault(split, [])
        if len(steps) == index and given and _decides(outputs):
            found = decoded(given, outputs)
            if found is not None and sum(s.bytes for s in steps) + found.bytes <= KEEP_BYTES:
                steps.append(found)

    def clear(self) -> None:
        """Forget everything: the splits have changed."""
        self._outputs.clear()
        self._steps.clear()

    def of(self, split: str) -> list[Any]:
        """Return the outputs of the first batches, as many as were kept."""
        return self._outputs.get(split, [])

    def decodes(self, split: str, index: int) -> bool:
        """Return whether the scores of batch ``index`` are known."""
        return len(self._steps.get(split, ())) > index

    def divergence(
        self, split: str, outputs: Sequence[Any], given: Sequence[Any], *, classes: bool
    ) -> tuple[float | None, Distance | None]:
        """Return how far the ``outputs`` of the first batches are, None where it can't be said.

        The Kullback-Leibler divergence for ``classes``, noise over signal for other tensors, and
        for what is decoded already that of the scores it was decoded by, ``given``, else the share
        that differs: of the tokens of sequences, of samples.
        """
        shared = list(zip(outputs, self.of(split), strict=False))
        if not shared:
            return None, None
        if not all(_comparable(o, f) for o, f in shared):
            found = self._by_steps(split, given)
            return _disagreement(shared) if found is None else (found.evidence.score(), found)
        scores = isinstance(shared[0][0], Tensor) and shared[0][0].dim() == 2
        name = "kl" if classes and scores else "noise_to_signal"
        distance = _distance(name, shared)
        return distance.evidence.score(), distance

    def _by_steps(self, split: str, given: Sequence[Any]) -> Distance | None:
        """Return the divergence of the scores that were decoded; None where they do not compare."""
        steps = self._steps.get(split, [])
        if len(steps) < len(self.of(split)):
            return None
        parts = [divergences(s, g) for s, g in zip(steps, given, strict=False)]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        metric = METRICS.get("kl")
        return Distance(metric, metric.of_statistics(known))


def bytes_of(outputs: Any) -> int:
    """Return about how many bytes outputs take."""
    if isinstance(outputs, Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, dict):
        return sum(map(bytes_of, outputs.values()))
    if isinstance(outputs, list | tuple):
        return sum(map(bytes_of, outputs))
    return 64


def _comparable(a: Any, b: Any) -> bool:
    """Return whether the floating-point tensors of two outputs pair off; there is one or more."""
    try:
        pairs = float_leaves(a, b)
    except TrialError:  # lists whose samples differ in shape
        return False
    same = all(x.is_floating_point() and x.shape == y.shape and x.dim() for x, y in pairs)
    return bool(pairs) and same and len({len(x) for x, _ in pairs}) == 1


def _distance(name: str, pairs: list[tuple[Any, Any]]) -> Distance:
    metric = METRICS.get(name)
    return Distance(metric, metric.evidence(pairs))


def _disagreement(pairs: list[tuple[Any, Any]]) -> tuple[float | None, Distance | None]:
    """Return the share of decisions in which two models differ; None for anything else.

    Far less noisy than the difference of their metrics, in which most samples are the same noise
    on both sides. Never 0: that no sample of n differs says that less than about 1/n does.
    """
    samples = sum(len(f) for _, f in pairs if isinstance(f, list | Tensor) and _decides(f))
    if not samples or not all(_decides(o) and _decides(f) for o, f in pairs):
        return None, None
    if any(type(o) is not type(f) or len(o) != len(f) for o, f in pairs):
        return None, None
    distance = None
    if all(isinstance(item, list | tuple) for _, f in pairs for item in f):
        distance = _distance("token_error_rate", pairs)
        found = distance.evidence.score()
    elif isinstance(pairs[0][1], Tensor):
        if any(o.shape != f.shape for o, f in pairs):
            return None, None
        found = sum(float((o != f).double().reshape(len(f), -1).mean(1).sum()) for o, f in pairs)
        found /= samples
    else:
        found = sum(a != b for o, f in pairs for a, b in zip(o, f, strict=True)) / samples
    return max(found, 0.5 / samples), distance


def _decides(outputs: Any) -> bool:
    """Return whether outputs are decisions: integers, strings, or sequences of them."""
    if isinstance(outputs, Tensor):
        return outputs.dim() > 0 and not outputs.is_floating_point() and not outputs.is_complex()
    if not isinstance(outputs, list):
        return False
    return all(
        isinstance(item, int | str)
        or (isinstance(item, list | tuple) and all(isinstance(t, int | str) for t in item))
        for item in outputs
    )
