"""Training a recipe: it gets better, is never worse, and goes on after it was killed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.quant.gradients.format import GradientFormat
from autoquant.session.session import Session
from autoquant.session.training import train_layers
from autoquant.spec.gradients import GRADIENT_GRIDS
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.techniques import ESTIMATORS, RECONSTRUCTIONS, technique_of
from autoquant.training.learner import WEIGHT
from autoquant.training.schedule import rate_at
from autoquant.training.student import Student
from autoquant.training.train import CHECKS, Moment, Step, Trained
from autoquant.training.trainer import Trainer
from tests.training.models import KINDS, W2A4, W3A8, everywhere, opened, task_of

SHORT = Distillation(
    steps=60, weight_rate=0.02, scale_rate=2e-3, bias_rate=3e-3, activation_rate=2e-3
)


def trained(session: Session, recipe: SiteRecipe = W3A8, **words: Any) -> Trained:
    technique = words.pop("technique", SHORT)
    return train_layers(session, everywhere(session, recipe), technique, **words)


def loss(session: Session, sites: Any, split: str = "confirm") -> float:
    session.baseline(split)
    return session.measure(sites, split)[0].loss


@pytest.mark.parametrize("recipe", [W3A8, W2A4], ids=["W3A8", "W2A4"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_the_loss_less_on_data_that_it_has_not_seen(kind: str, recipe: SiteRecipe) -> None:
    session = opened(kind)
    before = loss(session, everywhere(session, recipe))
    moments: list[Moment] = []
    found = trained(session, recipe, watch=moments.append)
    assert found.after < found.before
    assert loss(session, found.sites) < before
    assert found.after == min(m.held for m in moments)
    assert found.after == pytest.approx(loss(session, found.sites, "search"), rel=1e-12)
    assert [m.step for m in moments][:2] == [60 // CHECKS, 2 * (60 // CHECKS)]
    assert moments[-1].loss < moments[0].loss


def test_what_a_check_tells_is_what_the_model_gives() -> None:
    session = opened("mlp")
    moments: list[Moment] = []
    found = trained(session, watch=moments.append)
    best = min(moments, key=lambda m: m.held)
    assert best.metric == session.baseline("search").metric.name
    assert best.value == session.measure(found.sites, "search")[1].value
    assert best.lost == found.lost[1]
    learners = {name for name, site in found.sites.items() if site.learned}
    for moment in moments:
        assert {row.site for row in moment.rates} == learners
        assert all(row.share == 1.0 for row in moment.rates)
    weights = [[r.rate for r in m.rates if r.kind == WEIGHT] for m in moments]
    assert all(len(set(row)) == 1 for row in weights)
    assert [row[0] for row in weights] == [
        SHORT.weight_rate * rate_at(m.step - 1, 60, 3) for m in moments
    ]


def test_each_step_is_told_with_its_loss_and_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Trainer._gradients

    def poisoned(self: Trainer, number: int):
        loss, gradients = own(self, number)
        return (loss * math.nan if number == 22 else loss), gradients

    monkeypatch.setattr(Trainer, "_gradients", poisoned)
    steps: list[Step] = []
    moments: list[Moment] = []
    found = trained(opened("mlp"), watch=moments.append, follow=steps.append)
    assert [s.number for s in steps] == list(range(1, 61))
    assert [s.number for s in steps if math.isnan(s.loss)] == [23]
    assert steps[22].findings == found.findings == moments[3].findings
    every = 60 // CHECKS
    for moment in moments[:3]:
        own_losses = [s.loss for s in steps[moment.step - every : moment.step]]
        assert moment.loss == pytest.approx(sum(own_losses) / every)
    assert {row.share for row in moments[2].rates} == {1.0}
    assert {row.share for row in moments[3].rates} == {0.5}


def test_a_race_tells_its_steps_as_none_of_training() -> None:
    steps: list[Step] = []
    technique = replace(SHORT, steps=20, rivals=2)
    trained(opened("mlp"), technique=technique, follow=steps.append)
    race = [s for s in steps if not s.number]
    assert steps[: len(race)] == race
    assert [s.number for s in steps[len(race) :]] == list(range(1, 21))
    assert len(race) > 2


def test_a_value_that_cannot_be_measured_is_none() -> None:
    session = opened("mlp")
    own, moments = session.measure, list[Moment]()
    calls = iter(range(100))

    def broken(*args: Any, **words: Any) -> Any:
        if next(calls) == 2:
            raise TrialError("not finite")
        return own(*args, **words)

    session.measure = broken  # type: ignore[method-assign]
    trained(session, watch=moments.append)
    assert [m.value is None for m in moments[:3]] == [False, True, False]
    assert math.isinf(moments[1].held)


def test_where_nothing_is_gained_the_recipe_is_as_it_was() -> None:
    session = opened("mlp")
    sites = everywhere(session)
    none = replace(SHORT, weight_rate=0.0, scale_rate=0.0, bias_rate=0.0, activation_rate=0.0)
    found = train_layers(session, sites, none)
    assert found.sites == sites
    assert not found.learned
    assert found.before == found.after
    # Rates with which nothing can be learned do harm, and that is seen as well.
    wild = replace(SHORT, weight_rate=1.0, scale_rate=1.0, bias_rate=1.0, activation_rate=1.0)
    found = train_layers(session, sites, wild)
    assert found.after <= found.before
    assert loss(session, found.sites, "search") <= loss(session, sites, "search")


def test_it_ends_where_nothing_gets_better() -> None:
    session = opened("mlp")
    none = replace(SHORT, weight_rate=0.0, scale_rate=0.0, bias_rate=0.0, activation_rate=0.0)
    assert train_layers(session, everywhere(session), none).steps < 60


class _Killed(BaseException):
    pass


def same(a: Trained, b: Trained) -> bool:
    return set(a.learned) == set(b.learned) and (a.after, a.steps) == (b.after, b.steps)


@pytest.mark.parametrize("estimator", ["lsq", "stochastic"])
@pytest.mark.parametrize("at", [3, 13, 30])
def test_killed_and_resumed_is_as_if_it_never_was(tmp_path: Path, at: int, estimator: str) -> None:
    technique = replace(SHORT, estimator=estimator)
    whole = trained(opened("mlp"), technique=technique)
    file = tmp_path / "c.safetensors"

    def killed(step: int) -> None:
        if step == at:
            raise _Killed

    with pytest.raises(_Killed):
        trained(opened("mlp"), technique=technique, checkpoint=file, heed=killed)
    assert file.exists() == (at >= 6)
    seen: list[int] = []
    again = trained(opened("mlp"), technique=technique, checkpoint=file, heed=seen.append)
    assert seen[0] == at - at % 6
    assert same(whole, again)


def test_what_goes_astray_after_it_was_resumed_goes_back_to_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer._gradients

    def poisoned(self: Trainer, number: int):
        loss, gradients = own(self, number)
        return (loss * math.nan if number == 22 else loss), gradients

    monkeypatch.setattr(Trainer, "_gradients", poisoned)
    whole = trained(opened("mlp"))
    assert [f.step for f in whole.findings] == [22]
    file = tmp_path / "c.safetensors"

    def killed(step: int) -> None:
        if step == 20:
            raise _Killed

    with pytest.raises(_Killed):
        trained(opened("mlp"), checkpoint=file, heed=killed)
    again = trained(opened("mlp"), checkpoint=file)
    assert [f.step for f in again.findings] == [22]
    assert same(whole, again)


def test_a_checkpoint_of_another_recipe_or_of_other_options_is_not_gone_on_from(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.safetensors"
    trained(opened("mlp"), checkpoint=file)
    for words in ({"recipe": W2A4}, {"technique": replace(SHORT, clip=2.0)}, {"seed": 1}):
        seen: list[int] = []
        trained(opened("mlp"), checkpoint=file, heed=seen.append, **words)
        assert seen[0] == 0


def test_the_seed_says_what_is_drawn() -> None:
    one = trained(opened("mlp"), seed=0)
    assert same(one, trained(opened("mlp"), seed=0))
    assert not same(one, trained(opened("mlp"), seed=1))


def test_other_inputs_and_augmentation_are_what_it_learns_from() -> None:
    seen: list[Tensor] = []
    drawn: list[float] = []

    class Listening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(x.detach())
            return self.layer(x)

    def augment(x: Tensor) -> Tensor:
        drawn.append(float(torch.rand(())))
        return x + 100.0

    model = Listening()
    task = task_of(model, training_data=lambda: [torch.full((8, 16), 7.0)], augment=augment)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    trained(opened(model=model, task=task), technique=replace(SHORT, steps=10))
    assert seen
    assert all(bool((x == 107.0).all()) for x in seen)
    assert len(set(drawn)) == len(drawn)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_and_its_parameters_are_left_as_they_were() -> None:
    session = opened("sequence")
    before = {n: (p.clone(), p.requires_grad) for n, p in session.model.named_parameters()}
    trained(session)
    for name, parameter in session.model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not session.model.training


class NoGradient(nn.Module):
    """Gives what has no gradient: decisions, and scores that are detached."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)


