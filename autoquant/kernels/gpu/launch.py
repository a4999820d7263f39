"""What every launch needs: the right device, how a kernel is cut, and when to refuse a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.kernels.operation import Clamp

MAX_ROWS = 1 << 30
"""Most rows of a product; row numbers are int32 on the device."""

OPTIONS = {"enable_fp_fusion": True}
"""Passed to every launch: no product here is followed by a sum that must not be fused with it.

Triton changes its default from 3.10 on, and warns of it.
"""


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is cut into programs: its block sizes, warps a program, pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 3

    def arguments(self) -> dict[str, int]:
        """Return the keyword arguments of the launch, beside ``OPTIONS``."""
        return dict(self.blocks) | {"num_warps": self.warps, "num_stages": self.stages}

    def block(self, name: str) -> int:
        """Return one block size."""
        return dict(self.blocks)[name]


def config(warps: int = 4, stages: int = 3, **blocks: int) -> Config:
    """Return the Config of these block sizes."""
    return Config(tuple(blocks.items()), warps, stages)


def light(configs: Sequence[Config]) -> tuple[Config, ...]:
    """Return those with at most 64 outputs a thread.

    Where the epilogue reads as many numbers again, the registers of a thread hold no more.
    """
    return tuple(c for c in configs if c.block("BLOCK_M") * c.block("BLOCK_N") <= 2048 * c.warps)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``tensor`` the one that kernels are launched on."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel; called, it is done again on the same memory."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the kernel is called."""
        name: str = self.kernel.fn.__name__
        return name

    def named(self) -> dict[str, Any]:
        """Return its arguments and options by their names."""
        names = self.kernel.arg_names
        return dict(zip(names, self.arguments, strict=False)) | dict(self.options)

    def __call__(self) -> None:
        """Launch it on the device of its first tensor."""
        with on(next(a for a in self.arguments if isinstance(a, Tensor))):
            self.kernel[self.grid](*self.arguments, **self.options, **OPTIONS)


Observe = Callable[[str, Launch], None]

_observers: list[Observe] = []
_counters: list[Observe] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor; whoever observes is told after that."""
    made = Launch(kernel, grid, arguments, options)
    if _counters:
        _counters[-1](made.name, made)
        return
    made()
    for observe in _observers:
        observe(made.name, made)


@contextlib.contextmanager
def observing(observe: Observe) -> Iterator[None]:
    """Tell ``observe`` the name of every kernel launched inside, and how to launch it again."""
    with _told(_observers, observe):
        yield


@contextlib.contextmanager
def counting(observe: Observe) -> Iterator[None]:
    """Tell ``observe`` of every launch inside, and launch nothing: tensors are never written."""
    with _told(_counters, observe):
        yield


@contextlib.contextmanager
def _told(those: list[Observe], observe: Observe) -> Iterator[None]:
    those.append(observe)
    try:
        yield
    finally:
        those.remove(observe)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``a``."""
    return ceil_div(a, multiple) * multiple


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least ``n`` (n ≥ 1)."""
    return 1 << (n - 1).bit_length()


def takes(x: Tensor, bias: Tensor | None, like: Tensor, outputs: int) -> bool:
    """Return whether a kernel can take this call; ``like`` is on the weight's device.

    No kernel has a gradient, none takes an empty activation, and a bias must be what the float
    layer would take.
    """
    if x.numel() == 0 or x.device != like.device:
        return False
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        return False
    if bias is not None and tuple(bias.shape) != (outputs,):
        return False
    learning = x.requires_grad or (bias is not None and bias.requires_grad)
    return not (learning and torch.is_grad_enabled())


def clamped(y: Tensor, clamp: Clamp | None) -> Tensor:
    """Return ``y`` within ``clamp``, in place; as it is for None."""
    return y if clamp is None else y.clamp_(*clamp)
