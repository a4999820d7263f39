"""What products on a GPU do with a residual connection: who is served, and what can be added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.normalizing import normalize_rows
from autoquant.kernels.gpu.doubt import current_flag
from autoquant.kernels.gpu.launch import ceil_div, launch, next_power_of_2
from autoquant.kernels.gpu.reading import PIXELS, ROWS, Addition, DeviceReader, Ending, is_bias
from autoquant.kernels.operation import Added, Clamp, Norm, Reader

SUM_READERS = 3
"""Most readers that the epilogue of a product serves."""
NORM_READERS = 4
"""Most readers that the kernel of a norm serves."""
WIDEST = 8192
"""Most numbers of a row that a program of the norm's kernel holds in its registers."""


@dataclass(frozen=True, slots=True)
class Served:
    """Readers that a kernel serves, each once; ``places`` says which of them each one asked is.

    It is None for one that is not served.
    """

    statics: tuple[Tensor, ...]
    places: tuple[int | None, ...]

    def empty(self, shape: Sequence[int], layout: str) -> tuple[Tensor, ...]:
        """Return int8 of ``shape`` for each that is served, to be filled."""
        return tuple(_empty(shape, layout, s.device) for s in self.statics)

    def shared(self, made: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return for each one asked what was made for it."""
        return tuple(None if place is None else made[place] for place in self.places)


def served(readers: Sequence[Reader], layout: str, device: torch.device, most: int) -> Served:
    """Return which ``readers`` are served: ``most`` of this layout, and all that equal them."""
    known: dict[DeviceReader, int] = {}
    places: list[int | None] = []
    for reader in readers:
        place = None
        if (
            isinstance(reader, DeviceReader)
            and reader.layout == layout
            and reader.static.device == device
            and (reader in known or len(known) < most)
        ):
            place = known.setdefault(reader, len(known))
        places.append(place)
    return Served(tuple(reader.static for reader in known), tuple(places))


def can_add(other: Tensor, shape: tuple[int, ...], last: bool, like: Tensor) -> bool:
    """Return whether kernels add ``other`` to an output of ``shape``: float32 that lies as it does.

    That is channels ``last`` or contiguous, on the device of ``like``. They do while somebody
    collects doubts there: what comes out is handed on.
    """
    flag = current_flag()
    if flag is None or flag.device != like.device:
        return False
    if (other.dtype, other.device, other.shape) != (torch.float32, like.device, shape):
        return False
    if other.requires_grad and torch.is_grad_enabled():
        return False
    return (other.movedim(1, -1) if last else other).is_contiguous()


def added(
    product: Callable[[Ending], Tensor | None],
    other: Tensor,
    clamp: Clamp | None,
    readers: Sequence[Reader],
    layout: str,
) -> Added | None:
    """Return the ``product``'s output plus ``other``, which it ``can_add``, for all ``readers``."""
    who = served(readers, layout, other.device, SUM_READERS)
    integers = who.empty(other.shape, layout)
    addition = Addition(other.detach(), who.statics, integers)
    y = product(Ending(clamp, flag=current_flag(), addition=addition))
    return None if y is None else Added(None, y, who.shared(integers))


def is_norm(norm: Norm, scale: Tensor) -> bool:
    """Return whether the kernel takes this norm of as many channels as ``scale`` has, float32."""
    given = [t for t in (norm.weight, norm.bias) if t is not None]
    fits = all(t.is_contiguous() and is_bias(t, scale) for t in given)
    return fits and scale.numel() <= WIDEST


def cut(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the rows of a program, the numbers of a row that it holds, and its warps.

    Rows are whole, so that their mean and variance need no second pass over memory. A program has
    1024 numbers or one row; a thread has 16, which leaves registers for all that is made of them.
    """
    block = max(next_power_of_2(columns), 16)
    per_program = min(max(1024 // block, 1), next_power_of_2(rows))
    return per_program, block, min(max(per_program * block // 512, 1), 16)


def normalized(
    y: Tensor, other: Tensor, norm: Norm, readers: Sequence[Reader], keeps: bool
) -> Added:
    """Return the norm of ``y`` + ``other``, which can be added: both float32 [..., N], contiguous.

    The memory of ``y`` is used again: for the sum where it is kept, else for the norm.
    """
    columns = y.shape[-1]
    who = served(readers, ROWS, y.device, NORM_READERS)
    integers = who.empty(y.shape, ROWS)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device) if keeps else y
    rows = y.numel() // columns
    per_program, block, warps = cut(rows, columns)
    launch(
        normalize_rows,
        (ceil_div(rows, per_program),),
        y,
        other.detach(),
        y if norm.weight is None else norm.weight.detach(),
        y if norm.bias is None else norm.bias.detach(),
        out,
        who.statics,
        integers,
        current_flag(),
        rows,
        columns,
        norm.eps,
        HAS_WEIGHT=norm.weight is not None,
        HAS_BIAS=norm.bias is not None,
        KEEPS=keeps,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
    )
    return Added(y if keeps else None, out, who.shared(integers))


def _empty(shape: Sequence[int], layout: str, device: torch.device) -> Tensor:
    if layout != PIXELS:
        return torch.empty(shape, dtype=torch.int8, device=device)
    samples, channels, *sizes = shape
    made = torch.empty((samples, *sizes, channels), dtype=torch.int8, device=device)
    return made.movedim(-1, 1)
