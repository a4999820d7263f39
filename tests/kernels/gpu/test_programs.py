"""Programs of Triton's products: integers are handed on, and NaN is found out afterwards.

On a GPU they are CUDA graphs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoquant.kernels.engine import Engine
from autoquant.kernels.gpu import TritonBackend
from autoquant.kernels.gpu.graphs import CudaRecorder
from autoquant.kernels.gpu.launch import observing
from autoquant.measure.programs import Programs
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.measure.recorder import StandIn


class Block(nn.Module):
    """The linear layers of a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.act(self.up(self.norm(x)))))


class Pixels(nn.Module):
    """Convolutions that hand on, a depthwise one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6())
        self.one, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.one(self.deep(x)))


MODELS = {"block": (Block, (5, 16)), "pixels": (Pixels, (2, 3, 6, 6))}


Bench = tuple[Applier, Programs, list[Tensor], list[str]]


@pytest.fixture
def bench(name: str, backend: TritonBackend, device: torch.device) -> Bench:
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval().to(device)
        batches = [torch.randn(shape).to(device) for _ in range(4)]
    run = lambda m, x=batches[0]: m(x.clone())  # noqa: E731
    prepared = prepare(model, run, engine=Engine((backend,)))
    applier = Applier(prepared, calibrate(prepared, batches, run))
    recorder = StandIn() if device.type == "cpu" else CudaRecorder(device)
    said: list[str] = []
    return applier, Programs(prepared, recorder, said.append), batches, said


def uniform(applier: Applier, bits: int, wide: int = 8) -> dict[str, SiteRecipe]:
    recipe = SiteRecipe(WeightScheme(bits), ActivationScheme(wide))
    return {site.name: recipe for site in applier.prepared.sites}


@pytest.mark.parametrize("name", MODELS)
def test_another_width_is_data_and_the_numbers_are_those_of_calls(bench):
    applier, programs, batches, said = bench
    model = applier.prepared.model
    with torch.no_grad():
        for bits, wide in ((8, 8), (4, 8), (6, 6), (8, 5)):
            applier.apply(uniform(applier, bits, wide))
            for x in batches:
                expected = model(x)  # called: nothing is handed on
                with programs.batch():
                    y = model(x)
                assert not programs.doubted()
                # A number next to the middle between two integers may go to either.
                assert (y - expected).abs().max() <= 0.05 * expected.abs().max()
                assert ((y - expected).abs() <= 1e-5 * expected.abs().max()).float().mean() > 0.8
    assert programs.recordings == 1
    assert not said


@pytest.mark.parametrize("name", MODELS)
def test_what_integers_cannot_carry_is_doubted(bench):
    applier, programs, batches, _ = bench
    model = applier.prepared.model
    applier.apply(uniform(applier, 8))
    with torch.no_grad():
        for x in batches:
            with programs.batch():
                model(x)
        assert not programs.doubted()
        x = batches[0].clone()
        x.view(-1)[0] = torch.nan
        with programs.batch():
            model(x)
        assert programs.doubted()
        assert not programs.doubted()  # said once
        with programs.batch():
            model(batches[0])
        assert not programs.doubted()


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_takes_two_launches_at_most_and_a_replay_none_of_its_own(bench):
    applier, programs, batches, _ = bench
    model = applier.prepared.model
    applier.apply(uniform(applier, 8))
    launched: list[str] = []
    counts = []
    with torch.no_grad(), observing(lambda name, _: launched.append(name)):
        for x in batches:
            with programs.batch():
                model(x)
            counts.append(len(launched))
            launched.clear()
    sites = len(applier.prepared.sites)
    assert counts[0] <= 2 * sites
    assert counts[2:] == [0, 0]
