"""A search from its beginning: what is asked for, all checks, and the study that comes of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from optuna.samplers import BaseSampler
from torch import nn

from autoquant.errors import UserError
from autoquant.models.files import LoadedModel, of_module
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task
from autoquant.models.usercode import interruptible
from autoquant.optimize.callbacks import Reporter, Silent
from autoquant.optimize.opened import OpenStudy, make_schedule
from autoquant.optimize.result import SearchResult
from autoquant.optimize.stages import run_study
from autoquant.samplers import registry
from autoquant.selection.schedule import Schedule
from autoquant.session.costs import check_latency, price
from autoquant.session.preflight import Preflight, preflight
from autoquant.session.session import Session, choose_device, open_session
from autoquant.session.transforms import transform_inputs
from autoquant.spec.options import AUTO, Options, check, check_budget, parse_size
from autoquant.spec.recipe import FLOAT32
from autoquant.spec.space import SearchSpace, SiteSpace
from autoquant.study.checks import SEEN, seen_samples
from autoquant.study.ledger import Ledger, StudyTaken
from autoquant.study.opening import check_out, check_size, header_of_study, make_goal, new_name
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
    tune: str = AUTO,
    rest: str = FLOAT32,
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
    quarter of what is free. ``tune`` says whether the layers of good recipes are fitted to each
    other after the trials: "layer", "none" or "auto", which is where that takes no longer than
    twice the trials. ``rest`` ("float32", "bf16") is the format of all that stays in float. Raises
    UserError, in one line, on anything the user can mend.
    """
    own = None if isinstance(sampler, str) else sampler
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    options = Options(
        max_drop=None if max_drop is None else str(max_drop),
        bits=bits,
        size=size,
        trials=trials,
        timeout=timeout,
        sampler=name,
        device=device,
        seed=seed,
        max_latency=max_latency,
        objective=objective,
        backend=backend,
        prune=prune,
        memory=memory,
        tune=tune,
        rest=rest,
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
    request = Request(
        loaded=loaded,
        task=task,
        source=source,
        space=chosen,
        options=options,
        study=study,
        storage=place,
        out=folder,
        own=own,
    )
    return start(request, reporter or Silent())


T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What a new search is asked for.

    - ``loaded``, ``task``, ``source``: the model and its task, and the files that they come from.
    - ``space``, ``options``: what is searched, and how.
    - ``study``: the name of the study. None: the model's, with a number where that is taken.
    - ``storage``: where the study is kept.
    - ``out``: the folder, absolute, that the recipe goes to.
    - ``own``: a sampler of the user's own; None for the one that the options name.
    - ``began``: when the command did, on the clock of ``time.monotonic``. None: as it is started.
    """

    loaded: LoadedModel
    task: Task
    source: Source
    space: SearchSpace
    options: Options
    study: str | None
    storage: Storage
    out: Path
    own: BaseSampler | None = None
    began: float | None = None


@interruptible()
def start(request: Request, reporter: Reporter) -> SearchResult:
    """Check everything, create the study, and run it; nothing is written before all is checked."""
    began = time.monotonic() if request.began is None else request.began
    options = request.options
    _check(request)
    session = open_session(
        request.loaded,
        request.task,
        choose_device(options.device),
        backend=options.backend,
        say=reporter.say,
        rest=options.rest,
    )
    spaces = request.space.resolve(session.prepared.sites)
    transform_inputs(session, spaces, reporter.say)
    found = _check_session(session, spaces, options, reporter)
    goal = make_goal(session, options, found)
    schedule = make_schedule(session, options, began)
    if schedule is not None:
        _check_time(schedule, options, began)

    def header(name: str) -> Mapping[str, Any]:
        places = Places.of(request.source, request.out, request.storage, name)
        beginning = header_of_study(
            session,
            request.loaded,
            request.task,
            request.source,
            request.space,
            options,
            found,
            goal,
            places,
        )
        return beginning.plain() | {SEEN: seen_samples(session.splits)}

    study = OpenStudy(
        ledger=_create(request, header),
        session=session,
        spaces=spaces,
        goal=goal,
        options=options,
        out=request.out,
        own=request.own,
        reporter=reporter,
        began=began,
        schedule=schedule,
    )
    return run_study(study)


def _check(request: Request) -> None:
    """Raise UserError on what can be seen without running the model."""
    options = request.options
    check(options)
    parse_max_drop(options.most_drop)
    if options.size is not None:
        parse_size(options.size, 1)
    if request.own is None:
        registry.check(options.sampler)
    check_out(request.out, request.source)
    _named(request, lambda name: Ledger.check_free(name, request.storage))


def _check_session(
    session: Session, spaces: Mapping[str, SiteSpace], options: Options, reporter: Reporter
) -> Preflight:
    """Return what the preflight found, with latency where it is asked for; UserError as it does.

    The session then knows what the goal may be about.
    """
    numel = {s.name: s.numel for s in session.prepared.sites}
    check_budget(options.bits, spaces, numel, session.sizes.rest_weights)
    check_size(options.size, session, spaces)
    reporter.say("preflight")
    found = preflight(session, spaces)
    price(session, spaces, options, reporter.say)
    found = replace(found, latency=check_latency(session, spaces, options))
    reporter.preflight(found)
    return found


def _check_time(schedule: Schedule, options: Options, began: float) -> None:
    """Raise UserError where there is no time left for a single trial."""
    if schedule.left >= schedule.least:
        return
    needed = time.monotonic() - began + schedule.least
    raise UserError(
        f"--timeout {options.timeout:g}s: loading and checking took "
        f"{time.monotonic() - began:.1f} s, a trial and its confirmation take about "
        f"{schedule.least:.1f} s more; give {math.ceil(1.5 * needed)}s or more"
    )


def _create(request: Request, header: Callable[[str], Mapping[str, Any]]) -> Ledger:
    return _named(request, lambda name: Ledger.create(name, request.storage, header(name)))


def _named(request: Request, use: Callable[[str], T]) -> T:
    """Return what ``use`` makes of the study's name; a free one, where nobody asked for one.

    Other processes may take a name between two looks at the storage.
    """
    while True:
        name = request.study or new_name(request.loaded.name, request.storage)
        try:
            return use(name)
        except StudyTaken:  # where nobody asked for that name, another one does as well
            if request.study is not None:
                raise
