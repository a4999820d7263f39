"""How rates go up and down, and in which order samples are seen: functions of the step alone.

Nothing is drawn from a state: what step n does is the same whether training came there at once or
was interrupted and went on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from autoquant.models.trees import batch_size, take


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Return the share of a rate at ``step`` of ``steps``: up in a line, down by half a cosine.

    Source: Loshchilov & Hutter 2017, arXiv 1608.03983, for the cosine.
    """
    if step >= steps:
        return 0.0
    rising = min(1.0, (step + 1) / max(warmup, 1))
    return rising * 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Order:
    """The samples of each step: all of them once an epoch, ``size`` of one batch at a time."""

    sizes: tuple[int, ...]
    size: int
    seed: int

    def places(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Return (batch, rows) of a step."""
        epoch, part = divmod(step, self.length)
        return _epoch(self, epoch)[part]

    @property
    def length(self) -> int:
        """Steps of an epoch."""
        return sum(-(-size // self.size) for size in self.sizes)


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    draw = torch.Generator().manual_seed((order.seed << 20) + epoch)
    parts: list[tuple[int, tuple[int, ...]]] = []
    for number, size in enumerate(order.sizes):
        rows = torch.randperm(size, generator=draw).tolist()
        parts += [(number, tuple(rows[i : i + order.size])) for i in range(0, size, order.size)]
    return tuple(parts[i] for i in torch.randperm(len(parts), generator=draw).tolist())


@dataclass(frozen=True)
class Lessons:
    """Inputs to learn from, as batches of the task's own form, and their ``targets`` if known."""

    batches: Sequence[Any]
    targets: Sequence[Any] = ()

    def order(self, size: int, seed: int) -> Order:
        """Return the order of samples, ``size`` at a time."""
        return Order(tuple(batch_size(batch) for batch in self.batches), size, seed)

    def at(self, places: tuple[int, tuple[int, ...]]) -> Any:
        """Return the samples at ``places``."""
        number, rows = places
        return take(self.batches[number], rows)

    def targets_at(self, places: tuple[int, tuple[int, ...]]) -> Any:
        """Return the targets of the samples at ``places``, None where none are known."""
        number, rows = places
        return take(self.targets[number], rows) if self.targets else None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
