"""The last stage of a search: the choice is confirmed on data that no trial saw, and written."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from autoquant.errors import StudyError, TrialError, UserError
from autoquant.methods.learned import is_learned, learned_path, read_learned
from autoquant.optimize.choose import Choice
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import Plan
from autoquant.selection.confirmation import Finalist, confirm
from autoquant.session.costs import LatencyCheck, check_one
from autoquant.spec.outputs import check_target, is_signed
from autoquant.spec.recipe import Recipe
from autoquant.spec.recipe_file import dumps, save
from autoquant.study.opening import RECIPE_FILE
from autoquant.study.trials import RECIPE
from autoquant.study.tuned import Shelf, sites_of, take_along, tuning_of


@dataclass(frozen=True)
class Confirmed:
    """What was confirmed.

    - ``chosen``: the finalist that is returned; ``finalists``: all that were measured.
    - ``recipe``: its recipe, with the latency that was measured where that was asked for, and with
      what was learned for it.
    - ``latency_checks``: all comparisons of predicted latency with whole models.
    - ``path``: the file that the recipe was written to.
    """

    chosen: Finalist
    finalists: tuple[Finalist, ...]
    recipe: Recipe
    latency_checks: tuple[LatencyCheck, ...]
    path: Path = Path()


def confirm_choice(study: OpenStudy, plan: Plan, choice: Choice) -> Confirmed:
    """Measure the candidates until the choice is sure; StudyError where every one fails."""
    session, shelf = study.session, Shelf.of(study.ledger.storage, study.ledger.name)
    tunings = {}
    for trial in choice.candidates:
        if (tuning := tuning_of(trial)) is not None:
            tunings[trial.number] = tuning
            recipe = Recipe(sites_of(trial, plan.mapping), learned=shelf.file(tuning.sha256))
            session.applier.learned |= read_learned(recipe)
    try:
        with session.without_reuse():
            chosen, done = confirm(
                session,
                plan.mapping,
                study.goal,
                choice.candidates,
                study.options.seed,
                choice.rival,
                study.schedule,
            )
    except TrialError as error:
        raise StudyError(f"study {study.ledger.name}: {error}") from error
    recipe, checks = _timed(study, chosen.recipe)
    if (known := tunings.get(chosen.trial)) is not None:
        file = shelf.file(known.sha256)
        recipe = replace(recipe, reconstruction=known.technique, learned=file)
    return Confirmed(chosen, tuple(done), recipe, checks)


def _timed(study: OpenStudy, recipe: Recipe) -> tuple[Recipe, tuple[LatencyCheck, ...]]:
    """Return the result with its measured latency, where that was asked for, and all checks."""
    table, evidence = study.session.costs.latency, recipe.evidence
    if table is None or evidence is None:
        return recipe, ()
    rows = study.ledger.header.get("latency_checks", ())
    found = check_one(study.session, "result", recipe.sites)
    latency = table.evidence(found.predicted, found.measured)
    timed = replace(recipe, evidence=replace(evidence, latency=latency))
    return timed, (*(LatencyCheck.read(row) for row in rows), found)


def write(study: OpenStudy, confirmed: Confirmed) -> Confirmed:
    """Write the recipe to the study and to its file; return it as it was written."""
    path, recipe = _free(study.out, study.ledger.name, confirmed.recipe), confirmed.recipe
    # The study first: `autoquant export` then has the recipe even where ``path`` can't be written.
    study.ledger.note(**{RECIPE: {"text": dumps(recipe), "trial": confirmed.chosen.trial}})
    recipe = take_along(recipe, path)
    save(recipe, path)
    return replace(confirmed, recipe=recipe, path=path)


def _free(out: Path, study: str, recipe: Recipe) -> Path:
    """Return where the recipe goes: beside one that was edited while the search ran."""
    beside = (out / f"recipe-{study}-{i}.yaml" for i in itertools.count(1))
    for path in itertools.chain([out / RECIPE_FILE], beside):
        try:
            check_target(path, is_signed)
            if recipe.learned is not None:
                check_target(learned_path(path), is_learned)
        except UserError:
            continue
        return path
    raise AssertionError("unreachable")
