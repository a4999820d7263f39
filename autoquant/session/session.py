"""A session: one model with its task, prepared to take recipes and to be measured."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoquant.errors import OutOfMemory, UserError
from autoquant.kernels.engine import make_engine
from autoquant.kernels.reference import full_float32
from autoquant.measure.cost import CostModel
from autoquant.measure.evaluator import (
    OUT_OF_MEMORY,
    Bar,
    Evaluator,
    Reading,
    Watch,
    out_of_memory,
)
from autoquant.measure.programs import Programs
from autoquant.measure.reuse import Reuse
from autoquant.measure.reuse_check import check
from autoquant.measure.size import SizeModel, float_bytes
from autoquant.measure.staging import free_bytes
from autoquant.methods.applier import Applier
from autoquant.methods.learned import read_learned
from autoquant.models.data import Splits, batch_size, make_splits
from autoquant.models.exported import move
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.models.usercode import describe, guarded
from autoquant.nn.calibrate import SiteStatistics, calibrate
from autoquant.nn.convert import Prepared, prepare, use_channels_last
from autoquant.nn.rest import check_float32, watched
from autoquant.nn.sites import Site
from autoquant.nn.transforms import transform_as, transforms_of
from autoquant.quant.weight import QuantizedWeight
from autoquant.sensitivity.fisher import Candidates, Sensitivity, measure_sensitivity
from autoquant.session.surgery import Untouched
from autoquant.spec.goal import Measurement
from autoquant.spec.needs import Need, needs_of
from autoquant.spec.recipe import FLOAT32, ModelIdentity, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.techniques import Correction

REUSE_BYTES = 2 << 30
"""Most bytes that results of layers are kept in, unless told otherwise."""

WORTH_REUSING = 0.3
"""Seconds that the float model takes on the search split, from which results are kept."""

Say = Callable[[str], None]
Measured = tuple[Measurement, Reading, dict[str, SiteRecipe]]
"""What measuring a recipe gave: the measurement, the reading, and the calibrated sites."""


@dataclass
class Session:
    """What a search, ``evaluate`` and ``apply`` work on."""

    identity: ModelIdentity
    task: Task
    splits: Splits
    device: torch.device
    prepared: Prepared
    statistics: Mapping[str, SiteStatistics]
    applier: Applier
    evaluator: Evaluator
    sizes: SizeModel
    costs: CostModel
    _measured: dict[object, tuple[object, Measured]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model, as the current recipe has it."""
        return self.prepared.model

    def measure(
        self,
        sites: Mapping[str, SiteRecipe],
        split: str,
        *,
        bar: Bar | None = None,
        watch: Watch = lambda done, total: None,
    ) -> Measured:
        """Measure a recipe on one split; return also the reading and the calibrated sites.

        What was measured to its end before, by the same arithmetic, is not measured again. Raises
        TrialError where the candidate, or the user's code on it, fails.
        """
        key = (split, self.prepared.engine.fast, frozenset(sites.items()))
        rule = None if bar is None else (bar.name, bar.limit)
        kept = self._measured.get(key)
        # A bar that it was not held against may stop it: in a resumed search it would.
        if kept is not None and (rule is None or kept[0] == rule):
            return kept[1]
        found = self._measure(sites, split, bar, watch)
        if not found[1].stopped:
            self._measured[key] = rule, found
        return found

    def _measure(
        self, sites: Mapping[str, SiteRecipe], split: str, bar: Bar | None, watch: Watch
    ) -> Measured:
        try:
            done = self._apply(sites)
        except OUT_OF_MEMORY as error:
            raise out_of_memory(error) from error
        reading = self.evaluator.read(self.model, split, bar=bar, watch=watch)
        drop = self.evaluator.drop(split, reading.value)
        loss = max(drop, 1e-9) if reading.divergence is None else reading.divergence
        costs = self.costs.of(done)
        measurement = Measurement(
            reading.value,
            drop,
            loss,
            costs.average_weight_bits,
            costs.size_bytes,
            reading.seconds,
            costs.latency,
            costs.bit_operations,
        )
        return measurement, reading, done

    def _apply(self, sites: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
        reuse = self.evaluator.reuse
        try:
            return self.applier.apply(sites)
        except OUT_OF_MEMORY:
            if reuse is None or not reuse.store.bytes:
                raise
            reuse.shrink()
        return self.applier.apply(sites)

    def reuse(self, memory: int | None = None, say: Say = lambda _: None) -> Reuse | None:
        """From here on compute no layer twice on the same data, in ``memory`` bytes.

        None bytes are 2 GiB, or a quarter of what is free where that is less. The model is tried
        first: ``say`` is told, in one line, why one can't have its results reused, and None is
        returned. Raises TrialError where the user's code fails on the float model.
        """
        budget = default_memory(self.device) if memory is None else memory
        found = Reuse(self.prepared, budget, say)
        whole = self.task.evaluate is not None
        self.applier.to_float()
        inputs = None if whole else self.evaluator.few(self.model)
        try:
            fine = check(
                found,
                self.applier,
                lambda: self.evaluator.observe(self.model, inputs),
                "check",
                by_content=whole,
            )
        except OutOfMemory:
            fine = False
            found.switch_off("there is too little memory")
        self.evaluator.reuse = found if fine else None
        return self.evaluator.reuse

    def record(self, say: Say = lambda _: None) -> bool:
        """From here on run the model by recorded programs; return whether this device records.

        ``say`` is told, in one line each, which modules can't be recorded and why.
        """
        recorder = self.prepared.engine.recorder
        if recorder is not None:
            self.evaluator.programs = Programs(self.prepared, recorder, say)
        return recorder is not None

    @property
    def repays_reuse(self) -> bool:
        """Whether keeping books of results saves more than it costs, as where runs take time."""
        return self.baseline("search").seconds >= WORTH_REUSING

    def exact_seconds(self, sites: Mapping[str, SiteRecipe]) -> float | None:
        """Return what a pass of the reference over the search split takes, told by one batch.

        None for a task that only has ``evaluate(model)``. Raises TrialError like ``measure``.
        """
        if not self.splits.search:
            return None
        inputs, _ = self.splits.search[0]
        with self.prepared.engine.reference(), torch.no_grad():
            self._apply(sites)
            start = time.perf_counter()
            self.evaluator.outputs(self.model, inputs)
            seconds = time.perf_counter() - start
        return seconds * self.splits.samples["search"] / batch_size(inputs)

    @contextlib.contextmanager
    def without_reuse(self) -> Iterator[None]:
        """Keep nothing of what is measured inside: where no later candidate is like it."""
        reuse = self.evaluator.reuse
        with contextlib.nullcontext() if reuse is None else reuse.paused():
            yield

    def sensitivity(
        self, candidates: Mapping[str, Candidates], seconds: float = math.inf
    ) -> Sensitivity | str:
        """Return what each candidate does to the outputs on calibration data, or why not.

        On fewer samples where not all fit into ``seconds``. Gradients are float32, and so are all
        layers meanwhile, whatever the rest is.
        """
        if self.task.evaluate is not None and not self.splits.calibrate:
            return "the task gives no calibration data"
        classes = self.baseline("search").by_classes
        with self.prepared.in_float32():
            return measure_sensitivity(
                self.applier,
                self.evaluator.outputs,
                [b for b in self.splits.calibrate if b is not None],
                candidates,
                classes=classes,
                seconds=seconds,
            )

    def quantized(
        self, site: Site, scheme: WeightScheme, correction: Correction
    ) -> QuantizedWeight:
        """Return a site's weight by ``scheme``, kept for whoever asks next."""
        held = self.applier.held(site.name, SiteRecipe(scheme, None, correction))
        assert held is not None
        return held.quantized

    def keep(self, needs: Mapping[str, frozenset[Need]]) -> None:
        """Keep of what calibration saw what recipes may still need, and free the rest."""
        kept = {name: s.keep(needs[name]) for name, s in self.statistics.items()}
        self.statistics = self.applier.statistics = kept

    def recalibrate(self, statistics: Mapping[str, SiteStatistics]) -> None:
        """Go by other statistics from now on: nothing that was made or measured before is valid."""
        self.statistics = statistics
        self.applier = Applier(self.prepared, statistics, self.applier.learned)
        self._measured.clear()

    def baseline(self, split: str) -> Reading:
        """Return the float model's reading on ``split``, measured before it was prepared.

        From here on the model is in float.
        """
        self.applier.to_float()
        return self.evaluator.baseline(self.model, split)

    def recipe(self, sites: Mapping[str, SiteRecipe]) -> Recipe:
        """Return calibrated ``sites`` as a recipe of this model."""
        transforms = transforms_of(self.prepared)
        rest = FLOAT32 if self.prepared.rest is None else self.prepared.rest.name
        return Recipe(
            sites, self.identity, None, self.prepared.folded, transforms=transforms, rest=rest
        )


def default_memory(device: torch.device) -> int:
    """Return the bytes that kept results may take on ``device``, unless told otherwise."""
    return min(REUSE_BYTES, free_bytes(device) // 4)


def _lowered(prepared: Prepared, name: str, tour: Callable[[nn.Module], None]) -> Prepared:
    """Return a model with its rest in a lower format; UserError where it does not run in that."""
    prepared = prepared.lowered(name)
    assert prepared.rest is not None
    failure: UserError | None = None
    with watched(prepared.model, prepared.rest) as calls, torch.no_grad():
        try:
            tour(prepared.model)
        except UserError as error:
            failure = error
    if calls.alone:
        raise UserError(
            f"--rest {name}: the task calls a part of the model by itself, {calls.alone[0]}; only "
            "what goes through the model's own forward can be rounded: --rest float32"
        ) from failure
    if failure is not None:
        cause = failure.__cause__
        why = str(failure) if cause is None else describe(cause)
        raise UserError(
            f"{calls.last} does not run with the rest in {name}: {why}; --rest float32 does"
        ) from failure
    return prepared


def choose_device(name: str) -> torch.device:
    """Return the device of ``auto``, ``cpu`` or ``cuda``; UserError where there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = "this torch is a CPU build" if torch.version.cuda is None else "no GPU is visible"
        raise UserError(f"--device cuda: {built}; use --device cpu or auto")
    return torch.device(name)


def open_session(
    loaded: LoadedModel,
    task: Task,
    device: torch.device,
    *,
    recipe: Recipe | None = None,
    backend: str = "auto",
    say: Say = lambda _: None,
    splits: Splits | None = None,
    baselines: tuple[str, ...] = ("search", "confirm"),
    transforms: Mapping[str, str] | None = None,
    rest: str = FLOAT32,
) -> Session:
    """Prepare a model for its task: read the data, fold, find the sites, calibrate.

    The baseline of the splits in ``baselines`` is measured before anything is done to the model,
    and what is done is held against it. A session of one ``recipe`` repeats its folds instead of
    looking for them, and calibrates what it needs alone; without one, all that any recipe may need.
    ``splits`` are the task's data, where they have been read already. ``transforms`` are those of a
    study that goes on, None for the recipe's, or none. ``rest`` is the format of what stays in
    float, that of a ``recipe`` where there is one: the model takes it after it was held against
    the untouched one, and before activations are calibrated, which are then those of the model
    that is measured.
    """
    rest = rest if recipe is None else recipe.rest
    if splits is None:
        say("reading the data")
        splits = make_splits(task)
    evaluator = Evaluator(task, splits, device)
    evaluator.say = say
    model = move(loaded.module, device)
    if rest != FLOAT32:
        check_float32(model, rest)
    example = evaluator.example()

    def run(m: nn.Module, inputs: Any = None) -> Any:
        if inputs is None and task.evaluate is None:
            inputs = example
        with guarded(failed, task.source):
            if inputs is None:
                assert task.evaluate is not None
                with full_float32(device):
                    return task.evaluate(m)
            return evaluator.run(m, inputs)

    def failed(reason: str) -> UserError:
        if "does not require grad" in reason:
            reason += (
                "; models are run without gradients: give the task a forward(model, inputs) "
                "that calls the model under torch.enable_grad()"
            )
        return UserError(f"the float model fails on the task's data: {reason}")

    size = float_bytes(model)
    say("running the float model")
    untouched = Untouched(evaluator, run, model)
    known = tuple(s for s in baselines if s == "search" or evaluator.confirms)
    untouched.measure(model, known, None if recipe is None else recipe.folded)
    say("finding the layers")
    engine = make_engine(device, backend)
    prepared = prepare(model, untouched.tour, untouched.pairs, engine, whole=False)
    if any(site.layer == "Conv2d" for site in prepared.sites):
        use_channels_last(model)
    untouched.check(prepared, fixed=recipe is not None, splits=("calibrate", "search"))
    prepared.folds.settle()
    if rest != FLOAT32:
        prepared = _lowered(prepared, rest, untouched.tour)
    if recipe is not None:
        transform_as(prepared, recipe.transforms)
    elif transforms:
        transform_as(prepared, transforms)
    say("calibrating")
    needs = None if recipe is None else {n: needs_of(site) for n, site in recipe.sites.items()}
    order: dict[str, None] = {}
    for name, slot in prepared.slots.items():
        slot.read = functools.partial(order.setdefault, name)
    try:
        statistics = calibrate(prepared, splits.calibrate or (None,), run, needs)
    finally:
        for slot in prepared.slots.values():
            slot.read = None
    if recipe is None:
        prepared = prepared.used(order, {name: s.reached for name, s in statistics.items()})
        statistics = {site.name: statistics[site.name] for site in prepared.sites}
    sizes = SizeModel(prepared, size)
    return Session(
        ModelIdentity(loaded.name, loaded.sha256),
        task,
        splits,
        device,
        prepared,
        statistics,
        Applier(prepared, statistics, None if recipe is None else read_learned(recipe)),
        evaluator,
        sizes,
        CostModel(sizes),
    )
