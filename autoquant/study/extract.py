"""Getting a recipe out of a study, with nothing but its storage."""

from __future__ import annotations

from dataclasses import replace

from optuna.trial import TrialState

from autoquant.errors import StudyError
from autoquant.spec.options import parse_size
from autoquant.spec.recipe import Recipe
from autoquant.spec.recipe_file import loads
from autoquant.spec.space import SearchSpace
from autoquant.study.header import Header
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import RECIPE, best_trial, measured, trial_recipe
from autoquant.study.tuned import Shelf, sites_of, tuning_of


def mapping_of(ledger: Ledger) -> ParameterMap:
    """Return the parameters of a study, from its header."""
    header = Header.read(ledger.header, ledger.name)
    space = SearchSpace.parse(header.space.text, header.space.name)
    return ParameterMap(space.resolve(header.sites))


def extract(
    ledger: Ledger,
    *,
    trial: int | None = None,
    bits: float | None = None,
    size: str | None = None,
) -> tuple[Recipe, int]:
    """Return a recipe of a study and its trial's number.

    The confirmed one; or that of ``trial``; or the least loss within ``bits`` or ``size``. Raises
    StudyError where there is none, naming the tightest budget that there is.
    """
    header = Header.read(ledger.header, ledger.name)
    trials = ledger.trials()
    if trial is None and bits is None and size is None and RECIPE in ledger.header:
        found = ledger.header[RECIPE]
        recipe = loads(found["text"], f"study {ledger.name}")
        if recipe.learned is not None:
            shelf = Shelf.of(ledger.storage, ledger.name)
            recipe = replace(recipe, learned=shelf.file(recipe.learned.sha256))
        return recipe, found["trial"]
    if trial is not None:
        if not 0 <= trial < len(trials):
            raise StudyError(f"study {ledger.name} has no trial {trial}; it has {len(trials)}")
        chosen = trials[trial]
        if measured(chosen) is None:
            state = "failed" if chosen.state == TrialState.FAIL else chosen.state.name.lower()
            raise StudyError(f"study {ledger.name}: trial {trial} is {state}, so it has no result")
    elif bits is not None or size is not None:
        key = "average_weight_bits" if bits is not None else "size_bytes"
        limit = bits if bits is not None else parse_size(str(size), header.baseline.size_bytes)
        rows = [(t, m) for t in trials if (m := measured(t)) is not None]
        within = [(t, m) for t, m in rows if m[key] <= limit + 1e-9]
        if not within:
            least = min((m[key] for _, m in rows), default=None)
            raise StudyError(
                f"study {ledger.name}: no trial within {limit:g}; the smallest has {least:g}"
                if least is not None
                else f"study {ledger.name} has no complete trial"
            )
        chosen = min(within, key=lambda r: (r[1]["loss"], r[1]["drop"], r[1][key]))[0]
    else:
        best = best_trial(trials)
        if best is None:
            raise StudyError(
                f"study {ledger.name} has no feasible trial yet; go on with `autoquant resume "
                f"{ledger.name}`, or choose one with --trial"
            )
        chosen = best
    recipe = trial_recipe(chosen, sites_of(chosen, mapping_of(ledger)), header)
    tuning = tuning_of(chosen)
    if tuning is not None:
        shelf = Shelf.of(ledger.storage, ledger.name)
        file = shelf.file(tuning.sha256)
        recipe = replace(recipe, reconstruction=tuning.technique, learned=file)
    return recipe, chosen.number
