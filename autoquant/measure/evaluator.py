"""Measuring one model on one split of the task's data."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from autoquant.errors import OutOfMemory, TrialError, UserError
from autoquant.kernels.reference import full_float32
from autoquant.measure.decoding import scoring
from autoquant.measure.divergence import Distance, FloatOutputs
from autoquant.measure.outputs import fingerprint
from autoquant.measure.programs import Programs
from autoquant.measure.reuse import Reuse
from autoquant.measure.scored import Scored
from autoquant.measure.staging import Staging
from autoquant.models.data import Splits, batch_size, concat, take, to_device
from autoquant.models.evidence import Evidence, as_float
from autoquant.models.metrics import (
    METRICS,
    Metric,
    MetricInfo,
    drop,
    model_metric,
    resolve_metric,
)
from autoquant.models.task import Task, outputs_of, run_forward
from autoquant.models.usercode import guarded

T = TypeVar("T")

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

Watch = Callable[[int, int], None]
"""Told (samples done, samples in all) after each batch."""


@dataclass(frozen=True)
class Reading:
    """What one pass of a model over one split gave: the ``value`` of a ``metric``.

    ``evidence`` is None for a task that only has ``evaluate(model)``. ``divergence`` says how far
    the outputs are from the float model's, None where they can't be compared; ``distance`` says it
    sample by sample, where there is a metric for that. ``stopped`` is true where the pass was ended
    early, on the first ``samples`` samples.
    """

    metric: MetricInfo
    value: float
    samples: int
    evidence: Evidence | None
    divergence: float | None
    seconds: float
    stopped: bool = False
    distance: Distance | None = None

    @property
    def by_classes(self) -> bool:
        """Whether the model's outputs are taken for scores of classes."""
        return _by_classes(self.metric)


def _by_classes(metric: MetricInfo) -> bool:
    return metric.name in ("accuracy", "top5", "f1", "kl")


