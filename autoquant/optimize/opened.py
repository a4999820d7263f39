"""A study that is checked and open, whether it was just begun or is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.samplers import BaseSampler

from autoquant.optimize.callbacks import Reporter
from autoquant.selection.schedule import Schedule
from autoquant.session.session import Session
from autoquant.spec.goal import Goal
from autoquant.spec.options import Options
from autoquant.spec.space import SiteSpace
from autoquant.study.ledger import Ledger


@dataclass(frozen=True)
class OpenStudy:
    """What all stages of a search work on.

    - ``ledger``: the study; its trials, if it has some, are gone on from.
    - ``session``: the model with its data, after the preflight.
    - ``spaces``: what each site may be.
    - ``goal``, ``options``: what is searched for, and how.
    - ``out``: the folder, absolute, that the recipe goes to.
    - ``own``: a sampler of the user's own; None for the one that the options name.
    - ``reporter``: hears how it goes.
    - ``began``: when the search did, on the clock of ``time.monotonic``.
    - ``schedule``: what time there is, None for as much as it takes.
    - ``worker``: the number of this process, of several on the study.
    """

    ledger: Ledger
    session: Session
    spaces: Mapping[str, SiteSpace]
    goal: Goal
    options: Options
    out: Path
    own: BaseSampler | None
    reporter: Reporter
    began: float
    schedule: Schedule | None = None
    worker: int = 0


def make_schedule(
    session: Session, options: Options, began: float, *, again: bool = False
) -> Schedule | None:
    """Return the schedule of a search with a --timeout, None without."""
    if options.timeout is None:
        return None
    return Schedule(session, began + options.timeout, again=again)
