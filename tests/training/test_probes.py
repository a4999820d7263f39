"""What the loss does at a step's distance, against derivatives where rounding is fine enough."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.session.session import Session
from autoquant.session.training import lesson_of
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import ESTIMATORS
from autoquant.training.learner import WEIGHT
from autoquant.training.objective import divergence
from autoquant.training.probes import Pupil, directions, slope_along, slopes, traces
from autoquant.training.student import Student
from tests.training.models import KINDS, W2A4, everywhere, opened

FINE = SiteRecipe(WeightScheme(8), ActivationScheme(8))
ONLY_WEIGHTS = SiteRecipe(WeightScheme(8), None)


def pupil_of(session: Session, recipe: SiteRecipe = FINE, estimator: str = "lsq") -> Pupil:
    student = Student(
        session.applier, everywhere(session, recipe), lambda _: ESTIMATORS.get(estimator)()
    )
    lesson = lesson_of(session)
    return Pupil(student, lesson, list(lesson.inputs.batches[:2]))


def noised(pupil: Pupil, size: float = 8.0) -> None:
    """Move all weights, so that the loss has a slope."""
    draw = torch.Generator().manual_seed(5)
    for learner in pupil.student.learners.values():
        own = learner.parameters[WEIGHT]
        with torch.no_grad():
            own.add_(size * torch.randn(own.shape, generator=draw))


def float_loss(session: Session, pupil: Pupil, name: str) -> Any:
    """Return the loss as a function of a layer's weight in units of its grid: a float network."""
    learners, model = pupil.student.learners, session.model
    shapes = {n: learner.slot.target.shape for n, learner in learners.items()}
    weights = {
        f"{n}.weight": (x.integers() * x.scales()).reshape(shapes[n]) for n, x in learners.items()
    }
    session.applier.to_float()
    answers = [model(x).detach() for x in session.splits.calibrate[:2]]
    biases = {k: v for k, v in model.named_parameters() if k.endswith("bias")}

    def loss(positions: Tensor) -> Tensor:
        own = (positions * learners[name].scales()).reshape(shapes[name])
        known = biases | weights | {f"{name}.weight": own}
        pairs = zip(session.splits.calibrate[:2], answers, strict=True)
        return sum(
            (divergence(torch.func.functional_call(model, known, (x,)), y) for x, y in pairs),
            start=torch.zeros(()),
        ) / len(answers)

    return loss


def test_slopes_are_those_of_the_float_network_where_the_grid_is_fine() -> None:
    session = opened("mlp")
    pupil = pupil_of(session, ONLY_WEIGHTS)
    noised(pupil)
    for name, found in slopes(pupil, 100, step=2.0).items():
        learner = pupil.student.learners[name]
        gradient = torch.func.grad(float_loss(session, pupil, name))(learner.integers())
        along = [float((gradient * d).sum()) for d in directions(learner, 100, 0)]
        together = torch.corrcoef(torch.tensor([found, along]))[0, 1]
        assert together > 0.9, name


def test_traces_are_those_of_the_hessian_of_the_float_network() -> None:
    session = opened("mlp", nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)))
    pupil = pupil_of(session, ONLY_WEIGHTS)
    noised(pupil)
    for name, found in traces(pupil, 400, step=1.0).items():
        here = pupil.student.learners[name].integers()
        hessian = torch.func.hessian(float_loss(session, pupil, name))(here).detach()
        trace = float(hessian.reshape(here.numel(), -1).trace())
        assert found == pytest.approx(trace, rel=0.2), name


def test_weights_at_an_end_of_the_grid_have_no_part_in_the_trace() -> None:
    session = opened("mlp")
    pupil = pupil_of(session, SiteRecipe(WeightScheme(2), None))
    for learner in pupil.student.learners.values():
        ends = torch.ones_like(learner.integers(), dtype=torch.bool)
        learner.hold(ends, torch.where(learner.integers() < 0, -2.0, 1.0))
    assert all(math.isnan(found) for found in traces(pupil, 2).values())


def test_gradients_are_those_of_the_loss() -> None:
    session = opened("mlp")
    pupil = pupil_of(session, ONLY_WEIGHTS, "straight_through")
    noised(pupil)
    for name, gradient in pupil.gradients().items():
        learner = pupil.student.learners[name]
        expected = torch.func.grad(float_loss(session, pupil, name))(learner.integers())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)
        true = slope_along(pupil, name, gradient, 1.0)
        assert true == pytest.approx(float(gradient.square().sum()), rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_left_as_it_was(kind: str) -> None:
    session = opened(kind)
    pupil = pupil_of(session, W2A4)
    before = [p.detach().clone() for _, _, p in pupil.student.parameters()]
    x = session.splits.calibrate[0]
    with torch.no_grad():
        y = session.model(x)
    assert any(any(found) for found in slopes(pupil, 2).values())
    assert set(traces(pupil, 2)) == set(pupil.student.learners)
    after = [p.detach() for _, _, p in pupil.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        assert torch.equal(session.model(x), y)


def test_directions_are_always_the_same_and_each_layers_own() -> None:
    learners = list(pupil_of(opened("mlp")).student.learners.values())
    first, again = (list(directions(learners[0], 3, 7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], next(directions(learners[0], 1, 8)))
    one, two = next(directions(learners[0], 1, 0)), next(directions(learners[1], 1, 0))
    assert not torch.equal(one.flatten()[:16], two.flatten()[:16])


def test_along_nothing_there_is_no_slope() -> None:
    pupil = pupil_of(opened("mlp"))
    name, learner = next(iter(pupil.student.learners.items()))
    assert slope_along(pupil, name, torch.zeros_like(learner.parameters[WEIGHT])) == 0.0
