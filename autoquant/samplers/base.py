"""What a sampler is to a search, and what one is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optuna.trial import FrozenTrial

from autoquant.selection.schedule import Schedule
from autoquant.session.session import Session
from autoquant.spec.goal import Goal
from autoquant.spec.options import Options
from autoquant.spec.recipe import SiteRecipe
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap
from autoquant.study.rank_correlation import Fidelity


@dataclass
class Proposal:
    """The parameters of the next trial. ``system_attrs`` is what the sampler keeps with it."""

    params: dict[str, Any]
    system_attrs: dict[str, Any] = field(default_factory=dict)


class Forecast(Protocol):
    """What a sampler that models the losses of recipes says of those that nobody measured."""

    def expected_gain(self, trials: Sequence[FrozenTrial]) -> float | None:
        """Return what more trials could gain, as a share of the objective; None if not known."""

    def cheaper(
        self, trials: Sequence[FrozenTrial], losses: Sequence[float]
    ) -> list[dict[str, SiteRecipe]]:
        """Return the cheapest recipes that lose so many times the loss of the maximum drop.

        Each once, and none that costs as much as the best trial: what may yet be repaired.
        """

    def front(self, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """Return the best recipes from the cheapest on, as foretold: the rows a study keeps."""

    def fidelity(self, trials: Sequence[FrozenTrial]) -> Fidelity | None:
        """Return how well the losses of ``trials`` were foretold; None where that can't be said."""


class Proposer(Protocol):
    """Proposes the trials of a study, one at a time.

    The life of a trial's proposal:

    1. The loop counts the trials of the study and asks ``propose`` for that number.
    2. It decodes the parameters to a recipe and measures it. The sampler has no part in that, and
       hears nothing of a candidate whose process is killed: that number is proposed again.
    3. However it ended (complete; stopped early, or ruled out by arithmetic: pruned; failed), the
       trial goes to ``told``, which returns it with what the sampler keeps in its system
       attributes. Only then is it written, in one write: what a sampler keeps with the study is
       never ahead of the trials.

    A study is resumed with a new proposer, made from its trials. What it proposes must be a
    function of the seed, the number and these trials, so that a resumed study gives the trials of
    an uninterrupted one: nothing that only the process knows may matter.

    Several processes may work on one study. Each has a proposer of its own, which is told of its
    own trials alone and finds those of others, if it looks, in the ledger; so two may be asked for
    the same number, and the number of the worker has to make their proposals differ.
    """

    @property
    def forecast(self) -> Forecast | None:
        """What the sampler foretells; None for one that foretells nothing."""

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Take note of a finished trial, and return it as it should be written.

        UserError where a sampler of the user's own fails at that: the trial stays what it is.
        """


@dataclass(frozen=True)
class Context:
    """What a sampler may be made from.

    - ``ledger``: the study, with its trials so far and what was noted of it.
    - ``session``: the model with its data, to profile it.
    - ``mapping``: the space, as parameters.
    - ``goal``, ``options``: what is searched for, and the seed.
    - ``worker``: the number of this process, of several on the study.
    - ``schedule``: what time there is, None for as much as it takes.
    - ``say``: is told, in one line each, what takes time or was found.
    """

    ledger: Ledger
    session: Session
    mapping: ParameterMap
    goal: Goal
    options: Options
    worker: int = 0
    schedule: Schedule | None = None
    say: Callable[[str], None] = lambda _: None


Make = Callable[[Context], Proposer]
"""Makes the proposer of one study in one process: a row of the registry."""
