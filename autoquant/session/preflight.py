"""Finding in seconds, before the first trial, what would otherwise fail after hours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from autoquant.errors import TaskError, TrialError, UserError
from autoquant.measure.evaluator import Reading
from autoquant.methods.applier import CACHE_BYTES
from autoquant.models.chance import chance_level
from autoquant.models.evidence import FunctionEvidence
from autoquant.models.metrics import drop
from autoquant.models.rereading import check_rereads
from autoquant.models.sample_statistics import class_count
from autoquant.models.usercode import guarded
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.convert import restored
from autoquant.nn.float_parts import FloatPart
from autoquant.nn.leaves import difference, frozen, leaves, leaves_differ
from autoquant.nn.sites import Site
from autoquant.session.costs import LatencyReport
from autoquant.session.kernel_check import check_kernels
from autoquant.session.repeats import first_to_differ
from autoquant.session.session import Session
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SiteSpace
from autoquant.spec.uniform import uniform

REPEATS = 1e-4
"""Largest difference of two runs of one model, relative to the largest number of a kind."""


@dataclass(frozen=True)
class Preflight:
    """What was found: the float metric, the layers, and what stays in float with its share.

    ``parameters`` counts buffers that are weights too. ``warnings`` are lines on what makes a
    search pointless, though nothing fails.
    """

    metric: str
    value: float
    samples: Mapping[str, int]
    sites: tuple[Site, ...]
    float_parts: tuple[FloatPart, ...]
    parameters: int
    seconds: float
    notes: tuple[str, ...]
    latency: LatencyReport | None = None
    higher_is_better: bool = True
    warnings: tuple[str, ...] = ()

    def share(self, part: FloatPart) -> float:
        """Return the share of the model's parameters that ``part`` holds."""
        return part.parameters / max(self.parameters, 1)


def preflight(session: Session, spaces: Mapping[str, SiteSpace]) -> Preflight:
    """Check a session; UserError names what would fail.

    The data are the same when they are read again; the float metric is finite and repeats; a
    uniform recipe is measured, written, loaded back and gives the same outputs; the fast kernels
    equal the reference on every layer; the largest candidate fits in memory.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    check_rereads(session.task, session.splits)
    try:
        reading = session.baseline("search")
        _check_repeats(session, reading)
    except TrialError as error:
        raise TaskError(f"{session.task.source}: on the float model: {error}") from error
    check_kernels(session, spaces)
    _check_round_trip(session, spaces)
    _check_memory(session, max(process.memory_info().rss - before, 0))
    held = session.prepared
    parameters = sum(s.numel for s in held.sites) + sum(p.parameters for p in held.float_parts)
    return Preflight(
        reading.metric.name,
        reading.value,
        session.splits.samples,
        session.prepared.sites,
        session.prepared.float_parts,
        parameters,
        reading.seconds,
        (*session.splits.notes, *session.prepared.engine.notes, *_of_the_model(session)),
        higher_is_better=reading.metric.higher_is_better,
        warnings=_no_better_than_chance(session, reading),
    )


def _of_the_model(session: Session) -> tuple[str, ...]:
    """Return notes on the rest, and on how many layers have smoothed or rotated inputs."""
    rest = session.prepared.rest
    said = () if rest is None else (f"what stays in float is computed in {rest.name}",)
    return said + _transformed(session)


def _transformed(session: Session) -> tuple[str, ...]:
    kinds = [t.kind for s in session.prepared.slots.values() if (t := s.transform) is not None]
    return tuple(
        f"the inputs of {kinds.count(kind)} of {len(session.prepared.sites)} layers are {kind}"
        for kind in sorted(set(kinds))
    )


def _no_better_than_chance(session: Session, base: Reading) -> tuple[str, ...]:
    """Return a warning where the float model knows no more than a constant answer does."""
    metric, pairs = base.metric, session.splits.search
    if not pairs or not isinstance(session.task.metric, str):
        return ()
    classes = None
    if metric.name == "perplexity":
        with torch.no_grad():
            classes = class_count(
                session.evaluator.outputs(session.model, pairs[0][0]), pairs[0][1]
            )
    chance = chance_level(metric.name, [targets for _, targets in pairs], classes)
    if chance is None or drop(metric, base.value, chance.value) > 0:
        return ()
    return (
        f"the float model's {metric.name} is {base.value:.4g}, no better than {chance.answer} "
        f"({chance.value:.4g}): is it trained, and are its inputs prepared as it was trained on?",
    )


def _run(session: Session, model: torch.nn.Module, inputs: Any) -> Any:
    """Return the outputs of one batch; TrialError where the user's code fails."""
    with (
        guarded(lambda reason: TrialError(f"forward failed: {reason}"), session.task.source),
        torch.no_grad(),
    ):
        return session.evaluator.run(model, inputs)


