"""Finding out what a search needs to know of costs before its first trial, and what is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from autoquant.errors import TrialError, UserError
from autoquant.measure.cost import BitOperations, CostModel, count_macs
from autoquant.measure.latency import LatencyModel, site_choices
from autoquant.measure.layers import measure_latency, whole_seconds
from autoquant.measure.size import weight_bytes
from autoquant.measure.units import Run
from autoquant.models.data import batch_size, to_device
from autoquant.models.task import run_forward
from autoquant.models.usercode import guarded
from autoquant.session.session import Session
from autoquant.solvers.integer_program import solve_within
from autoquant.spec.costs import describe_seconds, layer_budget
from autoquant.spec.options import Options, parse_latency, parse_size
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SiteSpace
from autoquant.spec.uniform import uniform, widths

Sites = Mapping[str, SiteRecipe]


@dataclass(frozen=True)
class LatencyCheck:
    """What the table predicts of one recipe, and what the whole model takes, in seconds."""

    recipe: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The error of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1.0 if self.measured > 0 else 0.0

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "recipe": self.recipe,
            "predicted_seconds": self.predicted,
            "measured_seconds": self.measured,
            "error": self.error,
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> LatencyCheck:
        """Return the check that ``plain`` wrote."""
        return cls(plain["recipe"], plain["predicted_seconds"], plain["measured_seconds"])


@dataclass(frozen=True)
class LatencyReport:
    """What the preflight found of latency: the float model's, the fastest recipe's, the checks."""

    device: str
    samples: int
    float_seconds: float
    fastest: float
    checks: tuple[LatencyCheck, ...]


def batch_run(session: Session) -> tuple[Run, int]:
    """Return what runs the model on one batch of the task's data, and how many samples it has.

    A task that only has ``evaluate(model)`` runs that, on a number of samples that is not known: 0.
    """
    example = session.evaluator.example()
    task = session.task

    def safely(run: Callable[[], Any]) -> Any:
        with guarded(lambda reason: TrialError(f"forward failed: {reason}"), task.source):
            return run()

    if example is None:
        assert task.evaluate is not None
        evaluate = task.evaluate
        return lambda model: safely(lambda: evaluate(model)), 0
    inputs = to_device(example, session.device)
    return lambda model: safely(lambda: run_forward(task, model, inputs)), batch_size(example)


def price(
    session: Session, spaces: Mapping[str, SiteSpace], options: Options, say: Callable[[str], None]
) -> None:
    """Give the session the costs that ``options`` ask for, and measure what takes measuring."""
    session.applier.to_float()
    run, samples = batch_run(session)
    latency = operations = None
    try:
        if options.objective == "bitops":
            operations = count_macs(session.prepared, run)
        if options.asks_latency:
            say("timing the layers")
            latency = measure_latency(session.applier, spaces, run, session.device, samples=samples)
            for bits in widths(spaces)[:1]:
                wide = session.applier.apply(uniform(spaces, bits))
                measured = whole_seconds(session.model, run, session.device, None)
                latency = latency.fitted(wide, measured)
    except (TrialError, torch.OutOfMemoryError) as error:
        raise UserError(f"{session.task.source}: while layers are timed: {error}") from error
    session.costs = CostModel(session.sizes, latency, operations)


def check_latency(
    session: Session, spaces: Mapping[str, SiteSpace], options: Options
) -> LatencyReport | None:
    """Compare predictions with whole models; UserError where no recipe is fast enough."""
    model = session.costs.latency
    if model is None:
        return None
    fastest = _fastest(session, spaces, options, model)
    if options.max_latency is not None:
        limit = parse_latency(options.max_latency, model.float_seconds)
        if fastest is None or fastest > limit:
            raise UserError(_too_slow(options, fastest, model))
    wide = widths(spaces)
    checks = [
        check_one(session, f"uniform {bits} bits", uniform(spaces, bits))
        for bits in dict.fromkeys((*wide[:1], *wide[-1:]))
    ]
    session.applier.to_float()
    return LatencyReport(
        model.device, model.samples, model.float_seconds, fastest or 0.0, tuple(checks)
    )


def check_one(session: Session, name: str, sites: Sites) -> LatencyCheck:
    """Measure one recipe's whole model on the batch that the table is of."""
    assert session.costs.latency is not None
    done = session.applier.apply(sites)
    run, _ = batch_run(session)
    measured = whole_seconds(session.model, run, session.device, None)
    return LatencyCheck(name, session.costs.latency.seconds(done), measured)


def _fastest(
    session: Session, spaces: Mapping[str, SiteSpace], options: Options, model: LatencyModel
) -> float | None:
    """Return the seconds of the fastest recipe within the other budget; None where it has none."""
    choices = site_choices(session.prepared, spaces)
    if options.bits is None and options.size is None:
        return model.fastest(choices)
    sites = session.prepared.sites
    rows = [choices[s.name] for s in sites]
    value = [
        np.array([model.site_seconds(s.name, r) for r in row])
        for s, row in zip(sites, rows, strict=True)
    ]
    if options.bits is not None:
        weights = sum(s.numel for s in sites)
        limit = layer_budget(options.bits, weights, session.sizes.rest_weights)
        cost = [
            np.array([float(s.numel * r.weight_bits) for r in row])
            for s, row in zip(sites, rows, strict=True)
        ]
    else:
        assert options.size is not None
        sizes = session.sizes
        limit = parse_size(options.size, sizes.float_size_bytes) - float(sizes.rest)
        cost = [
            np.array([_bytes(session, s, r) for r in row])
            for s, row in zip(sites, rows, strict=True)
        ]
    chosen = solve_within(value, [(cost, limit)])
    if chosen is None:
        return None
    return model.rest + sum(float(v[i]) for v, i in zip(value, chosen, strict=True))


def _bytes(session: Session, site: Any, recipe: SiteRecipe) -> float:
    if recipe.weight is not None:
        return float(weight_bytes(site, recipe.weight))
    return float(site.numel * session.prepared.slots[site.name].parameter.element_size())


def _too_slow(options: Options, fastest: float | None, model: LatencyModel) -> str:
    budget = f"--bits {options.bits:g}" if options.bits is not None else f"--size {options.size}"
    beside = "" if options.bits is None and options.size is None else f" within {budget}"
    if fastest is None:
        return f"--max-latency {options.max_latency}: the space has no recipe{beside}"
    share = fastest / model.float_seconds
    batch = f"a batch of {model.samples}" if model.samples else "evaluate(model)"
    return (
        f"--max-latency {options.max_latency}: the space's fastest recipe{beside} takes "
        f"{describe_seconds(fastest, up=True)} for {batch}, {share:.1%} of the float model's "
        f"{describe_seconds(model.float_seconds)}; give that or more, or a space with faster "
        "choices"
    )


def saved_costs(session: Session, kept: Mapping[str, Any]) -> None:
    """Give the session the costs that a study keeps, so that its trials go on as they began."""
    latency, macs = kept.get("latency"), kept.get("macs")
    session.costs = replace(
        session.costs,
        latency=None if latency is None else LatencyModel.read(latency),
        operations=None if macs is None else BitOperations(macs),
    )


def header_of(costs: CostModel, report: LatencyReport | None) -> dict[str, Any]:
    """Return what a study keeps of its costs; nothing where none were asked for."""
    found: dict[str, Any] = {}
    if costs.latency is not None:
        found["latency"] = costs.latency.plain()
    if costs.operations is not None:
        found["macs"] = dict(costs.operations.macs)
        found["float_bit_operations"] = costs.operations.total({})
    if report is not None:
        found["latency_checks"] = [c.plain() for c in report.checks]
    return found
