"""A search from beginning to end, and the resumption of one."""

from __future__ import annotations

import copy
import datetime
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from torch import nn

from autoquant.errors import StudyError, TaskError, TrialError, UserError
from autoquant.measure.evaluator import Watch
from autoquant.measure.size import weight_bytes
from autoquant.models.files import LoadedModel, load, sha256_of
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task, data_task, load_task
from autoquant.search import samplers
from autoquant.search.confirm import Finalist, confirm, confirm_one, finalists
from autoquant.search.goal import Goal
from autoquant.search.ledger import Ledger, count, names
from autoquant.search.loop import Listener, Outcome, Stop, run_trials
from autoquant.search.options import Options, check, check_budget, parse_size
from autoquant.search.params import ParameterMap
from autoquant.search.preflight import Preflight, preflight
from autoquant.search.profile import profile, weight_schemes
from autoquant.search.sampler import KnapsackSampler
from autoquant.search.session import Session, choose_device, open_session
from autoquant.search.trials import best_trial, measured
from autoquant.search.uniform import baselines
from autoquant.spec.recipe import Recipe, SiteRecipe, SplitResult
from autoquant.spec.recipe_file import dumps, save
from autoquant.spec.space import SearchSpace, SiteSpace, shipped

FORMAT = 1
"""Version of a study's header."""


class Reporter(Listener, Protocol):
    """Hears the whole of a search; see the command line's for one that draws."""

    def say(self, text: str) -> None:
        """A stage began."""

    def preflight(self, found: Preflight) -> None:
        """The preflight is over."""

    def begin(self, study: str, goal: Goal, done: Sequence[FrozenTrial], stop: Stop) -> None:
        """The trials begin."""


class Silent:
    """A reporter that says nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def preflight(self, found: Preflight) -> None:
        """Do nothing."""

    def begin(self, study: str, goal: Goal, done: Sequence[FrozenTrial], stop: Stop) -> None:
        """Do nothing."""

    def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
        """Do nothing."""

    def step(self, number: int, done: int, total: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found. ``holds`` says whether the confirmed drop is within the maximum."""

    study: str
    recipe: Recipe
    recipe_path: Path
    holds: bool
    max_drop: float
    trials: Mapping[str, int]
    finalists: tuple[Finalist, ...]
    seconds: float
    device: str

    def plain(self) -> dict[str, Any]:
        """Return the result as the JSON object of ``autoquant search --json``."""
        evidence = self.recipe.evidence
        assert evidence is not None
        result = evidence.reported
        return {
            "study": self.study,
            "recipe": str(self.recipe_path),
            "metric": {
                "name": evidence.metric,
                "float": result.baseline,
                "quantized": result.quantized,
                "drop": result.drop,
                "interval": list(result.interval) if result.interval else None,
                "higher_is_better": evidence.higher_is_better,
            },
            "average_weight_bits": evidence.average_weight_bits,
            "size_bytes": evidence.size_bytes,
            "float_size_bytes": evidence.float_size_bytes,
            "trials": dict(self.trials),
            "seconds": self.seconds,
            "device": self.device,
        }


@dataclass(frozen=True)
class Source:
    """Where model, task and search space come from; what a study keeps to find them again.

    ``space`` is the space's file, None for one that ships with the package.
    """

    model: str
    task: str | None = None
    data: str | None = None
    metric: str | None = None
    trust_pickle: bool = False
    space: str | None = None

    def load_task(self) -> Task:
        """Return the task; UserError where none is given."""
        if self.task is not None:
            return load_task(Path(self.task))
        if self.data is not None:
            return data_task(Path(self.data), self.metric)
        raise UserError("give a task: --task TASK.py, or --data FILE with inputs and targets")

    def load(self, task: Task | None) -> LoadedModel:
        """Return the model."""
        build = None if task is None else task.load_model
        return load(Path(self.model), load_model=build, trust_pickle=self.trust_pickle)


