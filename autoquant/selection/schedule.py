"""What is left of --timeout, and what it has to last for: profile, trials, confirmation.

What a pass over the data takes is measured as the search goes: of the float model in the preflight,
of candidates in the uniform trials, of the reference on one batch. From that follows what the
confirmation will take, which is kept free; the trials have the rest.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

from autoquant.models.evidence import FEWEST_RESAMPLES, FunctionEvidence
from autoquant.models.noninferiority import drop_interval
from autoquant.selection.finalists import FINALISTS
from autoquant.session.session import Session

PROFILE = 0.4
"""Share of the time beside the confirmation that the profile may take."""
TUNING = 0.3
"""Share of the time from the first trial on, beside the confirmation, that tuning has."""
CONFIRMATION = 0.4
"""Share of the time from the first trial on that more than one finalist may take."""
INTERVAL = 0.5
"""Share of that time that the interval of the drop may take; a longer one is left out."""
CHEAP = 0.5
"""Seconds of an interval that is never left out, however late it is."""
EXACT = 3.0
"""Times of the float model that the reference takes, as long as it was not measured."""
RECENT = 5
"""Trials from which the time of the next one is foretold."""


class Schedule:
    """Plans a search of a ``session`` that has to be over at ``deadline``.

    ``deadline`` is on the clock of ``time.monotonic``; the float model was measured on the search
    split. ``again`` says that finalists may have been measured in another process, and have to be
    measured again. ``skipped`` says in words what there was no time for.
    """

    def __init__(self, session: Session, deadline: float, *, again: bool = False) -> None:
        self._session = session
        self._deadline = deadline
        self._again = again
        self._exact: float | None = None
        self._candidates: list[float] = []
        self._trials: deque[float] = deque(maxlen=RECENT)
        base = session.baseline("search")
        self._float = base.seconds
        samples = session.splits.samples
        confirms = session.evaluator.confirms
        self._share = samples["confirm"] / max(samples["search"], 1) if samples["search"] else 1.0
        self._share = self._share if confirms else 0.0
        self._interval = _seconds_of_interval(session)
        self._finalists = FINALISTS
        self._intervals = True
        self._tuning = 0.0
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._deadline - time.monotonic()

    @property
    def least(self) -> float:
        """The seconds that a single trial and its confirmation take at least."""
        return self._float * (2 + 3 * self._share)

    @property
    def for_profile(self) -> float:
        """The seconds that the profile may take."""
        return PROFILE * (self.left - self.confirmation(1) - self._float)

    @property
    def for_trials(self) -> float:
        """The seconds that are left for trials."""
        return self.for_tuning - self._tuning

    @property
    def for_tuning(self) -> float:
        """The seconds that are left for tuning, once the trials are over."""
        return self.left - self.confirmation(self._finalists)

    def begin_trials(self, *, tunes: bool = False) -> None:
        """Say how much of the time from here on is kept for the confirmation, and for tuning."""
        self._intervals = self._interval * self._share <= INTERVAL * self.left
        self._finalists = max(self._affordable(CONFIRMATION * self.left), 1)
        self._tuning = TUNING * max(self.for_tuning, 0.0) if tunes else 0.0

    def late(self) -> bool:
        """Return whether there is no time for another trial.

        The first one is tried wherever it may fit: without one there is no recipe at all.
        """
        if not self._trials and not self._again:
            return self.left < self.least
        return self.for_trials < (statistics.median(self._trials) if self._trials else self._float)

    def trial(self, seconds: float) -> None:
        """Take note of how long a trial took, with all that belongs to it."""
        self._trials.append(seconds)

    def candidate(self, seconds: float) -> None:
        """Take note of how long a candidate took on the search split, computed in full."""
        self._candidates.append(seconds)

    def exact(self, seconds: float | None) -> None:
        """Take note of how long the reference takes on the search split, where that is known."""
        self._exact = EXACT * self._float if seconds is None else seconds

    @property
    def knows_exact(self) -> bool:
        """Whether ``exact`` was told."""
        return self._exact is not None

    def confirmation(self, finalists: int) -> float:
        """Return the seconds that confirming so many takes, the choice by the reference."""
        candidate = statistics.median(self._candidates) if self._candidates else self._float
        exact = EXACT * self._float if self._exact is None else self._exact
        each = candidate * (self._share + (1 if self._again else 0))
        interval = self._interval * self._share if self._intervals else 0.0
        return self._float * self._share + finalists * each + exact * (1 + self._share) + interval

    def _affordable(self, seconds: float, most: int = FINALISTS) -> int:
        return sum(self.confirmation(n) <= seconds for n in range(1, most + 1))

    def finalists(self, there_are: int) -> int:
        """Return how many of the finalists there is time for, and note it where not for all."""
        fit = max(self._affordable(self.left, there_are), 1)
        if fit < there_are:
            self.skipped.append(f"{there_are - fit} of {there_are} finalists, not confirmed")
        return fit

    def affords_interval(self, split: str) -> bool:
        """Return whether there is time to say how sure the choice's drop on a split is."""
        seconds = self._interval * (1.0 if split == "search" else self._share)
        what = f"how sure the drop on the {split} data is, which takes about {seconds:.0f} s"
        return self._noted(seconds <= max(self.left, CHEAP), what)

    def affords_comparison(self) -> bool:
        """Return whether there is time to say how sure the difference of two finalists is."""
        spare = max(self.left - self.confirmation(0), CHEAP)
        return self._noted(self._interval * self._share <= spare, "how sure finalists differ")

    def _noted(self, affordable: bool, what: str) -> bool:
        if not affordable and what not in self.skipped:
            self.skipped.append(what)
        return affordable


def _seconds_of_interval(session: Session) -> float:
    """Return what the interval of one drop takes on the search split."""
    base = session.baseline("search")
    evidence = base.evidence
    if evidence is None:
        return 0.0
    start = time.monotonic()
    if isinstance(evidence, FunctionEvidence):
        evidence.score()
        return 2 * FEWEST_RESAMPLES * (time.monotonic() - start)
    drop_interval(evidence, evidence, base.metric)
    return time.monotonic() - start