@dataclass(frozen=True)
class Bar:
    """What a candidate has to reach: to lose at most ``limit`` against ``rival`` (None: the float
    model). One that is surely beyond it (``Scored.hopeless``), by the paired difference, sample
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

    Each reading says by which metric. The model is whatever is passed in: the same code
    measures the float model, candidates, and a model that was loaded back. With ``reuse``, what a
    candidate has in common with earlier ones is not computed again, with ``programs`` the model is
    replayed as it was recorded (which goes before reuse); readings are the same.
    ``scorer`` is the model's last layer, where that is known: of a model that decodes the
    likeliest of its scores, those are compared and not what was decoded.
    """

    def __init__(self, task: Task, splits: Splits, device: torch.device) -> None:
        self.task = task
        self.splits = splits
        self.device = device
        self.reuse: Reuse | None = None
        self.programs: Programs | None = None
        self.say: Callable[[str], None] = lambda _: None
        self._pieces = 1
        self._float: dict[str, Reading] = {}
        self._outputs = FloatOutputs()
        self._staging = Staging(device)
        self.scorer: nn.Module | None = None
        self._few: Any = None
        self._metric: Metric | None = None

    @property
    def confirms(self) -> bool:
        """Whether the task has data that the search does not see."""
        return self.task.evaluate is None or self.task.evaluate_confirm is not None

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Return the raw outputs of ``model`` on one batch of inputs."""
        with full_float32(self.device):
            return run_forward(self.task, model, to_device(inputs, self.device))

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """Return the outputs that metrics take, of one batch; TrialError where the code fails."""
        return self._outputs_of(model, inputs)

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
                with contextlib.suppress(UserError, TrialError), torch.no_grad():
                    self._outputs_of(model, part)
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
            self._float[split] = self._in_pieces(
                lambda: self._read(model, split, baseline=True), split
            )
        return self._float[split]

    def kept_outputs(self, split: str) -> list[Any]:
        """Return what the float model gave on the first batches of a split, as many as are kept."""
        return self._outputs.of(split)

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
        return self._in_pieces(lambda: self._read_fast(model, split, bar, watch), split)

    def _in_pieces(self, read: Callable[[], Reading], split: str) -> Reading:
        """Return a reading; where memory is too small for whole batches, of smaller pieces."""
        before = self._pieces
        most = max((batch_size(inputs) for inputs, _ in getattr(self.splits, split)), default=1)
        while True:
            try:
                found = read()
            except OutOfMemory:
                if self._pieces >= most:
                    self._pieces = before
                    raise
                self._pieces *= 2
                continue
            if self._pieces > before:
                self.say(f"out of memory: batches are run in {self._pieces} pieces from here on")
            return found

    def _read_fast(self, model: nn.Module, split: str, bar: Bar | None, watch: Watch) -> Reading:
        """Return the reading, replayed or reused where that is possible and there is room."""
        if self._replays(model):
            return self._replayed(model, split, bar, watch)
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

    def _replays(self, model: nn.Module) -> bool:
        """Return whether ``model`` runs by recorded programs."""
        return self.programs is not None and model is self.programs.model

    def _replayed(self, model: nn.Module, split: str, bar: Bar | None, watch: Watch) -> Reading:
        """Return the reading by recorded programs; without them where these take too much room."""
        assert self.programs is not None
        start = time.perf_counter()
        try:
            return self._read(model, split, bar=bar, watch=watch)
        except OutOfMemory:
            self.programs.switch_off("there is too little memory")
            self._staging.clear()
        reading = self._read(model, split, bar=bar, watch=watch)
        return replace(reading, seconds=time.perf_counter() - start)

    def _reusing(
        self, model: nn.Module, split: str, batch: int | None
    ) -> contextlib.AbstractContextManager[None]:
        """Return what to run a batch in; None is all the data that ``evaluate`` reads."""
        if self._replays(model):
            assert self.programs is not None
            return self.programs.batch()
        if self.reuse is None or model is not self.reuse.model:
            return contextlib.nullcontext()
        return self.reuse.batch((split, batch), by_content=batch is None)

    def _surely(self, model: nn.Module, split: str, batch: int | None, run: Callable[[], T]) -> T:
        """Return what ``run`` gives, reused or replayed where that is sure to be the same."""
        with self._reusing(model, split, batch):
            found = run()
        if self._replays(model):
            assert self.programs is not None
            if self.programs.doubted():
                with self.programs.paused():
                    return run()
        return found

    def _scored(
        self, model: nn.Module, inputs: Any, scorer: nn.Module | None
    ) -> tuple[Any, list[Any]]:
        """Return the outputs of one batch, on the CPU, and the scores that they were decoded by."""
        if self._pieces == 1:
            with scoring(scorer) as given:
                outputs = self._outputs_of(model, self._staging.of(inputs))
                return to_device(outputs, "cpu"), given
        rows = np.array_split(np.arange(batch_size(inputs)), self._pieces)
        parts = [
            to_device(self._outputs_of(model, take(inputs, part)), "cpu")
            for part in rows
            if len(part)
        ]
        whole = concat(parts)
        if whole is None:
            raise TrialError(
                "out of memory, and the outputs of a batch's pieces don't fit together"
            )
        return whole, []  # scores of pieces are not those of a batch

    def drop(self, split: str, value: float) -> float:
        """Return how much worse ``value`` is than the float model's metric on ``split``."""
        base = self._float[split]
        return drop(base.metric, base.value, value)

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
            value = self._surely(model, split, None, lambda: self._call(function, model))
            seconds = time.perf_counter() - start
            return Reading(model_metric(self.task), value, 0, None, None, seconds)
        batches = getattr(self.splits, split)
        total = self.splits.samples[split]
        scored: Scored | None = None
        scores: list[Any] = []
        done = 0
        stopped = False
        with torch.no_grad():
            for i, (inputs, targets) in enumerate(batches):
                scorer = self.scorer if baseline or self._outputs.decodes(split, i) else None
                outputs, given = self._surely(
                    model, split, i, functools.partial(self._scored, model, inputs, scorer)
                )
                if baseline:
                    self._outputs.keep(split, i, outputs, given, needed=self._compares)
                else:
                    scores.append(given)
                if scored is None:
                    scored = Scored(self._metric_of(outputs), self._outputs.of(split))
                scored.add(outputs, targets)
                del outputs
                done += batch_size(inputs)
                watch(done, total)
                if bar is not None and done < total and self._hopeless(split, scored, bar):
                    stopped = True
                    break
        assert scored is not None  # no split that is read is without a batch
        evidence = scored.evidence()
        divergence, distance = None, None
        if not baseline:
            divergence, distance = self._outputs.divergence(
                split, scored.outputs, scores, classes=_by_classes(scored.metric)
            )
        seconds = time.perf_counter() - start
        return Reading(
            metric=scored.metric,
            value=evidence.score(),
            samples=done,
            evidence=evidence,
            divergence=divergence,
            seconds=seconds,
            stopped=stopped,
            distance=distance,
        )

    def _metric_of(self, outputs: Any) -> Metric:
        """Return the task's metric; where it has none, what suits the first outputs of all."""
        if self._metric is None:
            self._metric = resolve_metric(self.task, outputs)
        return self._metric

    def _hopeless(self, split: str, scored: Scored, bar: Bar) -> bool:
        """Return whether a candidate is surely beyond ``bar`` by what was seen of it so far."""
        return scored.hopeless(bar.limit, bar.rival or self._float[split].evidence)

    def _outputs_of(self, model: nn.Module, inputs: Any) -> Any:
        with self._guarded("forward"):
            return outputs_of(self.run(model, inputs))

    def _call(self, function: Callable[[nn.Module], float], model: nn.Module) -> float:
        with self._guarded("evaluate"), torch.no_grad(), full_float32(self.device):
            value = as_float("evaluate", function(model))
        if not math.isfinite(value):
            raise TrialError(f"evaluate returned {value}")
        return value

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Run the user's ``what``: TrialError where it fails, OutOfMemory where memory does."""
        with guarded(lambda reason: TrialError(f"{what} failed: {reason}"), self.task.source):
            try:
                yield
            except OUT_OF_MEMORY as error:
                raise out_of_memory(error) from error

    @property
    def _compares(self) -> bool:
        """Whether the metric may compare with the float model's outputs."""
        named = self.task.metric
        return named is None or (isinstance(named, str) and METRICS.get(named).reference)
