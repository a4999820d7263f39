"""Measuring one model on one split of the task's data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import OutOfMemory, TrialError, UserError
from autoquant.measure.decoding import Steps, decoded, divergences, scoring
from autoquant.measure.outputs import fingerprint
from autoquant.measure.reuse import Reuse
from autoquant.models.data import Splits, batch_size, take, to_device
from autoquant.models.evidence import Evidence, as_float
from autoquant.models.metrics import METRICS, Metric, MetricInfo, drop, model_metric, resolve_metric
from autoquant.models.task import Task, outputs_of, run_forward
from autoquant.models.usercode import describe

KEEP_BYTES = 1 << 30
"""Most bytes of float outputs that are kept to compare quantized ones with."""
FEWEST_TO_STOP = 64
"""Samples after which a candidate may be stopped."""
STOP_ERRORS = 3.0
"""Standard errors by which a candidate must be beyond the limit to be stopped early."""

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

Watch = Callable[[int, int], None]
"""Told (samples done, samples in all) after each batch."""


@dataclass(frozen=True)
class Distance:
    """How far a model's outputs are from the float model's, sample by sample, as ``metric`` says.

    The float model's own outputs stand for the targets.
    """

    metric: MetricInfo
    evidence: Evidence


@dataclass(frozen=True)
class Reading:
    """What one pass of a model over one split gave.

    ``evidence`` is None for a task that only has ``evaluate(model)``. ``divergence`` says how far
    the outputs are from the float model's, None where they can't be compared; ``distance`` says it
    sample by sample, where there is a metric for that. ``stopped`` is true where the pass was ended
    early, on the first ``samples`` samples.
    """

    value: float
    samples: int
    evidence: Evidence | None
    divergence: float | None
    seconds: float
    stopped: bool = False
    distance: Distance | None = None


@dataclass(frozen=True)
class Bar:
    """What a candidate has to reach: to lose at most ``limit`` against ``rival`` (None: the float
    model). One that is beyond it by STOP_ERRORS standard errors of the paired difference, sample
    by sample, can't win and is stopped. ``name`` tells one bar from another.
    """

    limit: float
    rival: Evidence | None = None
    name: str = "float"


def out_of_memory(error: BaseException) -> OutOfMemory:
    """Return an error that says which memory was too small."""
    there = isinstance(error, torch.OutOfMemoryError)
    return OutOfMemory("out of memory on the accelerator" if there else "out of memory")


FEW = 4
"""Samples that quick checks of a model take."""


class Evaluator:
    """Runs a model over the splits of a task and scores it.

    ``metric`` is known after ``baseline``. The model is whatever is passed in: the same code
    measures the float model, candidates, and a model that was loaded back. With ``reuse``, what a
    candidate has in common with earlier ones is not computed again; readings are the same.
    ``scorer`` is the model's last layer, where that is known: of a model that decodes the
    likeliest of its scores, those are compared and not what was decoded.
    """

    def __init__(self, task: Task, splits: Splits, device: torch.device) -> None:
        self.task = task
        self.splits = splits
        self.device = device
        self.reuse: Reuse | None = None
        self.metric: MetricInfo | None = model_metric(task) if task.evaluate else None
        self._float: dict[str, Reading] = {}
        self._outputs: dict[str, list[Any]] = {}
        self.scorer: nn.Module | None = None
        self._steps: dict[str, list[Steps]] = {}
        self._few: Any = None

    @property
    def confirms(self) -> bool:
        """Whether the task has data that the search does not see."""
        return self.task.evaluate is None or self.task.evaluate_confirm is not None

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Return the raw outputs of ``model`` on one batch of inputs."""
        return run_forward(self.task, model, to_device(inputs, self.device))

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """Return the outputs that metrics take, of one batch; TrialError where the code fails."""
        return self._outputs_of(model, inputs)

    @property
    def by_classes(self) -> bool:
        """Whether outputs are taken for scores of classes; known after ``baseline``."""
        return self.metric is not None and self.metric.name in ("accuracy", "top5", "f1", "kl")

    def example(self) -> Any:
        """Return one batch of inputs, or None for a task that only has ``evaluate(model)``."""
        if self.splits.calibrate:
            return self.splits.calibrate[0]
        return self.splits.search[0][0] if self.splits.search else None

    def few(self, model: nn.Module) -> Any:
        """Return some samples of the example, where ``model`` takes so few: for quick checks.

        A model that was exported for one batch size takes no other.
        """
        if self._few is None:
            self._few = example = self.example()
            if example is not None and batch_size(example) > FEW:
                part = take(example, range(FEW))
                with contextlib.suppress(Exception), torch.no_grad():
                    self.run(model, part)
                    self._few = part
        return self._few

    def observe(self, model: nn.Module, inputs: Any) -> Any:
        """Return all that ``model`` gives on one batch, or on all that ``evaluate`` reads.

        Of the latter, the number and checksums of what the model returned on the way. Raises
        TrialError where the user's code fails.
        """
        with torch.no_grad():
            if self.task.evaluate is None:
                return self._outputs_of(model, inputs)
            returned: list[Any] = []
            hook = model.register_forward_hook(lambda *call: returned.append(fingerprint(call[2])))
            try:
                return self._call(self.task.evaluate, model), returned
            finally:
                hook.remove()

    def baseline(self, model: nn.Module, split: str) -> Reading:
        """Return the reading of the float ``model``, measured once for each split."""
        if split not in self._float:
            self._float[split] = self._read(model, split, baseline=True)
        return self._float[split]

    def read(
        self,
        model: nn.Module,
        split: str,
        *,
        bar: Bar | None = None,
        watch: Watch = lambda done, total: None,
    ) -> Reading:
        """Return the reading of a quantized ``model``; the baseline must have been measured.

        With ``bar``, a candidate that is surely below it is stopped early. Raises TrialError where
        the user's code fails or the metric is not a finite number.
        """
        reuse = self.reuse
        if reuse is None or not reuse.on:
            return self._read(model, split, bar=bar, watch=watch)
        start = time.perf_counter()
        try:
            reading = self._read(model, split, bar=bar, watch=watch)
            if reuse.on:
                return reading
        except OutOfMemory:
            reuse.shrink()
        # Without what is kept there may be room; and what showed that the model can't have its
        # results reused may have come too late for this candidate.
        with reuse.paused():
            reading = self._read(model, split, bar=bar, watch=watch)
        return replace(reading, seconds=time.perf_counter() - start)

    def _reusing(
        self, model: nn.Module, split: str, batch: int | None
    ) -> contextlib.AbstractContextManager[None]:
        """Return what to run a batch in; None is all the data that ``evaluate`` reads."""
        if self.reuse is None or model is not self.reuse.model:
            return contextlib.nullcontext()
        return self.reuse.batch((split, batch), by_content=batch is None)

    def drop(self, split: str, value: float) -> float:
        """Return how much worse ``value`` is than the float model's metric on ``split``."""
        assert self.metric is not None
        return drop(self.metric, self._float[split].value, value)

    def _read(
        self,
        model: nn.Module,
        split: str,
        *,
        baseline: bool = False,
        bar: Bar | None = None,
        watch: Watch = lambda done, total: None,
    ) -> Reading:
        start = time.perf_counter()
        if self.task.evaluate is not None:
            function = self.task.evaluate if split == "search" else self.task.evaluate_confirm
            assert function is not None
            with self._reusing(model, split, None):
                value = self._call(function, model)
            return Reading(value, 0, None, None, time.perf_counter() - start)
        batches = getattr(self.splits, split)
        total = self.splits.samples[split]
        pairs: list[tuple[Any, Any]] = []
        scores: list[Any] = []
        done = 0
        stopped = False
        with torch.no_grad():
            for i, (inputs, targets) in enumerate(batches):
                scorer = self.scorer if len(self._steps.get(split, ())) > i or baseline else None
                with self._reusing(model, split, i), scoring(scorer) as given:
                    outputs = to_device(self._outputs_of(model, inputs), "cpu")
                if baseline:
                    self._keep(split, i, outputs)
                    self._keep_steps(split, i, given, outputs)
                else:
                    scores.append(given)
                pairs.append((outputs, targets))
                done += batch_size(inputs)
                watch(done, total)
                if bar is not None and done < total and self._hopeless(split, pairs, bar):
                    stopped = True
                    break
        if self.metric is None:
            self.metric = resolve_metric(self.task, pairs[0][0])
        evidence = self._evidence(split, pairs)
        divergence, distance = (None, None) if baseline else self._divergence(split, pairs, scores)
        seconds = time.perf_counter() - start
        return Reading(evidence.score(), done, evidence, divergence, seconds, stopped, distance)

    def _outputs_of(self, model: nn.Module, inputs: Any) -> Any:
        try:
            return outputs_of(self.run(model, inputs))
        except (UserError, TrialError):
            raise
        except OUT_OF_MEMORY as error:
            raise out_of_memory(error) from error
        except Exception as error:
            raise TrialError(f"forward failed: {describe(error, self.task.source)}") from error

    def _call(self, function: Callable[[nn.Module], float], model: nn.Module) -> float:
        try:
            with torch.no_grad():
                value = as_float("evaluate", function(model))
        except (UserError, TrialError):
            raise
        except OUT_OF_MEMORY as error:
            raise out_of_memory(error) from error
        except Exception as error:
            raise TrialError(f"evaluate failed: {describe(error, self.task.source)}") from error
        if not math.isfinite(value):
            raise TrialError(f"evaluate returned {value}")
        return value

    def _keep(self, split: str, index: int, outputs: Any) -> None:
        """Keep float outputs as long as they fit; without the first ones none are of use."""
        kept = self._outputs.setdefault(split, [])
        if len(kept) != index:
            return
        used = sum(_bytes(o) for o in kept) + _bytes(outputs)
        named = self.task.metric
        needed = named is None or (isinstance(named, str) and METRICS.get(named).reference)
        if used <= KEEP_BYTES or needed:
            kept.append(outputs)

    def _keep_steps(self, split: str, index: int, given: list[Any], outputs: Any) -> None:
        """Keep the float model's scores where it decodes by them, as long as they fit."""
        kept = self._steps.setdefault(split, [])
        if len(kept) != index or not given or not _decides(outputs):
            return
        found = decoded(given, outputs)
        if found is not None and sum(s.bytes for s in kept) + found.bytes <= KEEP_BYTES:
            kept.append(found)

    def _evidence(self, split: str, pairs: list[tuple[Any, Any]]) -> Evidence:
        metric: Metric = self.metric  # type: ignore[assignment]
        if metric.reference:
            kept = self._outputs[split]
            pairs = [(o, kept[i]) for i, (o, _) in enumerate(pairs)]
        return metric.evidence(pairs)

    def _divergence(
        self, split: str, pairs: list[tuple[Any, Any]], given: list[Any]
    ) -> tuple[float | None, Distance | None]:
        """Return how far outputs are from the float model's, None where they can't be compared.

        The Kullback-Leibler divergence for classes, noise over signal for other tensors, and for
        what is decoded already that of the scores it was decoded by, ``given``, else the share that
        differs: of the tokens of sequences, of samples.
        """
        kept = self._outputs.get(split, [])
        shared = [(o, f) for (o, _), f in zip(pairs, kept, strict=False)]
        if not shared:
            return None, None
        if not all(_comparable(o, f) for o, f in shared):
            found = self._by_steps(split, given)
            return _disagreement(shared) if found is None else (found.evidence.score(), found)
        name = "kl" if self.by_classes and shared[0][0].dim() == 2 else "noise_to_signal"
        if name != "kl" and not all(bool(f.isfinite().all()) for _, f in shared):
            return None, None  # masked with −∞: no signal to compare the noise with
        distance = _distance(name, shared)
        return distance.evidence.score(), distance

    def _by_steps(self, split: str, given: list[Any]) -> Distance | None:
        """Return the divergence of the scores that were decoded; None where they do not compare."""
        steps = self._steps.get(split, [])
        if len(steps) < len(self._outputs[split]):
            return None
        parts = [divergences(s, g) for s, g in zip(steps, given, strict=False)]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        metric = METRICS.get("kl")
        return Distance(metric, metric.of_statistics(known))

    def _hopeless(self, split: str, pairs: list[tuple[Any, Any]], bar: Bar) -> bool:
        """Return whether the paired loss so far is surely beyond ``bar``."""
        metric: Metric = self.metric  # type: ignore[assignment]
        reference = bar.rival or self._float[split].evidence
        if not metric.bounded or reference is None:
            return False
        theirs = metric.per_sample_loss(reference)
        if theirs is None:
            return False
        ours = metric.per_sample_loss(self._evidence(split, pairs))
        if ours is None or len(ours) < FEWEST_TO_STOP:
            return False
        worse = ours - theirs[: len(ours)]
        error = float(worse.std(ddof=1)) / math.sqrt(len(worse))
        return float(worse.mean()) - STOP_ERRORS * error > bar.limit


def _bytes(outputs: Any) -> int:
    if isinstance(outputs, Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, dict):
        return sum(map(_bytes, outputs.values()))
    if isinstance(outputs, list | tuple):
        return sum(map(_bytes, outputs))
    return 64


def _comparable(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.is_floating_point() and a.shape == b.shape


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
