"""One recipe is one model: what was confirmed is what is evaluated, applied, written and loaded.

Over every sampler, every shipped space, weights that are kept or forgotten all the time, and
studies that ran in one go, were resumed, or had two workers: the same numbers, digit for digit.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoquant import apply, resume, search
from autoquant.methods import applier
from autoquant.models.data import make_splits
from autoquant.models.files import of_module
from autoquant.models.metrics import resolve_metric
from autoquant.models.task import Task
from autoquant.nn.archive import load_archive
from autoquant.optimize.evaluate import measure_recipe
from autoquant.samplers import registry
from autoquant.session.apply import write
from autoquant.spec.recipe import Recipe, SplitResult
from autoquant.spec.recipe_file import load
from autoquant.spec.space import shipped

TRIALS = 9
CACHES = {"roomy": applier.CACHE_BYTES, "tiny": 1}


class Net(nn.Module):
    """Three layers with an input of correlated columns, so that calibrations differ."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(32, 10), nn.Linear(10, 10)
            self.last = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


def _data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(32, 32, generator=generator)
    x = torch.randn(48, 6, generator=generator) @ mix[:6] + 0.1 * mix[:1] + 0.5
    with torch.no_grad():
        y = Net()(x)
    return list(zip(x.split(12), y.split(12), strict=True))


DATA = _data()
TASK = Task(evaluation_data=lambda: DATA, metric="mse")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(mode: str, sampler: str, space: str) -> Recipe:
    """Return the recipe of a search, as it lies in its file."""
    bits = 8.0 if space == "int8" else 5.0
    whole = TRIALS if mode == "fresh" else TRIALS - 4
    search(Net(), TASK, sampler=sampler, space=space, bits=bits, trials=whole, study="s", seed=3)
    if mode == "resumed":
        resume("s", model=Net(), task=TASK, trials=TRIALS)
    if mode == "two workers":
        models = [Net(), Net()]  # made here: threads share torch's generator

        def work(worker: int) -> None:
            resume("s", model=models[worker], task=TASK, trials=TRIALS, worker=worker)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
    return load(Path("recipe.yaml"))


def score(model: nn.Module) -> dict[str, float]:
    """Return the metric of a model on both splits, by torch alone."""
    splits = make_splits(TASK)
    metric = resolve_metric(TASK, DATA[0][1])
    with torch.no_grad():
        return {
            name: metric.evidence([(model(x), y) for x, y in getattr(splits, name)]).score()
            for name in ("search", "confirm")
        }


def told(recipe: Recipe) -> dict[str, SplitResult]:
    assert recipe.evidence is not None
    assert recipe.evidence.confirm is not None
    return {"search": recipe.evidence.search, "confirm": recipe.evidence.confirm}


def cases() -> list[tuple[str, str, str, str]]:
    """Return every way of the usual sampler, and of the others each space in one of the ways."""
    ways = list(itertools.product(CACHES, ("fresh", "resumed", "two workers")))
    found = []
    for number, sampler in enumerate(registry.names()):
        for place, space in enumerate(shipped()):
            own = ways if sampler == "knapsack" else [ways[(number + place) % len(ways)]]
            found += [(sampler, space, *way) for way in own]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "space", "cache", "mode"), cases())
def test_confirmed_is_evaluated_is_applied_is_loaded(monkeypatch, sampler, space, cache, mode):
    monkeypatch.setattr(applier, "CACHE_BYTES", CACHES[cache])
    recipe = run(mode, sampler, space)
    confirmed = {name: split.quantized for name, split in told(recipe).items()}
    again = measure_recipe(of_module(Net()), TASK, recipe).splits
    assert again == told(recipe)
    applied = apply(recipe, Net(), TASK)
    assert score(applied) == confirmed
    written = write(applied, recipe, None, Path("quantized.safetensors"))
    assert score(load_archive(written.path, Net())) == confirmed
    if (cache, mode) == ("tiny", "resumed"):  # an export takes as long as all the rest
        written = write(applied, recipe, TASK, Path("quantized.pt2"))
        assert written.kind == "pt2"
        assert score(torch.export.load(written.path).module()) == confirmed
