"""What a candidate costs that differs from the one before in one layer.

``one_site_changed`` is what ``tests.benchmarks.evaluation`` calls; ``python -m
tests.benchmarks.reuse`` prints it for two small models.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

CHOICES = tuple(SiteRecipe(WeightScheme(bits), ActivationScheme(8)) for bits in (8, 7, 6, 5, 4, 3))
WARM = 4
"""Candidates measured before the first one that counts."""


@dataclass(frozen=True)
class OneSite:
    """Mean seconds of measuring a candidate in full, and with reuse."""

    full: float
    reusing: float
    bytes: int

    @property
    def speedup(self) -> float:
        """How many times faster a candidate is with reuse."""
        return self.full / self.reusing


def one_site_changed(
    session: Session,
    choices: Sequence[SiteRecipe] = CHOICES,
    *,
    rounds: int = 15,
    memory: int | None = None,
    seed: int = 0,
) -> OneSite:
    """Time ``rounds`` candidates, each one site away from the one before, both ways in turn.

    Each is measured on the search split first with reuse, caches warm, then in full. Raises
    ValueError where the model can't have its results reused, or a reading differs.
    """
    draw = random.Random(seed)
    session.baseline("search")
    said: list[str] = []
    reuse = session.reuse(memory, said.append)
    if reuse is None:
        raise ValueError(said)
    sites = dict.fromkeys((site.name for site in session.prepared.sites), choices[0])
    reusing, full = [], []
    for i in range(WARM + rounds):
        name = draw.choice(list(sites))
        sites[name] = draw.choice([c for c in choices if c != sites[name]])
        session.applier.apply(sites)  # quantizing a weight is the same work both ways
        start = time.perf_counter()
        found = session.evaluator.read(session.model, "search")
        middle = time.perf_counter()
        with reuse.paused():
            expected = session.evaluator.read(session.model, "search")
        end = time.perf_counter()
        if (found.value, found.divergence) != (expected.value, expected.divergence):
            raise ValueError(f"candidate {i} differs with reuse: {found} and {expected}")
        if i >= WARM:
            reusing.append(middle - start)
            full.append(end - middle)
    return OneSite(statistics.mean(full), statistics.mean(reusing), reuse.statistics().bytes)


class _Block(nn.Module):
    """A residual block that writes its sum into what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.body(x)
        return x.relu_()


def convolutions() -> tuple[nn.Module, Tensor]:
    """Return a residual network of 18 layers, and images."""
    parts = [nn.Conv2d(3, 32, 3, 2, 1), *(_Block(32) for _ in range(8))]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model, torch.randn(384, 3, 48, 48)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 4, 384, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 6), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def transformer() -> tuple[nn.Module, Tensor]:
    """Return a transformer encoder of 25 layers, and sequences."""
    return _Encoder(), torch.randn(384, 24, 96)


def _open(model: nn.Module, x: Tensor) -> Session:
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    data = list(zip(x.split(48), y.split(48), strict=True))
    task = Task(evaluation_data=lambda: data, metric="accuracy")
    return open_session(LoadedModel(model, "module", "m", "0" * 64), task, torch.device("cpu"))


def main() -> None:
    """Print a row for each model."""
    torch.manual_seed(0)
    for build in (convolutions, transformer):
        row = one_site_changed(_open(*build()))
        print(
            f"{build.__name__}: {1000 * row.full:.1f} ms in full, {1000 * row.reusing:.1f} ms with "
            f"reuse ({row.speedup:.1f}×), {row.bytes / 2**20:.0f} MiB held"
        )


if __name__ == "__main__":
    main()