def _check_repeats(session: Session, base: Reading) -> None:
    source, value = session.task.source, base.value
    example = session.evaluator.few(session.model)
    if session.task.evaluate is not None:
        # Made ready for quantization the model rounds otherwise than the one that gave ``value``.
        value, again = (session.evaluator.read(session.model, "search").value for _ in range(2))
        if abs(again - value) > REPEATS * max(abs(value), 1e-12):
            raise TaskError(
                f"{source}: evaluate(model) returned {value:g} and then {again:g} on the same "
                "float model; seed what it draws at random"
            )
        return
    if isinstance(base.evidence, FunctionEvidence):
        again = base.evidence.score()
        if abs(again - value) > REPEATS * max(abs(value), 1e-12):
            raise TaskError(
                f"{source}: metric {base.metric.name} returned {value:g} and then {again:g} on the "
                "same outputs and targets; seed what it draws at random"
            )
    # A model may write into what it returned before.
    first = frozen(_run(session, session.model, example))
    second = leaves(_run(session, session.model, example))
    what = leaves_differ(first, second, REPEATS)
    if what is not None:
        where = first_to_differ(
            session.model, lambda: _run(session, session.model, example), REPEATS
        )
        raise TaskError(
            f"{source}: the float model gives different outputs for the same inputs: {what}; "
            f"{where}"
        )


def _check_round_trip(session: Session, spaces: Mapping[str, SiteSpace]) -> None:
    """Write a uniform recipe's model, load it back, and compare outputs."""
    sites = uniform(spaces, 8)
    try:
        done = session.applier.apply(sites)
        example = session.evaluator.few(session.model)
        with session.prepared.engine.reference():  # which is what a saved model computes
            expected = None if example is None else _run(session, session.model, example)
        deployed = session.applier.deploy(done)
        # The copy stands for the architecture that the user has: converted, then given back.
        architecture = restored(session.prepared)
        recipe = session.recipe(done)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_archive(deployed, recipe, path)
            loaded = load_archive(path, architecture)
        if example is None:
            return
        found = _run(session, loaded, example)
    except TrialError as error:
        raise UserError(f"a uniform 8-bit recipe fails: {error}") from error
    except OSError as error:
        raise UserError(f"a uniform 8-bit recipe can't be written: {error}") from error
    what = difference(expected, found, REPEATS)
    if what is not None:
        raise UserError(
            "a uniform 8-bit recipe gives other outputs after it was written and loaded back: "
            f"{what}{_state(session, sites, example, expected)}"
        )


def _state(session: Session, sites: Mapping[str, SiteRecipe], example: Any, expected: Any) -> str:
    """Return in words whether the model that was not written gives the same outputs again."""
    session.applier.apply(sites)
    try:
        with session.prepared.engine.reference():
            again = difference(expected, _run(session, session.model, example), REPEATS)
            if again is None:
                return ""
            where = first_to_differ(
                session.model, lambda: _run(session, session.model, example), REPEATS
            )
    finally:
        session.applier.to_float()
    return f"; the model itself gives other outputs when it is called again ({again}; {where})"


def _check_memory(session: Session, used: int) -> None:
    """Compare what a search may take with what is free.

    ``used`` is what the evaluation so far took; beside it a candidate may need the weights again
    (dequantized), a packed copy, and the cache of quantized weights.
    """
    sizes = session.sizes.float_size_bytes
    if session.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(session.device)
        needed = 2 * sizes + CACHE_BYTES
    else:
        free = psutil.virtual_memory().available
        needed = 2 * sizes + min(CACHE_BYTES, 8 * sizes)
    if needed > free:
        raise UserError(
            f"not enough memory: a search needs about {needed / 2**30:.1f} GiB more than the "
            f"{used / 2**30:.1f} GiB that evaluation took, and {free / 2**30:.1f} GiB are free"
        )
