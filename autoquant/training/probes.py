"""What the loss of the quantized network does where one layer's weight is moved at random.

Rounding has no derivative, but the loss has a value on either side. Along a random direction d of a
layer's weight, in steps of its grid, the odd part (L(t) − L(−t)) / 2t is the slope that a gradient
should foretell. The even part (L(t) + L(−t) − 2·L(0)) / t² is dᵀHd, whose mean over directions with
independent entries of variance 1 is the trace of the Hessian (Hutchinson 1990, Communications in
Statistics 19). For that integers are moved to other integers, as training moves them: where in its
cell a weight lies would count as a slope that differs from side to side.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoquant.training.learner import WEIGHT, Learner
from autoquant.training.objective import Seen, loss_of, seeing
from autoquant.training.student import Student
from autoquant.training.trainer import Lesson

STEP = 0.5
"""How far each weight is moved, in steps of its grid, times a standard normal number: far enough
for many to get to another integer."""


class Pupil:
    """A student and what it is asked, to find its loss and the gradients of that.

    The teacher's answers to ``batches`` are found once. Losses are means over batches. ``heed``
    is called before each run of the model and may raise to end it.
    """

    def __init__(
        self,
        student: Student,
        lesson: Lesson,
        batches: Sequence[Any],
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        self.student = student
        self._lesson = lesson
        self._batches = batches
        self._model = student.applier.prepared.model
        self._answers: list[Seen] = []
        self._heed = heed
        for inputs in batches:
            heed()
            with student.teaching(), seeing({}, lesson.scorer) as seen:
                seen.outputs = lesson.run(self._model, inputs)
            self._answers.append(seen)

    def _losses(self) -> Iterator[Tensor]:
        lesson = self._lesson
        for inputs, theirs in zip(self._batches, self._answers, strict=True):
            self._heed()
            with seeing({}, lesson.scorer) as ours:
                ours.outputs = lesson.run(self._model, inputs)
            yield loss_of(ours, theirs, classes=lesson.classes, features=0.0) / len(self._batches)

    def loss(self) -> float:
        """Return the loss inside ``student.learning()``.

        Gradients are on, as a loss without any is an error, but none is taken.
        """
        with torch.enable_grad():
            return sum(float(part.detach()) for part in self._losses())

    def gradients(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the gradient by the weight of each layer, in units of its grid; 0 where none is.

        It is by the estimators that the learners have.
        """
        learners = self.student.learners
        weights = [learner.parameters[WEIGHT] for learner in learners.values()]
        total = [torch.zeros_like(w) for w in weights]
        with torch.enable_grad(), self.student.learning(generator):
            for part in self._losses():
                # The quantizers of the weights ran once, for all batches.
                found = torch.autograd.grad(part, weights, allow_unused=True, retain_graph=True)
                for sum_, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        sum_ += gradient
        return dict(zip(learners, total, strict=True))


def directions(learner: Learner, count: int, seed: int) -> Iterator[Tensor]:
    """Yield ``count`` random directions of a layer's weight, [blocks, n], always the same ones."""
    own = learner.parameters[WEIGHT]
    # A generator heeds no more than 32 bits of its seed.
    key = hashlib.sha256(f"{seed} {learner.site.name}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    for _ in range(count):
        drawn = torch.randn(own.shape, generator=generator, dtype=torch.float32)
        yield drawn.to(own.device)


def slopes(
    pupil: Pupil, count: int, *, step: float = STEP, seed: int = 0
) -> dict[str, tuple[float, ...]]:
    """Return the slopes of the loss along ``count`` random directions of each layer's weight.

    In units of the loss per step of the grid, of the ``directions`` of ``seed``. Two losses each.
    The student is left as it was, the model in float.
    """
    found = {}
    with pupil.student.learning():
        for name, learner in pupil.student.learners.items():
            rows = [_beside(pupil, learner, step * d) for d in directions(learner, count, seed)]
            found[name] = tuple((there - back) / (2 * step) for there, back in rows)
    return found


def traces(pupil: Pupil, count: int, *, step: float = STEP, seed: int = 0) -> dict[str, float]:
    """Return an estimate of the trace of the Hessian by each layer's weight.

    In units of the loss per squared step of its grid, by ``count`` directions and two losses each;
    below 0 it may come out where a layer hardly matters. Weights at the ends of the grid, which
    can't be moved both ways, stay where they are, and count as those that move do. NaN where none
    could be moved. The student is left as it was, the model in float.
    """
    student, found = pupil.student, {}
    with on_the_grid(student), student.learning():
        here = pupil.loss()
        for name, learner in student.learners.items():
            curves = []
            for direction in directions(learner, count, seed):
                move = _both_ways(learner, (step * direction).round())
                size = float(move.square().mean())
                if size:
                    there, back = _beside(pupil, learner, move)
                    curves.append((there + back - 2 * here) / size)
            found[name] = sum(curves) / len(curves) if curves else math.nan
    return found


def _both_ways(learner: Learner, move: Tensor) -> Tensor:
    """Return ``move``, integers, with 0 for the weights that the grid doesn't let go both ways."""
    q = learner.integers()
    free = (learner.integers(q + move) == q + move) & (learner.integers(q - move) == q - move)
    return torch.where(free, move, 0.0)


@contextlib.contextmanager
def on_the_grid(student: Student) -> Iterator[None]:
    """Have all weights lie where they round to inside."""
    learners = student.learners.values()
    kept = [learner.parameters[WEIGHT].detach().clone() for learner in learners]
    for learner in learners:
        everywhere = torch.ones_like(learner.parameters[WEIGHT], dtype=torch.bool)
        learner.hold(everywhere, learner.integers())
    try:
        yield
    finally:
        with torch.no_grad():
            for learner, own in zip(learners, kept, strict=True):
                learner.parameters[WEIGHT].copy_(own)


def _beside(pupil: Pupil, learner: Learner, way: Tensor) -> tuple[float, float]:
    """Return the losses where a weight is moved by ``way``, in steps, and by as much back."""
    own = learner.parameters[WEIGHT]
    start = own.detach().clone()
    losses = []
    try:
        for move in (way, -way):
            with torch.no_grad():
                own.copy_(start + move)
            learner.stand_in(None)
            losses.append(pupil.loss())
    finally:
        with torch.no_grad():
            own.copy_(start)
        learner.stand_in(None)
    return losses[0], losses[1]


def slope_along(pupil: Pupil, name: str, direction: Tensor, step: float = STEP) -> float:
    """Return the slope of the loss along ``direction`` of a layer's weight, of the unit of steps.

    The direction is brought to a root mean square of 1 for the two losses that are measured.
    """
    size = float(direction.square().mean().sqrt())
    if not size:
        return 0.0
    learner = pupil.student.learners[name]
    with pupil.student.learning():
        there, back = _beside(pupil, learner, step / size * direction)
    return (there - back) / (2 * step) * size
