"""Residual connections are computed with the layer before them, and the numbers are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.measure.reuse_check import same_bits
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare, use_channels_last
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.measure import recorder
from tests.measure.recorder import EagerChain, EagerEngine, EagerProduct

W8A8 = SiteRecipe(WeightScheme(8), ActivationScheme(8))


class Bottleneck(nn.Module):
    """A block of a ResNet: the sum and its ReLU in place."""

    def __init__(self, down: bool) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            *(Bottleneck(n == 0) for n in range(3)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


class Inverted(nn.Module):
    """A block of a MobileNetV2: nothing follows the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 1),
            nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU6(),
            nn.Conv2d(16, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Mobile(nn.Sequential):
    def __init__(self) -> None:
        stem, head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1)
        super().__init__(stem, Inverted(), Inverted(), head, nn.AdaptiveAvgPool2d(1))


class Encoder(nn.Module):
    """Layers of a transformer with the norms after sums (BERT) or before layers (GPT)."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "a": nn.Linear(8, 8),
                    "b": nn.Linear(8, 8),
                    "out": nn.Linear(8, 8),
                    "up": nn.Linear(8, 16),
                    "down": nn.Linear(16, 8),
                    "norm1": nn.LayerNorm(8),
                    "norm2": nn.LayerNorm(8),
                }
            )
            for _ in range(2)
        )
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for m in self.layers:
            if self.before:
                h = m["norm1"](x)
                x = x + self.drop(m["out"](m["a"](h).sigmoid() * m["b"](h)))
                x = x + m["down"](F.gelu(m["up"](m["norm2"](x))))
            else:
                x = m["norm1"](self.drop(m["out"](m["a"](x).sigmoid() * m["b"](x))) + x)
                x = m["norm2"](m["down"](F.gelu(m["up"](x))) + x)
        return self.head(x)


class Looks(nn.Module):
    """Code that looks at outputs and sums before what was expected comes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.look = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(x)
        if self.look:
            x = x + y.abs().mean()
        z = y + x
        if self.look:
            z = z * 2 + z.std()
        z = z.relu()
        return self.three(z) + z


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "resnet": (ResNet, (2, 3, 6, 6), ["added"] * 3),
    "mobile": (Mobile, (2, 3, 7, 7), ["added"] * 2),
    "bert": (lambda: Encoder(before=False), (2, 5, 8), ["normalized"] * 4),
    # The last sum of all is read by a layer, the others by a norm and by the next sum.
    "gpt": (lambda: Encoder(before=True), (2, 5, 8), ["normalized"] * 3 + ["added"]),
    "looks": (Looks, (4, 8), ["added", "added"]),
}


class Bench:
    def __init__(self, name: str, *, last: bool = False) -> None:
        build, shape, self.expected = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
            self.batches = [torch.randn(shape) for _ in range(2)]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.5)
        self.ours = self._prepared(copy.deepcopy(model), EagerChain, last)
        self.theirs = self._prepared(model, EagerProduct, last)
        recorder.ADDED.clear()

    def _prepared(self, model: nn.Module, product: type[EagerProduct], last: bool) -> nn.Module:
        run = lambda m, x=self.batches[0]: m(x.clone())  # noqa: E731
        prepared = prepare(model, run, engine=EagerEngine(product))
        use_channels_last(model, on=last)
        applier = Applier(prepared, calibrate(prepared, self.batches, run))
        applier.apply({site.name: W8A8 for site in prepared.sites})
        return model

    def compare(self) -> None:
        for batch in self.batches:
            with torch.no_grad():
                found, expected = self.ours(batch.clone()), self.theirs(batch.clone())
            assert same_bits(found, expected)
            assert found.stride() == expected.stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_computed_with_their_layers(name, last):
    bench = Bench(name, last=last)
    bench.compare()
    assert bench.expected * len(bench.batches) == recorder.ADDED


def test_whoever_looks_gets_the_numbers():
    bench = Bench("looks")
    bench.ours.look = bench.theirs.look = True
    bench.compare()
    seen: list[Tensor] = []
    for model in (bench.ours, bench.theirs):
        model.look = False
        model.two.register_forward_hook(lambda *call: seen.append(call[2] + 0))
        with torch.no_grad():
            model(bench.batches[0])
    assert same_bits(seen[0], seen[1])


def test_layers_that_read_get_the_integers(monkeypatch):
    bench = Bench("resnet")
    stored: list[int] = []
    before = EagerChain.stored
    monkeypatch.setattr(
        EagerChain, "stored", lambda self, x: stored.append(x.dim()) or before(self, x)
    )
    with torch.no_grad():
        bench.ours(bench.batches[0])
    assert stored == [4, 4]  # the stem's and the first block's: the others are given theirs


def test_what_was_added_must_not_be_written_into_before_the_sum_is_used():
    bench = Bench("looks")

    def forward(x: Tensor) -> Tensor:
        model = bench.ours
        x = model.one(x)
        z = model.two(x) + x
        x.add_(1)
        return model.three(z.relu())

    with torch.no_grad(), pytest.raises(RuntimeError, match="written into after it was added"):
        forward(bench.batches[0])


def test_a_layer_used_in_two_ways_computes_on_its_own():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two((self.one(x) + x).relu()) + self.one(x)

    MODELS["twice"] = Twice, (4, 8), []
    try:
        bench = Bench("twice")
        bench.compare()
    finally:
        del MODELS["twice"]
    assert recorder.ADDED == ["added"] * 2  # the second sum: of the other layer's output
