"""What a study runs through once it is open: prepare, trials, choose, confirm."""

from __future__ import annotations

import time
from pathlib import Path

from autoquant.optimize.choose import choose
from autoquant.optimize.confirm import Confirmed, confirm_choice, write
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import prepare
from autoquant.optimize.result import SearchResult
from autoquant.optimize.trials import Tried, try_all
from autoquant.study.ledger import count


def run_study(study: OpenStudy) -> SearchResult:
    """Run the trials of a study that is checked and created, choose, confirm, and write.

    Trials go on from those that the study has. Raises StudyError where no recipe comes of it.
    """
    plan = prepare(study)
    tried = try_all(study, plan)
    choice = choose(study, plan, tried.trials)
    confirmed = confirm_choice(study, plan, choice)
    path = write(study, confirmed)
    return _result(study, tried, confirmed, path)


def _result(study: OpenStudy, tried: Tried, confirmed: Confirmed, path: Path) -> SearchResult:
    evidence, schedule = confirmed.recipe.evidence, study.schedule
    asked = study.options.max_drop is not None or not study.goal.budgeted
    return SearchResult(
        study=study.ledger.name,
        recipe=confirmed.recipe,
        recipe_path=path,
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
    )
