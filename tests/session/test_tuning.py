"""Fitting layers with results of others reused: what is learned is what it is without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.measure.pool import Pool
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session import tuning as module
from autoquant.session.session import Session, open_session
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

W3A8 = SiteRecipe(WeightScheme(3), ActivationScheme(8))


class Block(nn.Module):
    """Two layers beside a residual; counts how often it ran."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.relu = nn.ReLU(inplace)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(self.relu(self.up(x)))


class Deep(nn.Module):
    """Blocks, and one of them twice."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(inplace) for _ in range(5))
        self.relu, self.head = nn.ReLU(inplace), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 2, 1, 3, 4):
            x = self.relu(self.blocks[i](x))
        return self.head(x)


class Moody(Deep):
    """Draws at random: what a layer gave once says nothing of the next time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.rand(len(x), 1))


def opened(model: nn.Module) -> Session:
    x = torch.randn(2400, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    pairs = list(zip(x.split(400), y.split(400), strict=True))
    task = Task(
        calibration_data=lambda: [a for a, _ in pairs[:2]],
        evaluation_data=lambda: pairs[2:],
        metric="accuracy",
    )
    loaded = LoadedModel(model.eval(), "module", "m", "0" * 64)
    return open_session(loaded, task, torch.device("cpu"))


def model_of(kind: type[nn.Module], **words: Any) -> Any:
    torch.manual_seed(0)
    return kind(**words)


def fitted(session: Session) -> dict[str, SiteRecipe]:
    return fit_layers(session, dict.fromkeys(session.prepared.slots, W3A8), Sequential())


def runs(session: Session) -> int:
    return sum(m.runs for m in session.model.modules() if isinstance(m, Block))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_learned_is_what_it_is_without_reuse(inplace, monkeypatch):
    for cost in ("cost", "effort"):  # layers this small may not be worth their memory, by the clock
        monkeypatch.setattr(Pool, cost, lambda *_: 0.0)
    plain, reusing = (opened(model_of(Deep, inplace=inplace)) for _ in range(2))
    assert reusing.reuse(1 << 26) is not None
    before = [runs(s) for s in (plain, reusing)]
    found = [fitted(s) for s in (plain, reusing)]
    assert found[0] == found[1]
    assert all(site.learned for site in found[0].values())
    made = [runs(s) - b for s, b in zip((plain, reusing), before, strict=True)]
    assert made[1] < 0.7 * made[0]
    assert reusing.evaluator.reuse is not None
    assert reusing.evaluator.reuse.on
    assert not reusing.evaluator.reuse.statistics().bytes
    # And again, on what has become another model meanwhile.
    assert fitted(reusing) == found[0]


def test_of_a_model_that_draws_at_random_nothing_is_reused():
    session, said = opened(model_of(Moody)), list[str]()
    assert session.reuse(1 << 26, said.append) is None
    assert said == ["layer outputs are not reused: the model draws random numbers"]
    assert all(site.learned for site in fitted(session).values())


@pytest.mark.parametrize("ends", ["memory", "state"])
def test_where_reuse_fails_all_is_fitted_without(ends, monkeypatch):
    expected = fitted(opened(model_of(Deep)))
    session, made, own = opened(model_of(Deep)), [], module.reconstruct
    reuse = session.reuse(1 << 26)
    assert reuse is not None

    def failing(*args: Any) -> Any:
        made.append(reuse.store.bytes)
        if len(made) == 1 and ends == "memory":
            raise MemoryError
        found = own(*args)
        if len(made) == 1:
            reuse.switch_off("it keeps something")
        return found

    monkeypatch.setattr(module, "reconstruct", failing)
    assert fitted(session) == expected
    assert made == [0, 0]
    assert reuse.on == (ends == "memory")
