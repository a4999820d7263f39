"""Going on with a study from its storage alone."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from optuna.samplers import BaseSampler
from torch import nn

from autoquant.errors import StudyError
from autoquant.models.data import Splits, make_splits
from autoquant.models.files import LoadedModel, of_module, sha256_of
from autoquant.models.task import Task
from autoquant.models.usercode import interruptible
from autoquant.optimize.callbacks import Reporter, Silent
from autoquant.optimize.opened import OpenStudy, make_schedule
from autoquant.optimize.result import SearchResult
from autoquant.optimize.stages import run_study
from autoquant.samplers import registry
from autoquant.session.costs import saved_costs
from autoquant.session.preflight import preflight
from autoquant.session.session import Session, choose_device, open_session
from autoquant.spec.options import Options, check
from autoquant.study.checks import (
    SEEN,
    check_data,
    check_float,
    check_versions,
    compare,
    saved_source,
    saved_space,
    saved_task,
    seen_samples,
)
from autoquant.study.header import Header
from autoquant.study.ledger import Ledger
from autoquant.study.opening import check_out, make_goal
from autoquant.study.places import Places
from autoquant.study.source import Source
from autoquant.study.storage import Storage


@interruptible()
def resume(
    study: str | None = None,
    *,
    storage: str | None = None,
    trials: int | str | None = None,
    timeout: float | None = None,
    memory: str | None = None,
    accept_changes: bool = False,
    model: nn.Module | str | os.PathLike[str] | None = None,
    task: Task | str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    sampler: BaseSampler | None = None,
    reporter: Reporter | None = None,
    worker: int = 0,
    began: float | None = None,
) -> SearchResult:
    """Go on with a study from its storage alone.

    Several processes may work on one study at a time, each with another ``worker`` number from 0
    on: it makes their proposals differ. ``trials``, ``timeout`` and ``memory`` replace the study's
    own; ``timeout`` counts from ``began``, on the clock of ``time.monotonic``: now, unless given.
    ``model``, ``task`` (or ``data``, a data file) and ``out`` say where these are now, and the
    study keeps that; a study of a module or Task in Python needs them again.

    Raises StudyError where the model, the task, its data, the space, the float model's metric or
    this release is not what the study began with, unless ``accept_changes``; data that were
    searched by before are then not confirmed with.
    """
    began = time.monotonic() if began is None else began
    reporter = reporter or Silent()
    # Before the task runs, which may change the working directory.
    place = Storage.parse(storage)
    target = None if out is None else Path(os.path.abspath(out))
    ledger = Ledger.open(study, place)
    name, header = ledger.name, Header.read(ledger.header, ledger.name)
    options = _options(header.options, trials, timeout, memory)
    _check_sampler(name, options, sampler)
    notes = check_versions(name, header.versions, accept_changes)
    source = saved_source(header, place, model, task, data)
    target = header.places.find_out(place, name) if target is None else target
    check_out(target, source)
    task = task if isinstance(task, Task) else saved_task(name, source)
    compare(name, "task", header.task, task.sha256, accept_changes)
    loaded = _load(name, header, source, model, task, accept_changes)
    space = saved_space(name, header, source.space, accept_changes)
    reporter.say("reading the data")
    seen = ledger.header.get(SEEN, "")
    splits = check_data(name, make_splits(task), header, seen, accept_changes)
    session = _open(name, header, options, loaded, task, splits, reporter)
    spaces = space.resolve(session.prepared.sites)
    reporter.say("preflight")
    flight = preflight(session, spaces)
    check_float(name, header, flight, accept_changes)
    saved_costs(session, header.costs)
    reporter.preflight(replace(flight, notes=(*flight.notes, *notes)))
    goal = make_goal(session, options, flight)
    _note(ledger, header, Places.of(source, target, place, name), splits)
    opened = OpenStudy(
        ledger=ledger,
        session=session,
        spaces=spaces,
        goal=goal,
        options=options,
        out=target,
        own=sampler,
        reporter=reporter,
        began=began,
        schedule=make_schedule(session, options, began, again=True),
        worker=worker,
    )
    return run_study(opened)


def _options(
    saved: Options, trials: int | str | None, timeout: float | None, memory: str | None
) -> Options:
    """Return the study's options with what is given now in their place; UserError as ``check``."""
    if trials is not None or timeout is not None:
        saved = replace(saved, trials=trials, timeout=timeout)
    if memory is not None:
        saved = replace(saved, memory=memory)
    check(saved)
    return saved


def _check_sampler(study: str, options: Options, own: BaseSampler | None) -> None:
    """Raise StudyError where a sampler of the user's own is needed again."""
    if own is None and options.sampler not in registry.names():
        raise StudyError(
            f"study {study} was begun with a sampler of one's own ({options.sampler}): "
            "go on with autoquant.resume(sampler=…)"
        )


def _load(
    study: str, header: Header, source: Source, model: object, task: Task, accept: bool
) -> LoadedModel:
    """Return the study's model; StudyError where it is gone, or another and not accepted."""
    if isinstance(model, nn.Module):
        loaded = of_module(model)
        compare(study, "model", header.model.sha256, loaded.sha256, accept)
        return loaded
    if not source.model:
        raise StudyError(
            f"study {study} is of a module in Python: go on with autoquant.resume(model=…)"
        )
    if not Path(source.model).exists():
        raise StudyError(
            f"study {study}: its model is gone: {source.model}; say where it is: --model FILE"
        )
    compare(study, "model", header.model.sha256, sha256_of(Path(source.model)), accept)
    return source.load(task)


def _open(
    study: str,
    header: Header,
    options: Options,
    loaded: LoadedModel,
    task: Task,
    splits: Splits,
    reporter: Reporter,
) -> Session:
    """Return the session of a resumed study; StudyError where its model has other layers."""
    session = open_session(
        loaded,
        task,
        choose_device(options.device),
        backend=options.backend,
        say=reporter.say,
        splits=splits,
        transforms=header.transforms,
        rest=options.rest,
    )
    if [s.name for s in session.prepared.sites] != [s.name for s in header.sites]:
        raise StudyError(
            f"study {study}: the model has other layers than when the study began; "
            "start a new study"
        )
    return session


def _note(ledger: Ledger, header: Header, places: Places, splits: Splits) -> None:
    """Note in the study where its files are now, and which samples it sees from here on."""
    seen = ledger.header.get(SEEN, "")
    if places != header.places:
        ledger.note(places=places.plain())
    if (more := seen_samples(splits, seen)) != seen:
        ledger.note(**{SEEN: more})