def test_outputs_without_a_gradient_are_one_line() -> None:
    with pytest.raises(TrialError, match="no gradient reaches the model's outputs"):
        trained(opened(model=NoGradient()))


class Frozen(nn.Module):
    """A layer none of whose parameters wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_parameters_that_are_frozen_are_trained_all_the_same() -> None:
    found = trained(opened(model=Frozen()))
    assert found.after < found.before


def test_the_users_code_that_fails_is_one_line() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no photos")

    from tests.training.models import model_of

    model = model_of("mlp")
    with pytest.raises(TrialError, match="augment failed: RuntimeError: no photos"):
        trained(opened(model=model, task=task_of(model, augment=broken)))


@pytest.mark.parametrize("estimator", ESTIMATORS.names())
def test_every_estimator_trains(estimator: str) -> None:
    found = trained(opened("mlp"), technique=replace(SHORT, estimator=estimator))
    assert found.after < found.before


@pytest.mark.parametrize("gradients", GRADIENT_GRIDS.names())
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_few_bits_train_too(kind: str, gradients: str) -> None:
    technique = replace(SHORT, gradients=gradients)
    found = trained(opened(kind), technique=technique)
    assert found.after < found.before
    again = trained(opened(kind), technique=technique)
    assert same(found, again)
    assert not same(found, trained(opened(kind)))


def test_what_gradients_are_brought_to_is_on_the_grid_of_their_format() -> None:
    session = opened("mlp")
    formats = GradientFormat("int4", "stochastic")
    estimator = ESTIMATORS.get("lsq")()
    student = Student(session.applier, everywhere(session), lambda _: estimator, formats)
    seen: list[Tensor] = []
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))

    def listen(module: nn.Module, args: Any, y: Tensor) -> None:
        y.grad_fn.register_hook(lambda own, _: seen.append(own[0]))

    with torch.enable_grad(), student.learning(torch.Generator().manual_seed(0)):
        handle = session.model[0].register_forward_hook(listen)
        bias = student.learners["0"].parameters["bias"]
        (found,) = torch.autograd.grad(session.model(x).square().sum(), [bias])
        handle.remove()
    (gradient,) = seen
    levels = (gradient / gradient.abs().max() * 7).unique()
    assert len(levels) <= 15
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient.sum(0), found)


def test_it_is_a_technique_of_its_registry() -> None:
    assert "distillation" in RECONSTRUCTIONS.names()
    technique = Distillation(estimator="ewgs", steps=7)
    assert technique_of(RECONSTRUCTIONS, technique.plain(), "here") == technique
