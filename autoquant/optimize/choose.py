"""The third stage of a search: which trials go to the confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import StudyError
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import Plan
from autoquant.selection.finalists import finalists, incumbent
from autoquant.study.ledger import MEASURED
from autoquant.study.trials import best_trial


@dataclass(frozen=True)
class Choice:
    """The trials to confirm, in order, and of them the best uniform one: None where it is none."""

    candidates: Sequence[FrozenTrial]
    rival: FrozenTrial | None


def choose(study: OpenStudy, plan: Plan, trials: Sequence[FrozenTrial]) -> Choice:
    """Return which of ``trials`` are to be confirmed; StudyError where none can be."""
    name, uniforms = study.ledger.name, len(plan.uniforms)
    study.reporter.say("confirming")
    candidates = finalists(trials, plan.mapping, study.goal, uniforms)
    refused = any(t.state == TrialState.PRUNED and MEASURED not in t.user_attrs for t in trials)
    if not candidates and not refused:
        raise StudyError(
            f"study {name}: no trial was completed, so there is no recipe; give more "
            "--trials or --timeout"
        )
    if not candidates or (study.goal.budgeted and best_trial(trials) is None):
        raise StudyError(
            f"study {name}: none of its {len(trials)} trials is within the budget; go on "
            f"with `autoquant resume {name}` and more --trials"
        )
    return Choice(candidates, incumbent(trials, study.goal, uniforms))
