"""A model of the zoo at few bits, fitted, and short trainings that differ in one thing alone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autoquant.methods.applier import Applier
from autoquant.methods.learned import LearnedWeight
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.quant.gradients.format import GradientFormat
from autoquant.session.session import Session
from autoquant.session.training import lesson_of
from autoquant.session.tuning import fit_layers
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import FLOAT32, SiteRecipe
from autoquant.spec.techniques import ESTIMATORS, Estimator
from autoquant.training.layer_rates import Evidence, evidence_of, layer_rates, needs_evidence
from autoquant.training.probes import Pupil
from autoquant.training.student import Student
from autoquant.training.trainer import Lesson, Trainer
from tests.benchmarks.training import CASES, Case, recipe_of, session_of

Sites = Mapping[str, SiteRecipe]
Make = Callable[[Student, Lesson, Distillation, Mapping[str, float]], Trainer]


@dataclass(frozen=True)
class Outcome:
    """What a training came to: the loss on the confirm split, and those of its steps.

    ``loss`` is inf where training came to no number. ``sites`` is the recipe that was learned.
    """

    loss: float
    steps: tuple[float, ...]
    findings: int
    sites: Sites = field(default_factory=dict)

    def reached(self, loss: float, mean: int = 10) -> int | None:
        """Return the step from which the mean of ``mean`` steps is at most ``loss``."""
        for end in range(mean, len(self.steps) + 1):
            if sum(self.steps[end - mean : end]) / mean <= loss:
                return end
        return None


class Lab:
    """One case of ``tests.benchmarks.training``, at other bits where they are given."""

    def __init__(self, name: str, weights: int | None = None, activations: int | None = None):
        own = CASES[name]
        self.case: Case = replace(
            own,
            weights=own.weights if weights is None else weights,
            activations=own.activations if activations is None else activations,
        )

    @property
    def title(self) -> str:
        """The model and its bits."""
        named = self.case.title.split(", W")[0]
        return f"{named}, W{self.case.weights} A{self.case.activations}"

    @cached_property
    def session(self) -> Session:
        """The session."""
        with tempfile.TemporaryDirectory() as folder:
            session = session_of(self.case, Path(folder))
        session.baseline("search")
        session.baseline("confirm")
        return session

    @cached_property
    def lesson(self) -> Lesson:
        """What is learned from."""
        return lesson_of(self.session)

    @cached_property
    def start(self) -> Sites:
        """The uniform recipe, its layers fitted to each other."""
        session = self.session
        session.reuse()
        found = fit_layers(session, recipe_of(self.case, session), Sequential())
        session.evaluator.reuse = None
        return found

    def student(
        self,
        estimator: Estimator | None = None,
        gradients: GradientFormat | None = None,
        start: Sites | None = None,
    ) -> Student:
        """Return a student that is at the start."""
        chosen = ESTIMATORS.get("lsq")() if estimator is None else estimator
        own = self.start if start is None else start
        return Student(self.session.applier, own, lambda _: chosen, gradients)

    @cached_property
    def _judge(self) -> Pupil:
        batches = [batch[0] for batch in self.session.splits.confirm]
        return Pupil(self.student(), self.lesson, batches)

    def loss_of(self, student: Student) -> float:
        """Return the loss of a student on the confirm split, by the estimators that it has."""
        self._judge.student = student
        with student.learning():
            found = self._judge.loss()
        return found if math.isfinite(found) else math.inf

    def asked(self, count: int = 2, size: int = 64) -> list[Any]:
        """Return batches of what is learned from, to ask about gradients."""
        order = self.lesson.inputs.order(size, 0)
        return [self.lesson.inputs.at(order.places(i)) for i in range(min(count, order.length))]

    @cached_property
    def evidence(self) -> Evidence:
        """What is known of each layer before training."""
        return evidence_of(Pupil(self.student(), self.lesson, self.asked()))

    def train(
        self,
        technique: Distillation,
        seed: int,
        *,
        estimator: Estimator | None = None,
        start: Sites | None = None,
        make: Make = Trainer,
    ) -> Outcome:
        """Train from the start, and judge the mean of the way; nothing is chosen on the way."""
        gradients = None
        if technique.gradients != FLOAT32:
            gradients = GradientFormat(technique.gradients, technique.gradient_rounding)
        if estimator is None:
            estimator = ESTIMATORS.get(technique.estimator)()
        student = self.student(estimator, gradients, start)
        layers = layer_rates(self.evidence, technique) if needs_evidence(technique) else {}
        trainer = make(student, replace(self.lesson, seed=seed), technique, layers)
        every = max(1, technique.steps // 10)
        while trainer.done < technique.steps:
            trainer.step()
            if trainer.done % every == 0:  # as ``train`` does, so that the guard works as there
                trainer.check()
                trainer.keep()
        for learner in student.learners.values():
            learner.gradients = None  # nothing is trained from here on
        with trainer.averaged():
            loss = self.loss_of(student)
            sites, learned = student.solution()
        student.rest()
        self.session.applier.learned.update(learned)
        return Outcome(loss, tuple(trainer.losses), len(trainer.findings), sites)

    def metric(self, sites: Sites) -> float:
        """Return the task's metric of a recipe on the confirm split."""
        with self.session.without_reuse():
            return self.session.measure(sites, "confirm")[1].value

    @property
    def float_metric(self) -> float:
        """The task's metric of the float model on the confirm split."""
        return self.session.baseline("confirm").value

    def on_finer_grids(self, bits: int) -> tuple[Sites, int]:
        """Return the start on the grids of more bits, as ``refined`` does."""
        return refined(self.start, bits, self.session.applier)


def refined(sites: Sites, bits: int, applier: Applier) -> tuple[Sites, int]:
    """Return sites with the same real weights on the grids of ``bits``, finer ones.

    And how many steps of those a step of theirs is. What is new is put to what the applier has
    learned.
    """
    found, ratio = dict(applier.apply(sites)), 1
    applier.to_float()
    for name, site in found.items():
        held = applier.held(name, site)
        if held is None or site.weight is None:
            continue
        coarse, fine = FORMATS[site.weight.bits], FORMATS[bits]
        ratio = min(fine.qmax // coarse.qmax, fine.qmin // coarse.qmin)
        if ratio == 1:
            continue
        own, p = held.quantized, held.quantized.qparams
        shift = torch.zeros(0, dtype=torch.float32) if held.shift is None else held.shift
        finer = LearnedWeight(own.q * ratio, p.scale / ratio, p.zero_point, shift)
        applier.learned[finer.digest] = finer
        found[name] = replace(site, weight=replace(site.weight, bits=bits), learned=finer.digest)
    return found, ratio
