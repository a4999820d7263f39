"""The baseline is the model as it was given, and what is done to it is held against that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoquant
from autoquant.errors import TrialError, UserError
from autoquant.measure.evaluator import Evaluator
from autoquant.models.data import make_splits
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.nn.convert import uses_channels_last
from autoquant.session.session import Session, open_session
from autoquant.session.surgery import Untouched
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme

CPU = torch.device("cpu")
BATCHES = 6


def lively(norm: Any) -> Any:
    torch.manual_seed(3)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.3, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


class Net(nn.Module):
    """A folded pair and a head; ``between`` is what forward does beside them, batch by batch."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), lively(nn.BatchNorm2d(6))
        self.other, self.head = lively(nn.BatchNorm2d(6)), nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor, turn: int) -> Tensor:
        return self.between(self, x, turn)


def plain(m: Any, x: Tensor, turn: int) -> Tensor:
    return m.head(F.relu(m.norm(m.conv(x))).mean((2, 3)))


def data() -> list[tuple[tuple[Tensor, int], None]]:
    """Return batches; each says its turn."""
    generator = torch.Generator().manual_seed(1)
    return [((torch.randn(8, 3, 8, 8, generator=generator), i), None) for i in range(BATCHES)]


def at(turn: int, otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what goes another way at one turn."""
    return lambda m, x, i: otherwise(m, x, i) if i == turn else plain(m, x, i)


def opened(between: Callable[..., Tensor], **options: Any) -> tuple[Session, list[Tensor]]:
    """Return a session, and what the model gave as it was."""
    model = Net(between).eval()
    with torch.no_grad():
        expected = [model(*inputs) for inputs, _ in data()]
    task = Task(calibration_data=[x for x, _ in data()[:3]], evaluation_data=data, source="t.py")
    loaded = LoadedModel(model, "module", "m", "0" * 64)
    return open_session(loaded, task, CPU, **options), expected


def other_norm(m: Any, x: Tensor, turn: int) -> Tensor:
    return m.head(F.relu(m.other(m.conv(x))).mean((2, 3)))


def raw(m: Any, x: Tensor, turn: int) -> Tensor:
    return m.conv(x).mean((2, 3))[:, :4]


@pytest.mark.parametrize("otherwise", [other_norm, raw])
@pytest.mark.parametrize("turn", range(BATCHES))
def test_a_fold_that_any_batch_contradicts_is_not_made(otherwise, turn):
    session, expected = opened(at(turn, otherwise))
    assert session.prepared.folded == {}
    with torch.no_grad():
        for (inputs, _), y in zip(data(), expected, strict=True):
            torch.testing.assert_close(session.model(*inputs), y, atol=1e-5, rtol=1e-5)


def test_a_fold_that_only_outputs_contradict_is_taken_back(monkeypatch):
    """Whoever reads what is between unseen, it shows in the outputs, number by number."""
    from autoquant.session import surgery

    def blind(model: nn.Module, runs: Any) -> Any:
        return surgery.Seen({"norm": "conv"}, ("conv", "head"))

    def pixels(m: Any, x: Tensor, turn: int) -> Tensor:
        y = m.conv(x)
        score = torch.sigmoid(0.01 * y.mean((1, 2, 3)))
        boxes = 640 * torch.sigmoid(m.norm(y).mean((2, 3)))
        return torch.cat([boxes, score[:, None]], 1)

    monkeypatch.setattr(surgery, "look", blind)
    session, expected = opened(pixels)
    assert session.prepared.folded == {}
    with torch.no_grad():
        found = session.model(*data()[0][0])
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-5)
    assert session.prepared.slots["conv"].parameter is session.model.conv.weight
    assert opened(plain)[0].prepared.folded == {"norm": "conv"}


@pytest.mark.parametrize("turn", range(BATCHES))
def test_channels_last_is_taken_back_for_a_batch_that_takes_no_such_memory(turn):
    def viewed(m: Any, x: Tensor, i: int) -> Tensor:
        y = F.relu(m.norm(m.conv(x))).view(len(x), -1)
        return m.head(y.reshape(len(x), 6, -1).mean(2))

    session, expected = opened(at(turn, viewed))
    assert not uses_channels_last(session.model)
    assert session.prepared.folded == {"norm": "conv"}
    with torch.no_grad():
        found = session.model(*data()[turn][0])
    torch.testing.assert_close(found, expected[turn], atol=1e-5, rtol=1e-5)
    assert uses_channels_last(opened(plain)[0].model)


def test_the_baseline_is_what_the_model_gave_as_it_was():
    """Not a float model that was folded: the two differ in their last bits."""
    session, _ = opened(plain)
    assert session.prepared.folded
    model, kept = Net(plain).eval(), session.evaluator.kept_outputs("search")
    batches = [inputs for inputs, _ in session.splits.search]
    assert len(kept) == len(batches) > 1
    with torch.no_grad():  # on the same batches: another size is added up in another order
        assert all(torch.equal(model(*x), y) for x, y in zip(batches, kept, strict=True))


def test_the_folds_of_a_recipe_are_refused_on_data_that_contradict_them():
    recipe = Recipe({"conv": SiteRecipe(WeightScheme(8), None)}, folded={"norm": "conv"})
    assert opened(plain, recipe=recipe)[0].prepared.folded == {"norm": "conv"}
    for otherwise in (other_norm, raw):
        with pytest.raises(UserError, match="the recipe folds norm into conv, but on these data"):
            opened(at(BATCHES - 1, otherwise), recipe=recipe)


def test_an_applied_model_refuses_a_way_that_no_data_took():
    int8 = {n: SiteRecipe(WeightScheme(8), ActivationScheme(8)) for n in ("conv", "head")}
    model = Net(at(7, other_norm)).eval()
    task = Task(calibration_data=[x for x, _ in data()[:3]], evaluation_data=data)
    applied = autoquant.apply(Recipe(int8, folded={"norm": "conv"}), model, task)
    x = data()[0][0][0]
    with torch.no_grad():
        before = applied(x, 0)
        assert (before - model(x, 0)).norm() < 0.1 * before.norm()
        with pytest.raises(TrialError, match=r"^conv: its output did not reach its BatchNorm norm"):
            applied(x, 7)
        assert torch.equal(applied(x, 0), before)


def test_a_model_that_is_wrong_after_preparation_is_refused_with_what_differs():
    def looks(m: Any, x: Tensor, turn: int) -> Tensor:
        return plain(m, x, turn) + float("forward" in vars(m.head))

    with pytest.raises(UserError, match=r"other outputs \(output differs by 1 where") as raised:
        opened(looks)
    assert "\n" not in str(raised.value)


def test_a_task_with_its_own_evaluate_is_held_by_what_its_model_returns():
    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sum(model(*x).square().mean() for x, _ in data()))

    for between, folded in ((plain, {"norm": "conv"}), (at(4, raw), {})):
        model = Net(between).eval()
        task = Task(evaluate=evaluate, source="t.py")
        value = evaluate(model)
        session = open_session(LoadedModel(model, "module", "m", "0" * 64), task, CPU)
        assert session.prepared.folded == folded
        assert session.baseline("search").value == value


def test_outputs_of_one_batch_of_calibration_data_are_held_at_a_time():
    given: list[weakref.ref[Tensor]] = []
    most = 0

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(held() is not None for held in given))
        y: Tensor = model(*inputs)
        given.append(weakref.ref(y))
        return y

    others = [(-x, turn) for (x, turn), _ in data()]
    task = Task(calibration_data=others, evaluation_data=data, forward=forward, source="t")
    evaluator = Evaluator(task, make_splits(task), CPU)
    untouched = Untouched(evaluator, evaluator.run, Net(plain).eval())
    untouched.measure(Net(plain).eval(), (), None)
    assert len(given) >= 2 * BATCHES
    assert untouched.pairs == {"norm": "conv"}
    assert most <= 2
