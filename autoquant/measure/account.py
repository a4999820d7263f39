"""Whether keeping results pays: what it has cost, and what came back."""

from __future__ import annotations

import time

LENT = 2.0
"""Evaluations whose time may be spent on keeping results before any of it has come back."""
LOST = 0.02
"""Share of all evaluations' time that may be spent beyond that: what pays may come to pay later."""


class Account:
    """Seconds that keeping results has cost and that they have saved, beside those of all calls.

    Where a model is so fast that copies of its results cost more than they save, none are made:
    what was spent is never much more than what came back.
    """

    def __init__(self) -> None:
        self.spent = self.earned = self._worked = self._began = self._before = 0.0
        self._inside = False

    def begin(self) -> None:
        """Note that the model begins to run."""
        self._inside, self._began, self._before = True, time.perf_counter(), self.spent

    def end(self) -> None:
        """Note that it has ended."""
        self._worked += self._running()
        self._inside = False

    def affords(self, evaluations: int) -> bool:
        """Return whether more may be spent, in the last of so many evaluations."""
        worked = self._worked + self._running()
        return self.spent <= self.earned + worked * (LOST + LENT / evaluations)

    def _running(self) -> float:
        """Return how long the model has run by now, without what keeping has taken."""
        if not self._inside:
            return 0.0
        return time.perf_counter() - self._began - (self.spent - self._before)
