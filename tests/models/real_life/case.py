"""What a case of this suite is: a small model as somebody brought it, and how it has to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.models.task import Task, run_forward

Batches = Sequence[Any]


@dataclass(frozen=True)
class Case:
    """One model, frozen.

    ``build`` makes it, the same numbers each time; ``batches`` are its inputs (each drawn anew, so
    that a model which writes into its inputs is found out); ``elsewhere`` says how it goes wrong in
    other tools, or went wrong here. It either works, or ``refused`` are words of the one line that
    refuses it. ``floats`` are name → words of the reason, of all that must be named as left in
    float; ``layers`` are some that must not be. ``saved`` is what ``apply`` writes: ``pt2``, or
    ``archive`` for what torch.export can't follow. ``noise`` is the largest noise over signal of
    any output at 8 bits; with ``column``, an axis of the outputs, of each entry along that.
    ``calibration`` are inputs to calibrate with, where they are others than those to measure by.
    ``quick`` cases run in every run of the tests.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    elsewhere: str
    floats: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    refused: str | None = None
    saved: str = "pt2"
    noise: float = 0.03
    calibration: Callable[[], Batches] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    metric: Any = None
    column: int | None = None
    quick: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """Return the model; one seed gives models of the same numbers."""
        torch.manual_seed(seed)
        return self.build()

    def data(self) -> list[Any]:
        """Return its inputs, the same ones each time."""
        torch.manual_seed(1)
        return list(self.batches())

    def task(self) -> Task:
        """Return the task as its owner would write it: no labels, so fidelity is the metric."""
        calibration = None
        if self.calibration is not None:
            torch.manual_seed(2)
            calibration = list(self.calibration())
        return Task(
            calibration_data=calibration,
            evaluation_data=[(inputs, None) for inputs in self.data()],
            forward=self.forward,
            metric=self.metric,
        )

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Return what the task makes of one batch."""
        with torch.no_grad():
            return run_forward(self.task(), model, inputs)


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of all that an output holds, whatever holds it."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors(value, f"{path}[{key!r}]")
    elif isinstance(output, list | tuple):
        for i, value in enumerate(output):
            yield from tensors(value, f"{path}[{i}]")
    elif dataclasses.is_dataclass(output) or hasattr(output, "__dict__"):
        for key, value in vars(output).items():
            yield from tensors(value, f"{path}.{key}")


def noise_to_signal(output: Tensor, reference: Tensor) -> float:
    """Return the noise of an output over its signal, numbers that are not finite left out.

    Those must be the same in both.
    """
    one, two = torch.broadcast_tensors(output.detach(), reference.detach())
    if not one.is_floating_point() and not one.is_complex():
        return float((one != two).double().mean())
    finite = two.isfinite()
    if not torch.equal(one.isfinite(), finite) or not torch.equal(one[~finite], two[~finite]):
        return float("inf")
    a, b = one[finite].to(torch.complex128), two[finite].to(torch.complex128)
    return float((a - b).abs().square().sum() / b.abs().square().sum().clamp(min=1e-12))


def images(*more: Any, size: int = 8, channels: int = 3) -> list[Any]:
    """Return four batches of twelve images; with ``more``, tuples of images and one of these."""
    drawn = [torch.randn(12, channels, size, size) for _ in range(4)]
    if not more:
        return drawn
    return [(x, more[i % len(more)]) for i, x in enumerate(drawn)]


def vectors(*more: Any, width: int = 16) -> list[Any]:
    """Return four batches of twelve vectors; with ``more``, tuples of a batch and one of these."""
    drawn = [torch.randn(12, width) for _ in range(4)]
    if not more:
        return drawn
    return [(x, more[i % len(more)]) for i, x in enumerate(drawn)]


def sequences(width: int = 16, length: int = 6) -> list[Any]:
    """Return four batches of twelve sequences of vectors."""
    return [torch.randn(12, length, width) for _ in range(4)]


def words(vocabulary: int = 20, length: int = 6) -> list[Any]:
    """Return four batches of twelve sequences of tokens."""
    return [torch.randint(vocabulary, (12, length)) for _ in range(4)]


def lively(norm: nn.Module) -> nn.Module:
    """Return a BatchNorm that has seen data: with statistics and an affine part of its own."""
    for buffer, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.5, 2.0)):
        getattr(norm, buffer).uniform_(low, high)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.bias, -1.0, 1.0)
    return norm
