"""What a study runs through once it is open: prepare, trials, tuning, choose, confirm."""

from __future__ import annotations

import time

from autoquant.optimize.choose import choose
from autoquant.optimize.confirm import Confirmed, confirm_choice, write
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import prepare
from autoquant.optimize.result import SearchResult
from autoquant.optimize.trials import Tried, try_all
from autoquant.optimize.tuning import Tunings, tune_trials
from autoquant.study.ledger import count


def run_study(study: OpenStudy) -> SearchResult:
    """Run the trials of a study that is checked and created, tune, choose, confirm, and write.

    Trials go on from those that the study has. Raises StudyError where no recipe comes of it.
    """
    plan = prepare(study)
    tried = try_all(study, plan)
    tunings = tune_trials(study, plan)
    choice = choose(study, plan, tunings.trials)
    confirmed = write(study, confirm_choice(study, plan, choice))
    return _result(study, tried, tunings, confirmed)


def _result(study: OpenStudy, tried: Tried, tunings: Tunings, confirmed: Confirmed) -> SearchResult:
    evidence, schedule = confirmed.recipe.evidence, study.schedule
    asked = study.options.max_drop is not None or not study.goal.budgeted
    return SearchResult(
        study=study.ledger.name,
        recipe=confirmed.recipe,
        recipe_path=confirmed.path,
        holds=confirmed.chosen.holds,
        max_drop=study.goal.max_drop,
        trials=count(tried.trials),
        finalists=confirmed.finalists,
        seconds=round(time.monotonic() - study.began, 3),
        device=study.session.device.type,
        speed=tried.speed,
        max_latency=study.goal.latency,
        latency_checks=confirmed.latency_checks,
        done=tried.done,
        fidelity=tried.foretold,
        verdict=evidence.verdict if evidence is not None and asked else None,
        skipped=() if schedule is None else (*schedule.skipped, *tried.skipped),
        tuned=tunings.count,
        notes=tunings.notes,
    )
