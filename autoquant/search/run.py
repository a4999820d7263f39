"""A search from beginning to end, and the resumption of one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from torch import nn

from autoquant.errors import StudyError, TaskError, TrialError, UserError
from autoquant.measure.evaluator import Bar, Watch
from autoquant.models.data import make_splits
from autoquant.models.files import LoadedModel, sha256_of
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task
from autoquant.models.usercode import interruptible
from autoquant.search import samplers
from autoquant.search.checks import (
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
from autoquant.search.confirm import confirm
from autoquant.search.enough import Enough
from autoquant.search.fidelity import fidelity
from autoquant.search.finalists import finalists, incumbent
from autoquant.search.goal import Goal
from autoquant.search.header import Header
from autoquant.search.ledger import MEASURED, Ledger, StudyTaken, count
from autoquant.search.loop import Outcome, Stop, run_trials
from autoquant.search.opening import (
    RECIPE_FILE,
    check_out,
    check_size,
    header_of_study,
    make_goal,
    new_name,
)
from autoquant.search.options import AUTO, Options, check, check_budget, parse_size
from autoquant.search.params import ParameterMap
from autoquant.search.places import Places
from autoquant.search.preflight import preflight
from autoquant.search.pricing import (
    LatencyCheck,
    check_latency,
    check_one,
    price,
    saved_costs,
)
from autoquant.search.proposing import make_proposer
from autoquant.search.reporter import Reporter, Silent
from autoquant.search.result import SearchResult, Speed
from autoquant.search.schedule import Schedule
from autoquant.search.session import Session, choose_device, open_session
from autoquant.search.source import Source, of_module, space_file
from autoquant.search.storage import Storage
from autoquant.search.trials import FRONT, RECIPE, best_trial, measured
from autoquant.search.uniform import baselines
from autoquant.spec.outputs import check_target, is_signed
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.spec.recipe_file import dumps, save
from autoquant.spec.space import SearchSpace, SiteSpace

WORTH_REUSING = 0.3
"""Seconds that the float model takes on the search split, from which results are kept."""

MOST_OF_ALL = 200
"""Recipes of a space up to which a search without a number of trials tries them all."""


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
    sampler: str | BaseSampler = samplers.DEFAULT,
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
        samplers.check(options.sampler)
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
    return _run(ledger, session, spaces, goal, options, out, own, reporter, began, schedule)


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
    if sampler is None and options.sampler not in samplers.names():
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
    return _run(
        ledger, session, spaces, goal, options, target, sampler, reporter, began, schedule, worker
    )


def _run(
    ledger: Ledger,
    session: Session,
    spaces: Mapping[str, SiteSpace],
    goal: Goal,
    options: Options,
    out: Path,
    own: BaseSampler | None,
    reporter: Reporter,
    began: float,
    schedule: Schedule | None,
    worker: int = 0,
) -> SearchResult:
    mapping = ParameterMap(spaces)
    # What arithmetic rules out is never tried, but something uniform is, where it can be.
    plain = [sites for sites in baselines(spaces) if goal.affords(session.costs.of(sites))]
    most = 1 if not mapping.distributions else options.most_trials
    try:
        # Keeping books costs more than it saves where a candidate takes no time, unless asked for.
        if options.memory is not None or session.baseline("search").seconds >= WORTH_REUSING:
            session.reuse(options.memory_bytes, reporter.say)
    except TrialError as error:
        raise TaskError(f"{session.task.source}: on the float model: {error}") from error
    stop = Stop(most, schedule)
    # From here on whoever interrupts the search is told which study to resume.
    reporter.begin(ledger.name, goal, ledger.trials(), stop)
    then, sampler = make_proposer(
        ledger, session, mapping, goal, options, own, reporter, worker, schedule
    )
    proposer = samplers.Baselines(plain, mapping, then, worker)
    if options.trials == AUTO and most is None:
        gain = None if sampler is None else sampler.expected_gain
        stop = replace(stop, enough=Enough(len(plain), gain))
    # Of few recipes all are tried: no sampler does better.
    every = mapping.recipes(MOST_OF_ALL if most is None else most)
    if every is not None and own is None and mapping.distributions:
        exhaustive = samplers.Exhaustive(every, mapping, ledger.trials, worker)
        proposer = samplers.Baselines(plain, mapping, exhaustive, worker)
        stop = replace(stop, enough=exhaustive.done)
    answered = any(measured(trial) is not None for trial in ledger.trials())

    def bar() -> Bar | None:
        # However bad, one candidate is measured to its end: there must be an answer.
        if not options.prune or not answered:
            return None
        if not goal.budgeted:
            return Bar(goal.max_drop)
        best = best_trial(ledger.trials())
        if best is None:
            return None
        # Measured before, but for a search that was resumed.
        rival = session.measure(mapping.decode(best.params), "search")[1].evidence
        return None if rival is None else Bar(0.0, rival, f"trial {best.number}")

    def measure(sites: Mapping[str, SiteRecipe], watch: Watch) -> Outcome:
        nonlocal answered
        if sites in plain:
            # Few, unlike each other and all that follows, and what the sampler learns the scale
            # of losses from: nothing of them is kept, and each is measured to its end.
            with session.without_reuse():
                m, reading, done = session.measure(sites, "search", watch=watch)
            if schedule is not None:
                schedule.candidate(reading.seconds)
        else:
            m, reading, done = session.measure(sites, "search", bar=bar(), watch=watch)
        answered = answered or not reading.stopped
        if schedule is not None and not schedule.knows_exact:
            schedule.exact(_exact_seconds(session, done))
        return Outcome(m, done, reading.stopped)

    before, started = len(ledger.trials()), time.monotonic()
    session.prepared.engine.reset()
    if schedule is not None:
        schedule.begin_trials()
    done = run_trials(ledger, mapping, proposer, goal, measure, stop, reporter, session.costs.of)
    trials = ledger.trials()
    foretold = None if sampler is None else fidelity(sampler.profile, mapping, trials)
    if sampler is not None:
        ledger.note(**{FRONT: [dataclasses.asdict(point) for point in sampler.sweep(trials)]})
    speed = Speed(
        len(trials) - before,
        time.monotonic() - started,
        {
            # An accelerator computes behind the clock's back: there, calls are counted.
            name: share.seconds if session.device.type == "cpu" else float(share.calls)
            for name, share in session.prepared.engine.shares().items()
        },
    )
    skipped = [] if schedule is None else _unfinished(options, most, len(trials), done)
    reporter.say("confirming")
    candidates = finalists(trials, mapping, goal, len(plain))
    refused = sum(t.state == TrialState.PRUNED and MEASURED not in t.user_attrs for t in trials)
    if not candidates and not refused:
        raise StudyError(
            f"study {ledger.name}: no trial was completed, so there is no recipe; give more "
            "--trials or --timeout"
        )
    if not candidates or (goal.budgeted and best_trial(trials) is None):
        raise StudyError(
            f"study {ledger.name}: none of its {len(trials)} trials is within the budget; go on "
            f"with `autoquant resume {ledger.name}` and more --trials"
        )
    try:
        rival = incumbent(trials, goal, len(plain))
        with session.without_reuse():
            chosen, confirmed = confirm(
                session, mapping, goal, candidates, options.seed, rival, schedule
            )
    except TrialError as error:
        raise StudyError(f"study {ledger.name}: {error}") from error
    recipe, checks = _time_result(session, chosen.recipe, ledger.header)
    evidence, asked = recipe.evidence, options.max_drop is not None or not goal.budgeted
    path = _free(out, ledger.name)
    # The study first: `autoquant export` then has the recipe even where ``path`` can't be written.
    ledger.note(**{RECIPE: {"text": dumps(recipe), "trial": chosen.trial}})
    save(recipe, path)
    return SearchResult(
        ledger.name,
        recipe,
        path,
        chosen.holds,
        goal.max_drop,
        count(trials),
        tuple(confirmed),
        round(time.monotonic() - began, 3),
        session.device.type,
        speed,
        goal.latency,
        checks,
        done,
        foretold,
        None if evidence is None or not asked else evidence.verdict,
        () if schedule is None else (*schedule.skipped, *skipped),
    )


def _free(out: Path, study: str) -> Path:
    """Return where the recipe goes: beside one that was edited while the search ran."""
    beside = (out / f"recipe-{study}-{i}.yaml" for i in itertools.count(1))
    for path in itertools.chain([out / RECIPE_FILE], beside):
        try:
            check_target(path, is_signed)
        except UserError:
            continue
        return path
    raise AssertionError("unreachable")


def _exact_seconds(session: Session, sites: Mapping[str, SiteRecipe]) -> float | None:
    """Return what the reference takes on the search split, None where it can't be told."""
    try:
        return session.exact_seconds(sites)
    except TrialError:
        return None


def _unfinished(options: Options, most: int | None, trials: int, done: str | None) -> list[str]:
    """Return in words which trials a search was asked for that --timeout left no time for."""
    if done is not None:
        return []
    if options.trials == AUTO:
        return ["trials that might have gained something: --trials auto was not done"]
    return [] if most is None or trials >= most else [f"{most - trials} of {most} trials"]


def _time_result(
    session: Session, recipe: Recipe, header: Mapping[str, Any]
) -> tuple[Recipe, tuple[LatencyCheck, ...]]:
    """Return the result with its measured latency, where that was asked for, and all checks."""
    table, evidence = session.costs.latency, recipe.evidence
    if table is None or evidence is None:
        return recipe, ()
    done = tuple(LatencyCheck.read(row) for row in header.get("latency_checks", ()))
    found = check_one(session, "result", recipe.sites)
    latency = table.evidence(found.predicted, found.measured)
    return replace(recipe, evidence=replace(evidence, latency=latency)), (*done, found)
