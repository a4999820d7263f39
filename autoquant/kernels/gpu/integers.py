"""Weights and activation schemes as the integer kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoquant.kernels.gpu.launch import round_up
from autoquant.quant.affine import HUGE, TINY
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.formats import FORMATS
from autoquant.spec.granularity import PER_CHANNEL, PER_TENSOR
from autoquant.spec.recipe import ActivationScheme

INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight as int8 rows, with one scale and zero point for each output channel.

    ``q`` is int8 [N, width] with zeros from K on, ``scale`` float32 [N], ``zero`` int32 [N] and
    ``sums`` int32 [N], the sum of q − zero along each row. ``has_zero`` is whether any zero is not
    0: wherever q − zero fits into int8, as it does below 8 bits, that is what ``q`` holds.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor
    has_zero: bool

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale, zero and sums, as kernels take them one after the other."""
        return self.scale, self.zero, self.sums

    def transposed(self, columns: int) -> IntegerWeight:
        """Return the same weight with ``q`` as [columns, N], without what fills up its rows."""
        return replace(self, q=self.q[:, :columns].T.contiguous())


@dataclass(frozen=True, slots=True)
class IntegerActivation:
    """An activation scheme as kernels take it.

    ``static`` is float32 [4]: scale and zero point (1 and 0 where the scheme is dynamic), qmin and
    qmax. Numbers of a recipe are data, so that static schemes of all widths and zero points are
    computed alike. ``symmetric`` is of dynamic schemes alone.
    """

    static: Tensor
    symmetric: bool
    dynamic: bool

    @property
    def fold(self) -> bool:
        """Whether every zero point is known to be 0: then nothing is left to correct."""
        return self.dynamic and self.symmetric


def integers_of(
    weight: QuantizedWeight,
    scheme: ActivationScheme,
    device: torch.device,
    order: Tensor | None = None,
) -> tuple[IntegerWeight, IntegerActivation] | None:
    """Return both for a product; None where one of them, or their sums, can't be integers."""
    activation = integer_activation(scheme, device)
    if activation is None or not _fits_int32(weight.q.shape[1], scheme, weight):
        return None
    integers = integer_weight(weight, device, order)
    return None if integers is None else (integers, activation)


def integer_activation(scheme: ActivationScheme, device: torch.device) -> IntegerActivation | None:
    """Return ``scheme`` for kernels on ``device``; None where it is not calibrated."""
    # As the reference has it: calibrated numbers go before numbers of the token's own.
    dynamic = scheme.scale is None
    if dynamic and not scheme.dynamic:
        return None
    grid = FORMATS[scheme.bits]
    scale = 1.0 if scheme.scale is None else scheme.scale
    zero = 0 if scheme.scale is None else scheme.zero_point or 0
    if not grid.qmin <= zero <= grid.qmax or not TINY <= scale <= HUGE:
        return None
    numbers = [scale, zero, grid.qmin, grid.qmax]
    return IntegerActivation(
        torch.tensor(numbers, dtype=torch.float32, device=device),
        dynamic and scheme.symmetric,
        dynamic,
    )


def integer_weight(
    weight: QuantizedWeight, device: torch.device, order: Tensor | None = None
) -> IntegerWeight | None:
    """Return ``weight`` for the integer kernels; None where a channel has several scales.

    ``order`` int64 [K] rearranges the columns; −1 stands for a column of zeros.
    """
    if weight.scheme.granularity not in (PER_TENSOR, PER_CHANNEL):
        return None
    channels = weight.q.shape[0]
    scale = weight.qparams.scale.reshape(-1).to(device, torch.float32)
    zero = weight.qparams.zero_point.reshape(-1).to(device, torch.int32)
    scale, zero = scale.expand(channels).contiguous(), zero.expand(channels).contiguous()
    q = weight.q.to(device, torch.int32)
    centred = q - zero[:, None]
    sums = centred.sum(dim=1, dtype=torch.int32)
    has_zero = bool(((centred < -128) | (centred > 127)).any())
    if not has_zero:
        q, zero = centred, torch.zeros_like(zero)
    if order is not None:
        order = order.to(device)
        q = torch.where(order < 0, 0, q[:, order.clamp(min=0)])
    return IntegerWeight(_rows(q), scale, zero, sums, has_zero)


def _rows(q: Tensor) -> Tensor:
    """Return ``q`` [N, K] as int8 with rows that start at multiples of 16 bytes."""
    width = round_up(q.shape[1], 16)
    return torch.nn.functional.pad(q.to(torch.int8), (0, width - q.shape[1])).contiguous()


def _fits_int32(depth: int, scheme: ActivationScheme, weight: QuantizedWeight) -> bool:
    """Return whether sums of ``depth`` products never leave int32.

    Neither those of the integers themselves nor those of the integers less their zero points.
    """
    grid = FORMATS[scheme.bits]
    centred = scheme.symmetric if scheme.scale is None else not scheme.zero_point
    largest_x = -grid.qmin if centred else grid.qmax - grid.qmin
    zero = weight.qparams.zero_point
    low, high = weight.qparams.qmin, weight.qparams.qmax
    largest_w = max(high - float(zero.min()), float(zero.max()) - low)
    return depth * largest_x * largest_w < INT32
