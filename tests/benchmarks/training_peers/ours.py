"""autoquant: layers are fitted to each other, and then trained together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.models.task import outputs_of
from autoquant.session.session import Session
from autoquant.session.training import train_layers
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import SiteRecipe
from tests.benchmarks.training import Case as TrainingCase
from tests.benchmarks.training import recipe_of
from tests.benchmarks.training_peers.cases import Case, Run, load_session
from tests.benchmarks.training_peers.tools import DEFAULT


@dataclass(frozen=True)
class Made:
    """A recipe, and the seconds of the processor that it took: before the first step, and all."""

    session: Session
    sites: Mapping[str, SiteRecipe]
    held: float
    prepared: float
    seconds: float

    @contextlib.contextmanager
    def running(self) -> Iterator[Run]:
        """Have the model compute by the recipe inside, as the reference defines it."""
        session = self.session
        with session.prepared.engine.reference(), session.without_reuse():
            session.applier.apply(self.sites)

            def run(inputs: Any) -> Tensor:
                found: Tensor = outputs_of(session.evaluator.run(session.model, inputs))
                return found

            yield run


def made(case: Case, folder: Path, technique: Distillation | None, seed: int) -> Made:
    """Return what autoquant makes of a case. Its time has all from opening the model on."""
    began = time.process_time()
    session = load_session(case, folder)
    session.reuse()
    likewise = TrainingCase(case.title, case.model, case.weights, case.activations, case.technique)
    sites: Mapping[str, SiteRecipe] = fit_layers(
        session, recipe_of(likewise, session), Sequential()
    )
    session.evaluator.reuse = None
    prepared = time.process_time() - began
    if technique is None:
        session.baseline("search")
        held = session.measure(sites, "search")[0].loss
        return Made(session, sites, held, prepared, prepared)
    found = train_layers(session, sites, technique, seed=seed)
    return Made(session, found.sites, found.after, prepared, time.process_time() - began)


def technique_of(case: Case, options: str, steps: int) -> Distillation:
    """Return how a case is trained with the rates that are named."""
    rates = Distillation() if options == DEFAULT else case.technique
    return replace(rates, steps=steps, batch=case.batch)
