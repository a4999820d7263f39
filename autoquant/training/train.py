"""Training one recipe: steps, checks on held-back data, checkpoints, and the best in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoquant.errors import TrialError
from autoquant.measure.evaluator import OUT_OF_MEMORY
from autoquant.methods.applier import Applier
from autoquant.methods.learned import LearnedWeight
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.training import Training
from autoquant.quant.gradients.format import GradientFormat
from autoquant.spec.recipe import FLOAT32
from autoquant.spec.techniques import ESTIMATORS
from autoquant.training.checkpoint import read_checkpoint, write_checkpoint
from autoquant.training.guard import Finding, vanished
from autoquant.training.held import AS_IT_WAS, BY_CHANCE, Best, Measure, Sites, merged
from autoquant.training.layer_rates import Evidence, evidence_of, layer_rates, needs_evidence
from autoquant.training.probes import Pupil
from autoquant.training.race import Rival, race
from autoquant.training.rates import Rate
from autoquant.training.student import Student
from autoquant.training.trainer import Lesson, Trainer

CHECKS = 10
"""How often the quantized model is measured while it is trained."""

RATES, LAYERS = "rates", "layers"
RATE_NAMES = (
    "weight_rate",
    "scale_rate",
    "bias_rate",
    "activation_rate",
    "curvature_power",
    "mismatch_power",
)

ASKED = 2
"""Batches that what is known of layers is found on."""


@dataclass(frozen=True)
class Step:
    """One step of training that was taken: ``number`` are done now, 0 while sets of rates race.

    ``findings`` are those of this step.
    """

    number: int
    steps: int
    loss: float
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Moment:
    """How training is getting on: what a live view shows.

    ``loss`` is the mean of the steps since the last check, ``held`` the loss on held-back data at
    it, ``best`` the lowest of those, and of what training began with; ``metric`` and ``value`` are
    the task's on that data, None where the model gave nothing that could be measured. ``rates`` are
    those of each site and kind; ``frozen`` is the share of weights that are held since they went
    back and forth, ``lost`` that of weights which rounding alone makes 0; ``findings`` are new.
    """

    step: int
    steps: int
    loss: float
    held: float
    best: float
    frozen: float = 0.0
    findings: tuple[Finding, ...] = ()
    metric: str = ""
    value: float | None = None
    rates: tuple[Rate, ...] = ()
    lost: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What training came to: the best recipe on held-back data, or the one that it began with.

    ``learned`` is what it has learned by digest. ``lost`` are weights that are not 0 in the float
    model and are in the quantized one, before and after, as shares. ``technique`` has the
    rates that it trained with, which won a race of ``rivals`` where there was one; ``layers`` is
    what those of each layer were multiplied by, empty where all learned alike.
    """

    sites: Sites
    learned: Mapping[str, LearnedWeight]
    before: float
    after: float
    steps: int
    findings: tuple[Finding, ...]
    lost: tuple[float, float]
    technique: Training
    rivals: tuple[Rival, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)


