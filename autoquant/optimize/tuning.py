"""The stage after the trials: recipes whose layers are fitted to each other (``methods``).

With a budget the best trial is tuned. With a maximum drop recipes are that lose more than it
allows, as foretold, but cost less: tuning may repair them. They are ordered by cost and bisected,
and once more for one that loses half of it. Each is a trial of the study, and goes to the
confirmation like any other; what was tuned before the search was interrupted is not tuned again.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import StudyError, TrialError
from autoquant.methods.learned import read_learned
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.methods.training import Training
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import Plan
from autoquant.selection.finalists import estimated_drops
from autoquant.session.training import train_blocks, train_layers
from autoquant.session.tuning import fit_layers, fitted, techniques, why_not
from autoquant.spec.options import AUTO, BLOCK, FULL
from autoquant.spec.recipe import Recipe, SiteRecipe, choices_key
from autoquant.spec.techniques import Reconstruction
from autoquant.study.ledger import MEASURED, REASON, finished
from autoquant.study.trials import SCALES, best_trial, measured, scales
from autoquant.study.tuned import TUNED, Shelf, Tuning, searched, sites_of, tuning_of

RUNGS = (8.0, 6.3, 5.0, 4.0, 3.2, 2.5, 2.0, 1.6, 1.25)
"""Losses of the recipes that are tuned under a maximum drop, in units of the loss of that drop."""
CAREFUL = 0.5
"""Share of the maximum drop that one more recipe is tuned to keep: the confirmation may find that
the one that was tuned to keep all of it does not."""
WORK = 2.0
"""Times the work of the trials that all tuning may be, unless it is asked for."""

PASSES = 20.0
"""Passes over the calibration data that take as long as fitting all layers, where results of those
before are reused: most of it is arithmetic then."""

FLOAT_WORK = 3.0
"""Times the work of a quantized sample that one of the float model is."""
TRAINING_WORK = 4.5
"""Runs of the float model that training on a sample takes the work of: teacher, student, back."""
FEWEST_STEPS = 100
"""Steps that training is worth beginning for."""

Sites = Mapping[str, SiteRecipe]

Step = Callable[[int, int], None]
"""Hears (done, in all) and may raise to end what is done."""

LATE = "no more was tuned: there was no time"


class _Late(Exception):
    """Tuning has had its time, or its share of the work."""


@dataclass(frozen=True)
class Tunings:
    """What tuning came to: the ``trials`` that can be confirmed, tuned ones included.

    ``count`` is how many of them are tuned, ``notes`` say why none, why no more, and which are
    left out.
    """

    trials: Sequence[FrozenTrial]
    count: int
    notes: tuple[str, ...] = ()


def tune_trials(study: OpenStudy, plan: Plan) -> Tunings:
    """Tune what may gain by it, and return all trials of the study that can be confirmed."""
    study.reporter.say("tuning")
    _reuse(study)
    reason, notes = _why_not(study, plan), list[str]()
    if reason is None:
        try:
            _Tuner(study, plan).run()
        except _Late as late:
            reason = str(late)
    study.session.evaluator.reuse = None  # from here on no recipe is like another
    if reason:
        notes.append(reason)
    trials = list(_usable(study, notes))
    count = sum(measured(t) is not None for t in trials if TUNED in t.user_attrs)
    return Tunings(trials, count, tuple(notes))


def _why_not(study: OpenStudy, plan: Plan) -> str | None:
    """Return in one line why nothing is tuned, None where it is; "" where nobody wonders."""
    session, options = study.session, study.options
    known = [t for t in searched(study.ledger.trials()) if measured(t) is not None]
    if options.tune == "none" or not known:
        return ""
    sites = plan.mapping.decode(known[0].params)
    if (reason := why_not(session, sites)) is not None:
        return f"not tuned: {reason}"
    work = _in_trials(study, sites)
    if work > _spare_trials(study):
        return (
            f"not tuned: fitting {len(fitted(session, sites))} layers would take about as long as "
            f"{math.ceil(work)} trials; --tune layer asks for it"
        )
    return None


def _reuse(study: OpenStudy) -> None:
    """Reuse results of layers, if the model can have that: also where no trial was worth it."""
    session = study.session
    if session.evaluator.reuse is not None or study.options.tune == "none":
        return
    tried = study.options.memory is not None or session.repays_reuse
    with contextlib.suppress(TrialError):  # which whoever runs the model next will say
        session.reuse(study.options.memory_bytes, (lambda _: None) if tried else study.reporter.say)


def _in_trials(study: OpenStudy, sites: Sites) -> float:
    """Return how many trials tuning a recipe takes the work of, about, by the samples that run."""
    samples = study.session.splits.samples
    reuse, passes = study.session.evaluator.reuse, len(fitted(study.session, sites)) / 2
    if reuse is not None and reuse.on:  # else a layer's turn takes half a pass on average
        passes = min(passes, PASSES)
    return passes * samples["calibrate"] / max(samples["search"], samples["calibrate"])


def _spare_trials(study: OpenStudy) -> float:
    """Return the work of how many trials all tuning may take."""
    known = [t for t in searched(study.ledger.trials()) if measured(t) is not None]
    return WORK * len(known) if study.options.tune == AUTO else math.inf


class _Tuner:
    """Tunes recipes one after another, each by every technique that is still in the running."""

    def __init__(self, study: OpenStudy, plan: Plan) -> None:
        self._study = study
        self._plan = plan
        self._shelf = Shelf.of(study.ledger.storage, study.ledger.name)
        self._techniques = list(techniques())
        self._spare = _spare_trials(study)
        self._longest = 0.0
        self._done: dict[str, list[FrozenTrial]] = {}
        self._until = math.inf
        if study.schedule is not None:
            self._until = time.monotonic() + study.schedule.for_tuning

    def run(self) -> None:
        """Tune what the goal asks for; _Late where time runs out."""
        if self._study.goal.budgeted:
            best = best_trial(searched(self._study.ledger.trials()))
            if best is not None:
                sites = self._plan.mapping.decode(best.params)
                self._tune(sites)
                self._train(sites)
            return
        rungs = self._rungs()
        low = self._bisect(rungs, 0, 1.0)
        self._bisect(rungs, low, CAREFUL)
        if rungs:  # training may repair the next cheaper one than what tuning does
            self._train(rungs[max(low - 1, 0)])

    def _bisect(self, rungs: Sequence[Sites], low: int, share: float) -> int:
        """Return the first recipe from ``low`` on that, tuned, keeps a share of the drop."""
        high = len(rungs)
        while low < high:
            middle = (low + high) // 2
            if self._holding(self._tune(rungs[middle]), share):
                high = middle
            else:
                low = middle + 1
        return low

    def _rungs(self) -> list[Sites]:
        """Return the recipes to bisect, cheapest first."""
        trials = searched(self._study.ledger.trials())
        forecast = self._plan.forecast
        if forecast is not None:
            found: list[Sites] = [*forecast.cheaper(trials, RUNGS)]
        else:
            found = [self._plan.mapping.decode(t.params) for t in _cheaper(trials, self._study)]
        if not self._holding(trials):  # nothing keeps the drop yet: the safest one may, tuned
            rows = [(m["loss"], t.number, t) for t in trials if (m := measured(t)) is not None]
            found.append(self._plan.mapping.decode(min(rows)[2].params))
        return found

    def _holding(self, trials: Sequence[FrozenTrial], share: float = 1.0) -> set[int]:
        """Return the numbers of the trials that keep a share of the goal, as all together say."""
        goal, drops = self._study.goal, estimated_drops(self._study.ledger.trials())
        return {
            t.number
            for t in trials
            if (m := measured(t)) is not None
            and drops[t.number] <= share * goal.max_drop
            and all(v <= 0 or name == "drop" for name, v in t.constraints.items())
            and math.isfinite(m["loss"])
        }

    def _tune(self, sites: Sites) -> list[FrozenTrial]:
        """Return the trials of one recipe, tuned by each technique; the best one is kept to."""
        key = choices_key(sites)
        if key in self._done:
            return self._done[key]
        found = [self._once(sites, technique) for technique in self._techniques]
        rows = [(m["loss"], i) for i, t in enumerate(found) if (m := measured(t)) is not None]
        if len(self._techniques) > 1 and rows:
            self._techniques = [self._techniques[min(rows)[1]]]
        self._done[key] = found
        return found

    def _once(self, sites: Sites, technique: Reconstruction) -> FrozenTrial:
        """Return the trial of one recipe tuned by one technique, as the study has it."""
        self._spare -= _in_trials(self._study, sites)  # also where it was done before
        if self._spare < 0:
            raise _Late("no more was tuned: it would take longer than twice the trials")
        session, layers = self._study.session, fitted(self._study.session, sites)

        def fit(step: Step) -> Sites:
            heed = lambda layer: step(layers.index(layer), len(layers))  # noqa: E731
            return fit_layers(session, sites, technique, heed)  # type: ignore[arg-type]

        return self._kept(sites, technique, fit)

    def _train(self, sites: Sites) -> None:
        """Train the best that one recipe was tuned to, if that is asked for or little work."""
        technique = self._training()
        if technique is None:
            return
        session = self._study.session
        start, fitted_by = self._best_of(sites)
        known = set(session.applier.learned)
        file = self._shelf.folder / f"training-{choices_key(sites)}.safetensors"
        seed = self._study.options.seed

        def fit(step: Step) -> Sites:
            if isinstance(technique, Blockwise):
                return train_blocks(
                    session,
                    start,
                    technique,
                    fit=fitted_by,
                    heed=step,
                    watch=self._study.reporter.block,
                    checkpoint=file,
                    seed=seed,
                ).sites
            assert isinstance(technique, Distillation)
            return train_layers(
                session,
                start,
                technique,
                heed=lambda number: step(number, technique.steps),
                watch=self._study.reporter.checked,
                follow=self._study.reporter.trained,
                checkpoint=file,
                seed=seed,
            ).sites

        try:
            trial = self._kept(sites, technique, fit)
        finally:
            for digest in set(session.applier.learned) - known:
                del session.applier.learned[digest]
        file.unlink(missing_ok=True)
        if REASON in trial.user_attrs:
            raise _Late(f"not trained: {trial.user_attrs[REASON]}")

    def _training(self) -> Training | None:
        """Return how to train, None where nobody asks for it and it is much work."""
        asked, usual = self._study.options.tune, Distillation()
        if asked == FULL:
            return usual
        if asked == BLOCK:
            return Blockwise()
        steps = self._affordable(usual) if asked == AUTO else 0
        return replace(usual, steps=min(steps, usual.steps)) if steps >= FEWEST_STEPS else None

    def _affordable(self, technique: Distillation) -> int:
        """Return how many steps are no more work than what tuning has left of its share."""
        samples = self._study.session.splits.samples["search"]
        return int(self._spare * samples / (TRAINING_WORK * FLOAT_WORK * technique.batch))

    def _best_of(self, sites: Sites) -> tuple[Sites, Sequential | None]:
        """Return what a recipe came to so far with the least loss, and how it was fitted if so."""
        key, mapping = choices_key(sites), self._plan.mapping
        rows = [
            (m["loss"], t.number, t)
            for t in self._study.ledger.trials()
            if (m := measured(t)) is not None and choices_key(mapping.decode(t.params)) == key
        ]
        rows = [row for row in rows if not isinstance(_technique(row[2]), Training)]
        if not rows:
            return sites, None
        best = min(rows)[2]
        found, tuning = sites_of(best, mapping), tuning_of(best)
        if tuning is not None:
            recipe = Recipe(found, learned=self._shelf.file(tuning.sha256))
            self._study.session.applier.learned |= read_learned(recipe)
        technique = _technique(best)
        return found, technique if isinstance(technique, Sequential) else None

    def _kept(
        self, sites: Sites, technique: Reconstruction, fit: Callable[[Step], Sites]
    ) -> FrozenTrial:
        """Return the trial of one recipe and technique, made by ``fit`` where there is none."""
        key = choices_key(sites)
        for trial in self._study.ledger.trials():
            same = _technique(trial) == technique
            if same and choices_key(self._plan.mapping.decode(trial.params)) == key:
                return trial
        if time.monotonic() + self._longest > self._until:
            raise _Late(LATE)
        began = time.monotonic()
        trial = self._make(sites, technique, fit)
        self._longest = max(self._longest, time.monotonic() - began)
        self._study.ledger.add(trial)
        every = self._study.ledger.trials()
        trial.number = len(every) - 1
        self._study.reporter.trial(trial, best_trial(every))
        return trial

    def _make(
        self, sites: Sites, technique: Reconstruction, fit: Callable[[Step], Sites]
    ) -> FrozenTrial:
        """Fit and measure one recipe; return its trial, which is not written yet."""
        study, began = self._study, datetime.datetime.now()
        session, goal = study.session, study.goal
        params, distributions = self._plan.mapping.encode(sites), self._plan.mapping.distributions
        ended = functools.partial(
            finished, params=params, distributions=distributions, started=began
        )
        number = len(study.ledger.trials())

        def step(done: int, total: int) -> None:
            study.reporter.step(number, done, total)
            if time.monotonic() > self._until:
                raise _Late(LATE)

        known = set(session.applier.learned)
        try:
            tuned = fit(step)
            with session.without_reuse():
                m, _, done = session.measure(tuned, "search")
            used = {site.learned for site in done.values() if site.learned}
            sha256 = self._shelf.put([session.applier.learned[digest] for digest in used])
        except TrialError as error:
            tuning = Tuning(technique)
            attrs = {REASON: str(error), TUNED: tuning.plain()}
            return ended(TrialState.FAIL, user_attrs=attrs)
        finally:  # whichever is confirmed is read again: a large model's would not fit all
            for digest in set(session.applier.learned) - known:
                del session.applier.learned[digest]
        attrs = {
            MEASURED: m.plain() | {"objective": goal.objective(m), "feasible": goal.feasible(m)},
            SCALES: scales(done),
            TUNED: Tuning.of(technique, sha256, done).plain(),
        }
        return ended(
            TrialState.COMPLETE,
            value=goal.objective(m),
            constraints=goal.constraints(m),
            user_attrs=attrs,
        )


def _technique(trial: FrozenTrial) -> Reconstruction | None:
    tuning = tuning_of(trial)
    return None if tuning is None else tuning.technique


def _usable(study: OpenStudy, notes: list[str]) -> Iterator[FrozenTrial]:
    """Yield the trials of a study, without those whose learned file is gone, which is noted."""
    shelf = Shelf.of(study.ledger.storage, study.ledger.name)
    for trial in study.ledger.trials():
        tuning = tuning_of(trial)
        if tuning is not None and tuning.sha256:
            try:
                shelf.file(tuning.sha256)
            except StudyError as error:
                notes.append(f"trial {trial.number} is left out: {error}")
                continue
        yield trial


def _cheaper(trials: Sequence[FrozenTrial], study: OpenStudy) -> list[FrozenTrial]:
    """Return the trials that lose too much, and that no other beats in both cost and loss.

    Cheapest first, and none that costs as much as the best trial.
    """
    drops, most = estimated_drops(trials), study.goal.max_drop
    holding = [
        m["objective"] for t in trials if (m := measured(t)) is not None and drops[t.number] <= most
    ]
    least = min(holding, default=math.inf)
    rows = [
        (m["objective"], m["loss"], t.number, t)
        for t in trials
        if (m := measured(t)) is not None and drops[t.number] > most and m["objective"] < least
    ]
    rows.sort(key=lambda row: row[:3])
    kept: list[FrozenTrial] = []
    lowest = math.inf
    for _, loss, _, trial in rows:
        if loss < lowest:
            kept.append(trial)
            lowest = loss
    return kept[-len(RUNGS) :]
