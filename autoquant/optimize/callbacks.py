"""Whoever hears the whole of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from optuna.trial import FrozenTrial

from autoquant.optimize.loop import Listener, Stop
from autoquant.session.preflight import Preflight
from autoquant.spec.goal import Goal
from autoquant.training.train import Moment, Step
from autoquant.training.turn import BlockDone


class Reporter(Listener, Protocol):
    """Hears the whole of a search; see the command line's for one that draws."""

    def say(self, text: str) -> None:
        """A stage began."""

    def preflight(self, found: Preflight) -> None:
        """The preflight is over."""

    def begin(self, study: str, goal: Goal, done: Sequence[FrozenTrial], stop: Stop) -> None:
        """The trials begin."""

    def trained(self, step: Step) -> None:
        """A step of training was taken, of the trial in flight."""

    def checked(self, moment: Moment) -> None:
        """The model was measured while it is trained."""

    def block(self, done: BlockDone) -> None:
        """One block of the model was trained."""


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

    def trained(self, step: Step) -> None:
        """Do nothing."""

    def checked(self, moment: Moment) -> None:
        """Do nothing."""

    def block(self, done: BlockDone) -> None:
        """Do nothing."""
