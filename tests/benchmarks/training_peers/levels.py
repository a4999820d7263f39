"""How many levels weights and activations really have, seen from outside: at each product.

Whatever a tool says of itself, what counts is what its convolutions and linear layers multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One convolution or linear layer: the most levels of a channel's weights, and of its input."""

    weights: int
    activations: int


@dataclass
class _Watching(TorchDispatchMode):
    """Counts the levels of both factors of each product."""

    seen: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        factors = _factors(func.overloadpacket, args)
        if factors is not None:
            inputs, weight = factors
            self.seen.append(Product(most_levels(weight), levels(inputs)))
        return func(*args, **kwargs or {})


def _factors(operation: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Return (inputs, weight [channels, …]) of a product, None for other operations."""
    if operation is aten.convolution:
        return args[0], args[1]
    if operation is aten.addmm:
        return args[1], args[2].t()
    if operation is aten.mm:
        return args[0], args[1].t()
    if operation is aten.linear:
        return args[0], args[1]
    return None


def levels(x: Tensor) -> int:
    """Return how many numbers a tensor has."""
    return int(x.detach().unique().numel())


def most_levels(weight: Tensor) -> int:
    """Return how many numbers the channel with most of them has."""
    rows = weight.detach().flatten(1).sort(dim=1).values
    return int((rows.diff(dim=1) != 0).sum(1).max()) + 1


@torch.no_grad()
def products(run: Callable[[Any], Any], inputs: Any) -> list[Product]:
    """Return the products of one run, in their order."""
    with _Watching() as watching:
        run(inputs)
    return watching.seen


class Unfit(Exception):
    """A tool doesn't do what is compared; the message says what it does."""


def check(found: list[Product], layers: int, weights: int, activations: int) -> None:
    """Raise Unfit where not all ``layers`` have as few bits as are asked for."""
    fit = sum(p.weights <= 2**weights and p.activations <= 2**activations for p in found)
    if fit < layers or len(found) != layers:
        raise Unfit(f"only {fit} of {layers} layers have {weights} and {activations} bits")