def train(
    applier: Applier,
    sites: Sites,
    lesson: Lesson,
    technique: Training,
    measure: Measure,
    *,
    names: Collection[str] | None = None,
    watch: Callable[[Moment], None] = lambda _: None,
    follow: Callable[[Step], None] = lambda _: None,
    heed: Callable[[int], None] = lambda _: None,
    checkpoint: tuple[Path, str] | None = None,
) -> Trained:
    """Train the quantized layers of a recipe and return the best of what ``measure`` was shown.

    With ``names`` those layers alone are trained, and the others are in float while they are.
    ``watch`` hears each check, ``follow`` each step that was taken, ``heed`` each that is to come,
    and may raise to end it. A ``checkpoint``, (file, what
    it is of), is written at each check and gone on from. The model is left in float; what is
    returned is in ``applier.learned``. Raises TrialError where the user's code fails, or where
    nothing has a gradient.
    """
    start = measure(sites)
    before = start.loss
    student = student_of(applier, sites, technique, names)
    lost = lost_of(student)
    device = next(iter(student.learners.values())).device
    state = None if checkpoint is None else read_checkpoint(*checkpoint, device)
    rivals: list[Rival] = []
    asked: list[Finding] = []
    layers: Mapping[str, float] = {}
    if state is not None:
        technique, layers = replace(technique, **state[RATES]), state[LAYERS]
    elif isinstance(technique, Distillation):
        found_out = _Known(student, lesson, technique.batch, heed)
        if technique.rivals > 1:
            run = _Attempt(applier, sites, lesson, measure, heed, follow, found_out)
            technique, rivals = race(technique, run, lesson.seed)
        layers, asked = found_out.layers(technique), found_out.findings
    rates = {name: getattr(technique, name) for name in RATE_NAMES if hasattr(technique, name)}
    trainer = Trainer(student, lesson, technique, layers)
    trainer.findings += asked
    best = Best(student, before)
    if state is not None:
        trainer.load(state)
        trainer.keep()
        best.load(state)
    every = max(1, technique.steps // CHECKS)
    told = 0 if state is None else len(trainer.findings)
    while trainer.done < technique.steps and not best.hopeless:
        heed(trainer.done)
        known = len(trainer.findings)
        try:
            trainer.step()
        finally:
            student.rest()
        taken = tuple(trainer.findings[known:])
        follow(Step(trainer.done, technique.steps, trainer.losses[-1], taken))
        if trainer.done % every and trainer.done < technique.steps:
            continue
        trainer.check()
        with trainer.averaged():
            held, lost_now = best.look(measure), lost_of(student)
        mean = sum(trainer.losses) / max(len(trainer.losses), 1)
        trainer.losses.clear()
        trainer.keep()
        if checkpoint is not None:
            kept = merged(trainer.state(), best.state()) | {RATES: rates, LAYERS: layers}
            write_checkpoint(checkpoint[0], kept, checkpoint[1])
        new, told = tuple(trainer.findings[told:]), len(trainer.findings)
        watch(
            Moment(
                trainer.done,
                technique.steps,
                mean,
                held.loss,
                best.loss,
                trainer.frozen,
                new,
                held.metric,
                held.value,
                trainer.rates(),
                lost_now,
            )
        )
    best.restore()
    after, found, learned = before, dict(sites), dict[str, LearnedWeight]()
    findings = list(trainer.findings)
    if best.loss < before:  # measured once more, which whoever measures may remember
        if best.look(measure).clearly_less_than(start):
            after = best.loss
            found, learned = student.solution()
        else:
            findings.append(Finding(trainer.done, "", BY_CHANCE, AS_IT_WAS))
    applier.learned.update(learned)
    student.rest()
    return Trained(
        found,
        learned,
        before,
        after,
        trainer.done,
        tuple(findings),
        (lost, lost_of(student)),
        technique,
        tuple(rivals),
        layers,
    )


def student_of(
    applier: Applier, sites: Sites, technique: Training, names: Collection[str] | None = None
) -> Student:
    """Return the student of a recipe; TrialError where it quantizes no weight to train."""
    gradients = None
    if technique.gradients != FLOAT32:
        gradients = GradientFormat(technique.gradients, technique.gradient_rounding)
    estimator = ESTIMATORS.get(technique.estimator)()
    student = Student(applier, sites, lambda _: estimator, gradients, names)
    if not student.learners:
        raise TrialError("the recipe quantizes no weight that could be trained")
    return student


class _Known:
    """What is found out of each layer at the start, once it is asked for.

    Where its batches don't fit the memory they are halved, which is among the ``findings``.
    """

    def __init__(
        self, student: Student, lesson: Lesson, batch: int, heed: Callable[[int], None]
    ) -> None:
        self._student, self._lesson, self._batch = student, lesson, batch
        self._heed = heed
        self._evidence: Evidence | None = None
        self.findings: list[Finding] = []

    def layers(self, technique: Distillation) -> dict[str, float]:
        if not needs_evidence(technique):
            return {}
        while self._evidence is None:
            try:
                self._evidence = self._ask()
            except OUT_OF_MEMORY:
                if self._batch == 1:
                    raise
                self._batch //= 2
                done = f"layers are asked about by batches of {self._batch}"
                self.findings.append(Finding(0, "", "out of memory", done))
            finally:
                self._student.rest()
        return layer_rates(self._evidence, technique)

    def _ask(self) -> Evidence:
        inputs, order = self._lesson.inputs, self._lesson.inputs.order(self._batch, 0)
        batches = [inputs.at(order.places(i)) for i in range(min(ASKED, order.length))]
        pupil = Pupil(self._student, self._lesson, batches, lambda: self._heed(0))
        return evidence_of(pupil, self._lesson.seed)


class _Attempt:
    """Trains from the start, as many steps as a technique has, and measures what comes of it."""

    def __init__(
        self,
        applier: Applier,
        sites: Sites,
        lesson: Lesson,
        measure: Measure,
        heed: Callable[[int], None],
        follow: Callable[[Step], None],
        known: _Known,
    ) -> None:
        self._applier, self._sites, self._lesson = applier, sites, lesson
        self._measure, self._heed = measure, heed
        self._follow, self._known = follow, known

    def __call__(self, technique: Distillation) -> float:
        student = student_of(self._applier, self._sites, technique)
        trainer = Trainer(student, self._lesson, technique, self._known.layers(technique))
        while trainer.done < technique.steps:
            self._heed(0)
            try:
                trainer.step()
            finally:
                student.rest()
            self._follow(Step(0, technique.steps, trainer.losses[-1]))
        with trainer.averaged():
            return Best(student, math.inf).look(self._measure).loss


def lost_of(student: Student) -> float:
    """Return the share of weights that are 0 in the quantized model alone."""
    counts = [vanished(learner) for learner in student.learners.values()]
    return sum(gone for gone, _ in counts) / max(sum(alive for _, alive in counts), 1)
