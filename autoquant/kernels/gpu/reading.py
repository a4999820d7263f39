"""What a product on a GPU makes integers of its activation by, and how it makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.rows import quantize_flat
from autoquant.kernels.gpu.doubt import current_flag
from autoquant.kernels.gpu.images import quantize_into
from autoquant.kernels.gpu.integers import IntegerWeight
from autoquant.kernels.gpu.launch import ceil_div, launch
from autoquant.kernels.operation import Clamp, Reader

ROWS, PIXELS, FILLED = "rows", "pixels", "filled pixels"
"""How integers lie: [..., channels] as rows, or [batch, channels, *spatial] channels last.

Filled pixels have more bytes than channels, so that each starts at a multiple of 4 or 16 bytes. No
layer hands them on.
"""
BLOCK = 2048
"""Numbers that one program quantizes."""
GELU = {"none": 2, "tanh": 3}
"""What kernels call a GELU by each approximation."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceReader(Reader):
    """Makes int8 by the numbers of ``static``, float32 [4], on the device, which lie as ``layout``.

    Numbers of a recipe may change where they lie. So readers are equal where they read the very
    same tensor: one layer, in one recipe.
    """

    static: Tensor
    layout: str

    def __eq__(self, other: object) -> bool:
        """Return whether both read one tensor, in one layout."""
        if not isinstance(other, DeviceReader):
            return NotImplemented
        return self.static is other.static and self.layout == other.layout

    def __hash__(self) -> int:
        """Hash the tensor's identity."""
        return hash((id(self.static), self.layout))


def stored(x: Tensor, reader: DeviceReader, width: int) -> Tensor | None:
    """Return the int8 that ``reader`` makes of ``x``, float32 of any strides.

    A row or pixel takes ``width`` bytes: as many as there are channels, or filled up by 0. None
    while nobody collects doubts: an integer can't say that a number is NaN.
    """
    flag = current_flag()
    if flag is None or flag.device != x.device:
        return None
    x, pixels = x.detach(), reader.layout != ROWS
    last = x.movedim(1, -1) if pixels else x
    q = torch.empty(*last.shape[:-1], width, dtype=torch.int8, device=x.device)
    if last.is_contiguous() and reader.layout != FILLED:
        count = x.numel()
        launch(
            quantize_flat, (ceil_div(count, BLOCK),), x, reader.static, q, flag, count, BLOCK=BLOCK
        )
    else:
        image = x if pixels else _as_image(x)
        image = image if image.dim() == 4 else image.unsqueeze(2)
        into, numbers = q.view(len(image), *image.shape[2:], -1), (reader.static, reader.static[1:])
        quantize_into(into, image, reader.static, numbers, flag)
    return q[..., : last.shape[-1]].movedim(-1, 1) if pixels else q


def _as_image(x: Tensor) -> Tensor:
    """Return rows [..., channels] as one image [1, channels, 1, rows], without a copy if it can."""
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Addition:
    """What is added to an output, ``other``, float32 as the output lies, and who reads the sum.

    ``integers`` are what each of ``statics`` makes of it, to be filled in the same pass.
    """

    other: Tensor
    statics: tuple[Tensor, ...]
    integers: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """What the epilogue of a product does with its output: a ``clamp`` or GELU, then ``reader``'s.

    Without ``reader`` the output is real. An ``addition`` comes before all that.
    """

    clamp: Clamp | None = None
    gelu: str | None = None
    reader: DeviceReader | None = None
    flag: Tensor | None = None
    addition: Addition | None = None

    @property
    def kind(self) -> str:
        """How the names of kernels end that are tuned for it."""
        if self.addition is not None:
            return "to sum"
        return "from int8" if self.reader is None else "to int8"

    @property
    def counts(self) -> tuple[int, ...]:
        """How many read a sum, which is a kernel of its own: it belongs to the shape."""
        return () if self.addition is None else (len(self.addition.statics),)

    @property
    def flags(self) -> dict[str, bool | int]:
        """What of it kernels are compiled for."""
        return {
            "AFTER": self.after,
            "HANDS": self.reader is not None,
            "ADDS": self.addition is not None,
        }

    @property
    def after(self) -> int:
        """What kernels call that."""
        if self.gelu is not None:
            return GELU[self.gelu]
        return 0 if self.clamp is None else 1

    def to(self, static: Tensor, weight: IntegerWeight) -> tuple[Any, ...]:
        """Return the reader's numbers, the flag, the fields of the addition, the ends of the clamp.

        In the places of those that aren't there stands what a kernel won't read.
        """
        a = Addition(weight.scale, (), ()) if self.addition is None else self.addition
        return (
            static if self.reader is None else self.reader.static,
            weight.zero if self.flag is None else self.flag,
            a.other,
            a.statics,
            a.integers,
            *map(float, self.clamp or (0.0, 0.0)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return torch.float32 if self.reader is None else torch.int8


def ending(
    clamp: Clamp | None, gelu: str | None, reader: Reader, layout: str, like: Tensor
) -> Ending | None:
    """Return how to hand an output to ``reader``; None where it can't be handed.

    So it is where integers lie in another layout there, and while nobody collects doubts on the
    device of ``like``.
    """
    flag = current_flag()
    if flag is None or flag.device != like.device or (gelu is not None and clamp is not None):
        return None
    if not isinstance(reader, DeviceReader) or reader.layout != layout:
        return None
    if gelu is not None and gelu not in GELU:
        return None
    return Ending(clamp, gelu, reader, flag)


def bias_for(bias: Tensor | None, scale: Tensor) -> Tensor | None:
    """Return a bias as kernels take it: float32 without gaps, on the device of ``scale``."""
    return None if bias is None else bias.detach().to(scale).contiguous()


def is_bias(bias: Tensor | None, scale: Tensor) -> bool:
    """Return whether kernels that hand int8 on take a bias: float32 [channels], as ``scale``."""
    if bias is None:
        return True
    same = (bias.dtype, bias.device, bias.shape) == (scale.dtype, scale.device, scale.shape)
    return same and not (bias.requires_grad and torch.is_grad_enabled())