def search(
    model: nn.Module | str | os.PathLike[str],
    task: Task | str | os.PathLike[str],
    *,
    space: SearchSpace | str | Path = "default",
    max_drop: str | float = "1%",
    bits: float | None = None,
    size: str | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    sampler: str | BaseSampler = samplers.DEFAULT,
    study: str | None = None,
    storage: str | None = None,
    device: str = "auto",
    seed: int = 0,
    memory: str | None = None,
    out: str | os.PathLike[str] = ".",
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> SearchResult:
    """Find the best recipe for ``model`` and write it to ``out``/recipe.yaml.

    ``model`` is a module, which is left as it is, or a model file; ``task`` a Task or a task file;
    ``space`` a search space, the name of one, or its file. Without a budget the answer is the
    smallest model that loses at most ``max_drop``; with ``bits`` or ``size``, the best metric
    within it. ``timeout`` is in seconds; ``memory`` ("512MB", "0") is what results of layers may
    take so that they are not computed again, None for 2 GiB or a quarter of what is free. Raises
    UserError, in one line, on anything the user can
    mend.
    """
    own = None if isinstance(sampler, str) else sampler
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    options = Options(str(max_drop), bits, size, trials, timeout, name, device, seed, memory)
    file = None if isinstance(task, Task) else str(task)
    if not isinstance(task, Task):
        task = load_task(Path(task))
    chosen = space if isinstance(space, SearchSpace) else SearchSpace.load(space)
    kept = None if isinstance(space, SearchSpace) else space_file(space)
    if isinstance(model, nn.Module):
        source = Source("", file, space=kept)
        loaded = _of_module(model)
    else:
        source = Source(str(model), file, trust_pickle=trust_pickle, space=kept)
        loaded = source.load(task)
    return start(
        loaded, task, source, chosen, options, study, storage, Path(out), own, reporter or Silent()
    )


def start(
    loaded: LoadedModel,
    task: Task,
    source: Source,
    space: SearchSpace,
    options: Options,
    study: str | None,
    storage: str | None,
    out: Path,
    own: BaseSampler | None,
    reporter: Reporter,
) -> SearchResult:
    """Check everything, create the study, and run it; nothing is written before all is checked."""
    began = time.monotonic()
    check(options)
    parse_max_drop(options.max_drop)
    if options.size is not None:
        parse_size(options.size, 1)
    if own is None:
        samplers.check(options.sampler)
    check_folder(out)
    study = study or new_name(loaded.name, storage)
    Ledger.check_free(study, storage)
    session = open_session(loaded, task, choose_device(options.device), say=reporter.say)
    spaces = space.resolve(session.prepared.sites)
    check_budget(options.bits, spaces, {s.name: s.numel for s in session.prepared.sites})
    _check_size(options.size, session, spaces)
    reporter.say("preflight")
    found = preflight(session, spaces)
    reporter.preflight(found)
    goal = make_goal(session, options, found)
    header = {
        "format": FORMAT,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "model": {
            "path": _absolute(source.model),
            "name": loaded.name,
            "sha256": loaded.sha256,
            "trust_pickle": source.trust_pickle,
        },
        "task": {
            "path": _absolute(source.task),
            "data": _absolute(source.data),
            "metric": source.metric,
            "sha256": task.sha256,
        },
        "space": _space_header(space, source),
        "options": options.plain(),
        "out": str(out.resolve()),
        "sites": [
            {"name": s.name, "layer": s.layer, "matrix": list(s.matrix), "activation": s.activation}
            for s in session.prepared.sites
        ],
        "folded": dict(session.prepared.folded),
        "float": {
            "metric": found.metric,
            "value": found.value,
            "samples": found.samples.get("search", 0),
            "higher_is_better": session.evaluator.metric.higher_is_better,  # type: ignore[union-attr]
            "size_bytes": session.sizes.float_size_bytes,
        },
        "max_drop": goal.max_drop,
    }
    ledger = Ledger.create(study, storage, header)
    return _run(ledger, session, spaces, goal, options, out, own, reporter, began)


def _check_size(size: str | None, session: Session, spaces: Mapping[str, SiteSpace]) -> None:
    """Raise UserError where the smallest recipe of the space is larger than ``size``."""
    if size is None:
        return
    narrow = {}
    for site in session.prepared.sites:
        sizes = {w: weight_bytes(site, w) for w in weight_schemes(site, spaces[site.name])}
        narrow[site.name] = SiteRecipe(min(sizes, key=sizes.__getitem__, default=None))
    whole, least = session.sizes.float_size_bytes, session.sizes.bytes(narrow)
    if least > parse_size(size, whole):
        raise UserError(
            f"--size {size}: the space's smallest recipe has {least:,} bytes, {least / whole:.1%} "
            "of the float model; give that or more, or a space with fewer bits"
        )


def check_folder(folder: Path) -> None:
    """Raise UserError where nothing could be written to ``folder`` after long work."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{folder}: nothing can be written there: {path} is no folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: nothing can be written there: {path} is not writable")


def resume(
    study: str | None = None,
    *,
    storage: str | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    memory: str | None = None,
    accept_changes: bool = False,
    model: nn.Module | None = None,
    task: Task | None = None,
    sampler: BaseSampler | None = None,
    reporter: Reporter | None = None,
) -> SearchResult:
    """Go on with a study from its storage alone.

    ``trials`` and ``timeout``, and ``memory``, replace the study's own. A study of a module or Task
    in Python needs them again. Raises StudyError where the model, the task or the space is not what
    the study began with, unless ``accept_changes``.
    """
    began = time.monotonic()
    reporter = reporter or Silent()
    ledger = Ledger.open(study, storage)
    header = ledger.header
    if header.get("format") != FORMAT:
        raise StudyError(
            f"study {ledger.name}: written in format {header.get('format')!r}, this release reads "
            f"{FORMAT}"
        )
    options = Options.read(header["options"])
    if trials is not None or timeout is not None:
        options = replace(options, trials=trials, timeout=timeout)
    if memory is not None:
        options = replace(options, memory=memory)
    check(options)
    if sampler is None and options.sampler not in samplers.names():
        raise StudyError(
            f"study {ledger.name} was begun with a sampler of one's own ({options.sampler}): "
            "go on with autoquant.resume(sampler=…)"
        )
    source = source_of(header)
    task = task or _saved_task(ledger.name, source)
    _compare(ledger.name, "task", header["task"]["sha256"], task.sha256, accept_changes)
    if model is not None:
        loaded = _of_module(model)
        _compare(ledger.name, "model", header["model"]["sha256"], loaded.sha256, accept_changes)
    elif source.model:
        if not Path(source.model).exists():
            raise StudyError(f"study {ledger.name}: its model is gone: {source.model}")
        found = sha256_of(Path(source.model))
        _compare(ledger.name, "model", header["model"]["sha256"], found, accept_changes)
        loaded = source.load(task)
    else:
        raise StudyError(
            f"study {ledger.name} is of a module in Python: go on with autoquant.resume(model=…)"
        )
    space = _saved_space(ledger.name, header, accept_changes)
    session = open_session(loaded, task, choose_device(options.device), say=reporter.say)
    if [s.name for s in session.prepared.sites] != [s["name"] for s in header["sites"]]:
        raise StudyError(
            f"study {ledger.name}: the model has other layers than when the study began; start a "
            "new study"
        )
    spaces = space.resolve(session.prepared.sites)
    reporter.say("preflight")
    flight = preflight(session, spaces)
    reporter.preflight(flight)
    goal = make_goal(session, options, flight)
    out = Path(header["out"])
    return _run(ledger, session, spaces, goal, options, out, sampler, reporter, began)


def _compare(study: str, what: str, then: str, now: str, accept: bool) -> None:
    if then != now and not accept:
        raise StudyError(
            f"study {study}: the {what} has changed since the study began (sha256 {then[:12]}… → "
            f"{now[:12]}…); start a new study, or go on with --accept-changes"
        )


def _saved_task(study: str, source: Source) -> Task:
    if source.task is None and source.data is None:
        raise StudyError(
            f"study {study} is of a Task in Python: go on with autoquant.resume(task=…)"
        )
    return source.load_task()


def _saved_space(study: str, header: Mapping[str, Any], accept: bool) -> SearchSpace:
    """Return the space as the study keeps it, which its trials are of, accepted changes or not.

    Where it came from a file that is still there, or ships, that must hold the same text.
    """
    saved = header["space"]
    if saved["shipped"] or (saved["path"] and Path(saved["path"]).exists()):
        now = SearchSpace.load(saved["name"] if saved["shipped"] else Path(saved["path"]))
        _compare(study, "space", saved["sha256"], _sha256(now.text), accept)
    return SearchSpace.parse(saved["text"], saved["name"])


def space_file(space: str | Path) -> str | None:
    """Return the file that a --space names, None where it is the name of one that ships."""
    return None if space in shipped() else str(space)


def _space_header(space: SearchSpace, source: Source) -> dict[str, Any]:
    """Return what a study keeps of its space; one made in Python has no place to be compared."""
    ships = source.space is None and space.name in shipped()
    return {
        "name": space.name,
        "path": _absolute(source.space),
        "shipped": ships and SearchSpace.load(space.name).text == space.text,
        "text": space.text,
        "sha256": _sha256(space.text),
    }


def source_of(header: Mapping[str, Any]) -> Source:
    """Return where a study's model and task come from."""
    task = header["task"]
    return Source(
        header["model"]["path"] or "",
        task["path"],
        task["data"],
        task["metric"],
        header["model"]["trust_pickle"],
    )


def make_goal(session: Session, options: Options, found: Preflight) -> Goal:
    """Return the goal in the metric's own unit and in bytes."""
    metric = session.evaluator.metric
    assert metric is not None
    size = session.sizes.float_size_bytes
    return Goal(
        parse_max_drop(options.max_drop).absolute(metric, found.value),
        size,
        options.bits,
        None if options.size is None else parse_size(options.size, size),
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
) -> SearchResult:
    mapping = ParameterMap(spaces)
    plain = list(baselines(spaces))
    most = 1 if not mapping.distributions else options.most_trials
    stop = Stop(most, options.timeout)
    try:
        session.reuse(options.memory_bytes, reporter.say)
    except TrialError as error:
        raise TaskError(f"{session.task.source}: on the float model: {error}") from error
    # From here on whoever interrupts the search is told which study to resume.
    reporter.begin(ledger.name, goal, ledger.trials(), stop)
    proposer = _proposer(ledger, session, mapping, plain, goal, options, own, reporter)
    answered = any(measured(trial) is not None for trial in ledger.trials())

    def measure(sites: Mapping[str, SiteRecipe], watch: Watch) -> Outcome:
        nonlocal answered
        # However bad, one candidate is measured to its end: there must be an answer.
        limit = None if goal.budgeted or not answered else goal.max_drop
        m, reading, done = session.measure(sites, "search", limit=limit, watch=watch)
        answered = answered or not reading.stopped
        return Outcome(m, done, reading.stopped)

    run_trials(ledger, mapping, proposer, goal, measure, stop, reporter)
    reporter.say("confirming")
    trials = ledger.trials()
    candidates = finalists(trials, mapping, goal, len(plain))
    if not candidates:
        raise StudyError(
            f"study {ledger.name}: no trial was completed, so there is no recipe; give more "
            "--trials or --timeout"
        )
    if goal.budgeted and best_trial(trials) is None:
        raise StudyError(
            f"study {ledger.name}: none of its {len(trials)} trials is within the budget; go on "
            f"with `autoquant resume {ledger.name}` and more --trials"
        )
    try:
        chosen, confirmed = confirm(session, mapping, goal, candidates, options.seed)
    except TrialError as error:
        raise StudyError(f"study {ledger.name}: {error}") from error
    path = out / "recipe.yaml"
    # The study first: `autoquant export` then has the recipe even where ``path`` can't be written.
    ledger.note(recipe=dumps(chosen.recipe), best=chosen.trial)
    save(chosen.recipe, path)
    return SearchResult(
        ledger.name,
        chosen.recipe,
        path,
        chosen.holds,
        goal.max_drop,
        count(trials),
        tuple(confirmed),
        round(time.monotonic() - began, 3),
        session.device.type,
    )


def _proposer(
    ledger: Ledger,
    session: Session,
    mapping: ParameterMap,
    plain: Sequence[Mapping[str, SiteRecipe]],
    goal: Goal,
    options: Options,
    own: BaseSampler | None,
    reporter: Reporter,
) -> samplers.Proposer:
    if own is None and options.sampler == samplers.DEFAULT:
        reporter.say("profiling the layers")
        table = profile(session.prepared, session.statistics, mapping.spaces)
        rest = session.sizes.rest
        sampler = KnapsackSampler(mapping, table, goal, rest, options.seed)
        then: samplers.Proposer = samplers.KnapsackProposer(sampler, ledger.trials)
    else:
        make = (
            (lambda _: own) if own is not None else samplers.seeded(options.sampler, options.seed)
        )
        state = ledger.header.get(samplers.SAMPLER_STATE, {})

        def keep(new: dict[str, Any]) -> None:
            ledger.note(**{samplers.SAMPLER_STATE: new})

        then = samplers.StockProposer(make, mapping, ledger.trials(), state, keep)
    return samplers.Baselines(plain, mapping, then)


def new_name(model: str, storage: str | None) -> str:
    """Return a study name that is not taken: the model's, with a number where needed."""
    plain = (c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in model)
    stem = "".join(plain).strip(".-_")[:80] or "study"
    taken = set(names(storage)) if storage is None or Ledger.exists(storage) else set()
    if stem not in taken:
        return stem
    return next(f"{stem}-{i}" for i in range(2, len(taken) + 3) if f"{stem}-{i}" not in taken)


def _of_module(model: nn.Module) -> LoadedModel:
    """Return a copy of the user's own module to work on: it is folded and converted in place."""
    name, digest = type(model).__name__, state_hash(model)
    return LoadedModel(copy.deepcopy(model).eval(), "module", name, digest)


def state_hash(model: nn.Module) -> str:
    """Return a digest of a module's weights, for one that comes from no file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path else None


@dataclass(frozen=True)
class Evaluation:
    """What ``autoquant evaluate`` measured, split by split."""

    metric: str
    higher_is_better: bool
    splits: Mapping[str, SplitResult]
    average_weight_bits: float
    size_bytes: int
    float_size_bytes: int

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        rows = {
            name: {
                "samples": s.samples,
                "float": s.baseline,
                "quantized": s.quantized,
                "drop": s.drop,
                "interval": list(s.interval) if s.interval else None,
            }
            for name, s in self.splits.items()
        }
        return {
            "metric": {"name": self.metric, "higher_is_better": self.higher_is_better},
            "splits": rows,
            "average_weight_bits": self.average_weight_bits,
            "size_bytes": self.size_bytes,
            "float_size_bytes": self.float_size_bytes,
        }


def measure_recipe(
    loaded: LoadedModel, task: Task, recipe: Recipe | None, device: str = "auto"
) -> Evaluation:
    """Measure a recipe (None: the float model) on every split that the task has."""
    folded = None if recipe is None else recipe.folded
    session = open_session(loaded, task, choose_device(device), folded=folded)
    try:
        base = session.baseline("search")
        if session.evaluator.confirms:
            session.baseline("confirm")
        goal = Goal(float("inf"), session.sizes.float_size_bytes)
        sites = {} if recipe is None else recipe.sites
        seed = 0 if recipe is None else recipe.seed
        evidence = confirm_one(session, sites, goal, seed).recipe.evidence
    except TrialError as error:
        raise UserError(f"{task.source}: {error}") from error
    assert evidence is not None
    splits = {"search": evidence.search}
    if evidence.confirm is not None:
        splits["confirm"] = evidence.confirm
    if not base.samples:
        splits = {name: replace(s, interval=None) for name, s in splits.items()}
    return Evaluation(
        evidence.metric,
        evidence.higher_is_better,
        splits,
        evidence.average_weight_bits,
        evidence.size_bytes,
        evidence.float_size_bytes,
    )
