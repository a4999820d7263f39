"""A search from beginning to end, and the resumption of one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from torch import nn

from autoquant.errors import StudyError, UserError
from autoquant.models.data import make_splits
from autoquant.models.files import LoadedModel, of_module, sha256_of
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task
from autoquant.models.usercode import interruptible
from autoquant.optimize.callbacks import Reporter, Silent
from autoquant.optimize.result import SearchResult
from autoquant.optimize.stages import run_study
from autoquant.samplers import registry
from autoquant.selection.schedule import Schedule
from autoquant.session.costs import (
    check_latency,
    price,
    saved_costs,
)
from autoquant.session.preflight import preflight
from autoquant.session.session import Session, choose_device, open_session
from autoquant.spec.options import Options, check, check_budget, parse_size
from autoquant.spec.space import SearchSpace
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
from autoquant.study.ledger import Ledger, StudyTaken
from autoquant.study.opening import (
    check_out,
    check_size,
    header_of_study,
    make_goal,
    new_name,
)
from autoquant.study.places import Places
from autoquant.study.source import Source, space_file
from autoquant.study.storage import Storage


def search(
    model: nn.Module | str | os.PathLike[str],
    task: Task | str | os.PathLike[str],
    *,
    space: SearchSpace | str | Path = "default",
    max_drop: str | float | None = None,
    bits: float | None = None,
    size: str | None = None,
    trials: int | str | None = None,
    timeout: float | None = None,
    sampler: str | BaseSampler = registry.DEFAULT,
    study: str | None = None,
    storage: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    prune: bool = True,
    seed: int = 0,
    memory: str | None = None,
    out: str | os.PathLike[str] = ".",
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
    max_latency: str | None = None,
    objective: str | None = None,
) -> SearchResult:
    """Find the best recipe for ``model`` and write it to ``out``/recipe.yaml.

    A file of that name that was edited, or is not autoquant's, is refused at the beginning; one
    that is edited while the search runs is left, and the recipe goes beside it (``recipe_path``).

    ``model`` is a module, which is left as it is, or a model file; ``task`` a Task or a task file;
    ``space`` a search space, the name of one, or its file. Without a budget the answer is the
    smallest model that loses at most ``max_drop`` (None: "1%"); with ``bits`` or ``size``, the best
    metric within it. ``max_latency`` ("20ms", or "60%" of the float model's) limits the time for
    one batch of the task's data, and ``objective`` (size, bits, latency, bitops) says what is made
    small under ``max_drop``. ``trials`` is a number, or "auto" for as many as it takes; ``timeout``
    is in seconds, from now on, and covers everything, the confirmation too; ``memory`` ("512MB",
    "0") is what results of layers may take so that they are not computed again, None for 2 GiB or a
    quarter of what is free. Raises UserError, in one line, on anything the user can mend.
    """
    own = None if isinstance(sampler, str) else sampler
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    options = Options(
        None if max_drop is None else str(max_drop),
        bits,
        size,
        trials,
        timeout,
        name,
        device,
        seed,
        max_latency,
        objective,
        backend,
        prune,
        memory,
    )
    # Before the task runs, which may change the working directory.
    place, folder = Storage.parse(storage), Path(os.path.abspath(out))
    chosen = space if isinstance(space, SearchSpace) else SearchSpace.load(space)
    source = Source(
        "" if isinstance(model, nn.Module) else str(model),
        None if isinstance(task, Task) else str(task),
        trust_pickle=trust_pickle,
        space=None if isinstance(space, SearchSpace) else space_file(space),
    )
    if not isinstance(task, Task):
        task = source.load_task()
    loaded = of_module(model) if isinstance(model, nn.Module) else source.load(task)
    return start(
        loaded, task, source, chosen, options, study, place, folder, own, reporter or Silent()
    )


@interruptible()
def start(
    loaded: LoadedModel,
    task: Task,
    source: Source,
    space: SearchSpace,
    options: Options,
    study: str | None,
    storage: Storage,
    out: Path,
    own: BaseSampler | None,
    reporter: Reporter,
    began: float | None = None,
) -> SearchResult:
    """Check everything, create the study, and run it; nothing is written before all is checked.

    ``out`` is absolute. A study without a name gets the model's, with a number where that is taken.
    ``began`` is when the command did, on the clock of ``time.monotonic``: now, unless given.
    """
    began = time.monotonic() if began is None else began
    check(options)
    parse_max_drop(options.most_drop)
    if options.size is not None:
        parse_size(options.size, 1)
    if own is None:
        registry.check(options.sampler)
    check_out(out, source)
    Ledger.check_free(study or new_name(loaded.name, storage), storage)
    session = open_session(
        loaded, task, choose_device(options.device), backend=options.backend, say=reporter.say
    )
    spaces = space.resolve(session.prepared.sites)
    numel = {s.name: s.numel for s in session.prepared.sites}
    check_budget(options.bits, spaces, numel, session.sizes.rest_weights)
    check_size(options.size, session, spaces)
    reporter.say("preflight")
    found = preflight(session, spaces)
    price(session, spaces, options, reporter.say)
    found = replace(found, latency=check_latency(session, spaces, options))
    reporter.preflight(found)
    goal = make_goal(session, options, found)
    schedule = _schedule(session, options, began)
    if schedule is not None and schedule.left < schedule.least:
        needed = time.monotonic() - began + schedule.least
        raise UserError(
            f"--timeout {options.timeout:g}s: loading and checking took "
            f"{time.monotonic() - began:.1f} s, a trial and its confirmation take about "
            f"{schedule.least:.1f} s more; give {math.ceil(1.5 * needed)}s or more"
        )

    def header(name: str) -> Mapping[str, Any]:
        places = Places.of(source, out, storage, name)
        beginning = header_of_study(
            session, loaded, task, source, space, options, found, goal, places
        )
        return beginning.plain() | {SEEN: seen_samples(session.splits)}

    ledger = _create(study, loaded.name, storage, header)
    return run_study(ledger, session, spaces, goal, options, out, own, reporter, began, schedule)


def _create(
    study: str | None, model: str, storage: Storage, header: Callable[[str], Mapping[str, Any]]
) -> Ledger:
    while True:
        name = study or new_name(model, storage)
        try:
            return Ledger.create(name, storage, header(name))
        except StudyTaken:  # where nobody asked for that name, another one does as well
            if study is not None:
                raise


def _schedule(
    session: Session, options: Options, began: float, *, again: bool = False
) -> Schedule | None:
    """Return the schedule of a search with a --timeout, None without."""
    if options.timeout is None:
        return None
    return Schedule(session, began + options.timeout, again=again)


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
    options = header.options
    if trials is not None or timeout is not None:
        options = replace(options, trials=trials, timeout=timeout)
    if memory is not None:
        options = replace(options, memory=memory)
    check(options)
    if sampler is None and options.sampler not in registry.names():
        raise StudyError(
            f"study {name} was begun with a sampler of one's own ({options.sampler}): "
            "go on with autoquant.resume(sampler=…)"
        )
    notes = check_versions(name, header.versions, accept_changes)
    source = saved_source(header, place, model, task, data)
    target = header.places.find_out(place, name) if target is None else target
    check_out(target, source)
    task = task if isinstance(task, Task) else saved_task(name, source)
    compare(name, "task", header.task, task.sha256, accept_changes)
    if isinstance(model, nn.Module):
        loaded = of_module(model)
        compare(name, "model", header.model.sha256, loaded.sha256, accept_changes)
    elif source.model:
        if not Path(source.model).exists():
            raise StudyError(
                f"study {name}: its model is gone: {source.model}; say where it is: --model FILE"
            )
        found = sha256_of(Path(source.model))
        compare(name, "model", header.model.sha256, found, accept_changes)
        loaded = source.load(task)
    else:
        raise StudyError(
            f"study {name} is of a module in Python: go on with autoquant.resume(model=…)"
        )
    space = saved_space(name, header, source.space, accept_changes)
    reporter.say("reading the data")
    seen = ledger.header.get(SEEN, "")
    splits = check_data(name, make_splits(task), header, seen, accept_changes)
    session = open_session(
        loaded,
        task,
        choose_device(options.device),
        backend=options.backend,
        say=reporter.say,
        splits=splits,
    )
    if [s.name for s in session.prepared.sites] != [s.name for s in header.sites]:
        raise StudyError(
            f"study {name}: the model has other layers than when the study began; start a new study"
        )
    spaces = space.resolve(session.prepared.sites)
    reporter.say("preflight")
    flight = preflight(session, spaces)
    check_float(name, header, flight, accept_changes)
    saved_costs(session, header.costs)
    reporter.preflight(replace(flight, notes=(*flight.notes, *notes)))
    goal = make_goal(session, options, flight)
    places = Places.of(source, target, place, name)
    if places != header.places:
        ledger.note(places=places.plain())
    if (more := seen_samples(splits, seen)) != seen:
        ledger.note(**{SEEN: more})
    schedule = _schedule(session, options, began, again=True)
    return run_study(
        ledger, session, spaces, goal, options, target, sampler, reporter, began, schedule, worker
    )
