"""What is trained of a site: it starts as the recipe is, and ends as a recipe that is it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.session.session import Session
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.techniques import ESTIMATORS
from autoquant.training.learner import ACTIVATION, BIAS, EDGE, SCALE, WEIGHT, spread
from autoquant.training.student import Student
from tests.training.models import KINDS, W3A8, ZEROS_IN_GROUPS, everywhere, inputs, opened


def student_of(session: Session, recipe: SiteRecipe = W3A8, *, fitted: bool = False) -> Student:
    sites = everywhere(session, recipe)
    if fitted:
        sites = fit_layers(session, sites, Sequential())
    return Student(session.applier, sites, lambda _: ESTIMATORS.get("lsq")())


def outputs(session: Session, student: Student) -> torch.Tensor:
    with torch.no_grad(), student.learning():
        return session.model(inputs(40, 1))


def reference(session: Session, sites: dict[str, SiteRecipe]) -> torch.Tensor:
    session.applier.apply(sites)
    with session.prepared.engine.reference(), torch.no_grad():
        y = session.model(inputs(40, 1))
    session.applier.to_float()
    return y


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("recipe", [W3A8, ZEROS_IN_GROUPS], ids=["channels", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_recipe(kind: str, recipe: SiteRecipe, fitted: bool) -> None:
    session = opened(kind)
    if recipe is ZEROS_IN_GROUPS and kind == "images":
        recipe = replace(recipe, weight=WeightScheme(3, "per_channel", "asymmetric"))
    student = student_of(session, recipe, fitted=fitted)
    assert len(student.learners) == len(session.prepared.sites)
    wanted = reference(session, dict(student.sites))
    torch.testing.assert_close(outputs(session, student), wanted, rtol=1e-4, atol=1e-4)
    for name, learner in student.learners.items():
        start = session.applier.held(name, student.sites[name])
        found, activation = learner.solution()
        assert torch.equal(found.q, start.quantized.q), name
        torch.testing.assert_close(found.scale, start.quantized.qparams.scale)
        assert torch.equal(found.zero_point, start.quantized.qparams.zero_point)
        if activation is not None and activation.scale is not None:
            assert activation.scale == pytest.approx(student.sites[name].activation.scale, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_and_no_other_has(kind: str) -> None:
    session = opened(kind)
    student = student_of(session)
    rows = list(student.parameters())
    with torch.enable_grad(), student.learning():
        loss = session.model(inputs(40, 1)).square().sum()
        found = torch.autograd.grad(loss, [p for _, _, p in rows])
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in found)
    assert all(p.grad is None for p in session.model.parameters())
    kinds = {(name, kind) for name, kind, _ in rows}
    for site in session.prepared.sites:
        assert {(site.name, WEIGHT), (site.name, SCALE)} <= kinds
        assert ((site.name, BIAS) in kinds) == site.corrects
        assert ((site.name, ACTIVATION) in kinds) == site.activation


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_ends_as_is_a_recipe_that_computes_the_same(kind: str) -> None:
    session = opened(kind)
    student = student_of(session)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # wherever training may have taken it
        for _, kind_, parameter in student.parameters():
            size = 1.0 if kind_ == WEIGHT else 0.05
            parameter += size * torch.randn(parameter.shape, generator=draw)
    wanted = outputs(session, student)
    sites, learned = student.solution()
    session.applier.learned.update(learned)
    torch.testing.assert_close(reference(session, sites), wanted, rtol=1e-4, atol=1e-4)
    for weight in learned.values():
        assert int(weight.q.min()) >= -4
        assert int(weight.q.max()) <= 3


def test_a_transformed_input_is_trained_on_its_other_side() -> None:
    session = opened("mlp")
    from autoquant.nn.transforms import transform_as

    transform_as(session.prepared, {"2": "hadamard_16"})
    student = student_of(session)
    wanted = reference(session, dict(student.sites))
    torch.testing.assert_close(outputs(session, student), wanted, rtol=1e-4, atol=1e-4)


def test_sites_in_float_stay_so_and_the_model_is_left_in_float() -> None:
    session = opened("mlp")
    whole = session.model(inputs(40, 1))
    sites = everywhere(session) | {"2": SiteRecipe()}
    student = Student(session.applier, sites, lambda _: ESTIMATORS.get("lsq")())
    assert list(student.learners) == ["0", "4"]
    assert not torch.equal(outputs(session, student), whole)
    assert torch.equal(session.model(inputs(40, 1)), whole)
    assert not any(slot.is_watched for slot in session.prepared.slots.values())


def test_weights_are_spread_over_their_cells() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = 3 * torch.randn(50, 40, generator=draw)
    near = wanted.round()
    assert torch.equal(spread(near, wanted).round(), near)
    inner = (wanted - near).abs() < EDGE
    assert torch.equal(spread(near, wanted)[inner], (near + (wanted - near))[inner])
    moved = near + 2.0  # two cells away, on the side of the float weight
    found = spread(moved, wanted) - moved
    assert float(found.max()) <= 0.0
    assert float(found.min()) >= -EDGE
    assert float(found.std()) > 0.1  # not all in one place
    assert torch.equal(spread(moved, wanted), spread(moved, wanted))
