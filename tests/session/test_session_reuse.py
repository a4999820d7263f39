"""A session with reuse measures what one without it does."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError, UserError
from autoquant.measure.evaluator import Bar
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.optimize.run import search
from autoquant.session.session import Session, default_memory, open_session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

CPU = torch.device("cpu")
W3, A8 = WeightScheme(3), ActivationScheme(8)
RECIPES: tuple[dict[str, SiteRecipe], ...] = (
    {"0": SiteRecipe(W3, A8), "4": SiteRecipe(W3)},
    {"0": SiteRecipe(W3, A8), "4": SiteRecipe(None, A8)},
    {"0": SiteRecipe(W3, A8), "2": SiteRecipe(W3), "4": SiteRecipe(W3)},
    {"0": SiteRecipe(W3, A8), "4": SiteRecipe(W3)},
    {"0": SiteRecipe(WeightScheme(2, "per_tensor")), "4": SiteRecipe(WeightScheme(2))},
)


class Hungry(nn.Sequential):
    """Raises an error in a chosen call of its forward."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
        super().__init__(*layers)
        self.errors: list[BaseException | None] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        for layer in self:
            x = layer(x)
        return x


def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = Hungry()(x).argmax(1)
    return list(zip(x.split(20), y.split(20), strict=True))


def opened(**parts: Any) -> Session:
    task = Task(**({"evaluation_data": data, "metric": "accuracy", "source": "t.py"} | parts))
    return open_session(LoadedModel(Hungry().eval(), "module", "m", "0" * 64), task, CPU)


def evaluate(model: nn.Module) -> float:
    pairs = data()
    total = sum(float((model(x).argmax(1) == y).double().sum()) for x, y in pairs)
    return total / 600


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("limit", [None, 0.05])
def test_readings_are_those_without_reuse(whole, limit):
    parts = {"evaluation_data": None, "metric": None, "evaluate": evaluate} if whole else {}
    parts = parts | ({"calibration_data": lambda: [x for x, _ in data()]} if whole else {})
    plain, reusing = opened(**parts), opened(**parts)
    reuse = reusing.reuse()
    assert reuse is not None
    for session in (plain, reusing):
        session.baseline("search")
    stopped = []
    for recipe in RECIPES:
        theirs, reading, done = plain.measure(recipe, "search", bar=limit and Bar(limit))
        ours, found, again = reusing.measure(recipe, "search", bar=limit and Bar(limit))
        for name in ("value", "drop", "loss", "average_weight_bits", "size_bytes"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (found.samples, found.stopped) == (reading.samples, reading.stopped)
        assert done == again
        assert ours.seconds > 0
        stopped.append(found.stopped)
    if not whole:
        assert any(stopped) == (limit is not None)
    assert reuse.statistics().hits > 0
    assert reusing.evaluator.reuse is reuse
    copy.deepcopy(reusing.model)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("GPU")])
def test_out_of_memory_is_tried_again_without_reuse(error, whole):
    parts = {"evaluation_data": None, "metric": None, "evaluate": evaluate} if whole else {}
    parts = parts | ({"calibration_data": lambda: [x for x, _ in data()]} if whole else {})
    session = opened(**parts)
    reuse = session.reuse(1 << 20)
    session.baseline("search")
    expected = session.measure(RECIPES[0], "search")[0]
    assert reuse.store.bytes > 0
    session._measured.clear()
    session.model.errors[:] = [None, error]
    again = session.measure(RECIPES[0], "search")[0]
    assert (again.value, again.loss) == (expected.value, expected.loss)
    assert reuse.statistics().budget_bytes == 1 << 19
    assert reuse.statistics().bytes == 0
    session._measured.clear()
    session.model.errors[:] = [error] * 40  # in pieces of one sample, too
    with pytest.raises(TrialError, match=r"^out of memory"):
        session.measure(RECIPES[1], "search")
    session.model.errors.clear()
    session.measure(RECIPES[1], "search")
    assert reuse.statistics().bytes > 0


def test_out_of_memory_while_a_recipe_is_applied(monkeypatch):
    session = opened()
    reuse = session.reuse(1 << 20)
    session.baseline("search")
    session.measure(RECIPES[0], "search")
    quantize, errors = session.applier._quantize, [MemoryError()]

    def failing(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return quantize(*args)

    monkeypatch.setattr(session.applier, "_quantize", failing)
    session.measure(RECIPES[2], "search")
    assert reuse.statistics().budget_bytes == 1 << 19


def test_too_little_memory_for_the_check():
    session = opened()
    said: list[str] = []
    session.model.errors[:] = [None, MemoryError()]
    assert session.reuse(1 << 20, said.append) is None
    assert said == ["layer outputs are not reused: there is too little memory"]
    session.baseline("search")
    session.measure(RECIPES[0], "search")


def test_a_recipe_that_fails_is_left_out_of_the_check():
    session = opened()
    session.model.errors[:] = [None, ValueError("no")]
    assert session.reuse(1 << 20) is not None
    said: list[str] = []
    session.model.errors[:] = [None, ValueError("no"), ValueError("no")]
    assert session.reuse(1 << 20, said.append) is None
    assert said == ["layer outputs are not reused: no recipe but float could be tried"]
    session.model.errors[:] = [ValueError("no")]
    with pytest.raises(TrialError, match="forward failed: ValueError: no"):
        session.reuse(1 << 20)


def test_state_that_shows_late_measures_the_candidate_again():
    """A buffer begins to change in the middle of a candidate: that one is measured anew."""
    session, plain = opened(), opened()
    for s in (session, plain):
        s.baseline("search")
    said: list[str] = []
    reuse = session.reuse(1 << 20, said.append)
    session.measure(RECIPES[0], "search")

    def touch(model: nn.Module, *_: Any) -> None:
        model[0].bias.add_(0)

    session.model.register_forward_hook(touch)
    assert session.measure(RECIPES[1], "search")[0].value == (
        plain.measure(RECIPES[1], "search")[0].value
    )
    assert not reuse.on
    assert len(said) == 1


def test_memory_by_default(monkeypatch):
    class Memory:
        available = 40 << 30

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    assert default_memory(CPU) == 2 << 30
    Memory.available = 1 << 30
    assert default_memory(CPU) == 1 << 28
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 << 30, 0))
    assert default_memory(torch.device("cuda")) == 1 << 30


def test_a_search_is_the_same_with_and_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = Task(evaluation_data=data, metric="accuracy")
    found = [
        search(Hungry().eval(), task, trials=6, memory=memory, out=tmp_path, study=f"s{memory}")
        for memory in (None, "0", "20KB")
    ]
    assert len({f.recipe.key() for f in found}) == 1
    assert len({str(f.plain()["metric"]) for f in found}) == 1
    with pytest.raises(UserError, match="--memory 'much': write a size such as 512MB or 2GB"):
        search(Hungry().eval(), task, memory="much")
