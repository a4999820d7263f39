"""Convolutions on one or two axes as products of channels-last integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoquant.kernels.gpu.convolution import Convolution
from autoquant.kernels.gpu.device.convolution import spread_nan
from autoquant.kernels.gpu.geometry import Geometry, geometry_of
from autoquant.kernels.gpu.images import quantize
from autoquant.kernels.gpu.integers import integers_of
from autoquant.kernels.gpu.launch import MAX_ROWS, ceil_div, launch
from autoquant.kernels.gpu.product import IntegerProduct
from autoquant.kernels.gpu.reading import FILLED, PIXELS, DeviceReader, Ending, bias_for
from autoquant.kernels.layout import contiguous_stride, is_channels_last
from autoquant.kernels.operation import Operation
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

NAN_PROGRAMS = 512
"""Programs that look for NaN once the quantizing kernel has seen one."""


@dataclass(frozen=True, slots=True)
class ConvProduct(IntegerProduct):
    """x [batch, channels, *spatial] convolved with a weight, both as integers."""

    geometry: Geometry
    dims: int
    layout: ClassVar[str] = PIXELS

    @property
    def reads(self) -> DeviceReader | None:
        """What makes the int8 that it takes, [batch, channels, *spatial] channels last.

        None where it takes none: where it is dynamic, and where it sums integers of which some only
        fill a pixel up.
        """
        filled = self.geometry.channels != self._channels
        if self.activation.dynamic or (filled and self.weight.has_zero):
            return None
        return DeviceReader(self.activation.static, FILLED if filled else PIXELS)

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with these int8."""
        if self.reads is None or q.dtype != torch.int8 or not self._fits(q):
            return False
        last = q.movedim(1, -1)
        if self.geometry.channels == self._channels:
            return q.numel() > 0 and last.is_contiguous()
        whole = (*last.shape[:-1], self.geometry.channels)
        there = q.untyped_storage().nbytes() - int(q.storage_offset()) >= math.prod(whole)
        return q.numel() > 0 and there and last.stride() == contiguous_stride(whole)

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """Return the shape of the output on int8 ``q``."""
        size = self.geometry.out_size(*(q.shape[2:] if q.dim() == 4 else (1, q.shape[2])))
        return (q.shape[0], self.geometry.outputs, *size[4 - q.dim() :])

    @property
    def _width(self) -> int:
        return self.geometry.channels

    @property
    def _channels(self) -> int:
        return self.geometry.groups * self.geometry.depth

    def _is_taken(self, x: Tensor) -> bool:
        return x.dtype == torch.float32 and self._fits(x)

    def _fits(self, x: Tensor) -> bool:
        """Return whether an activation of this shape gives an output, and not too large a one."""
        if x.dim() != self.dims or x.shape[1] != self._channels:
            return False
        samples, _, *sides = self.shape(x)
        return min(sides) > 0 and samples * math.prod(sides) <= MAX_ROWS

    def _gives_channels_last(self, x: Tensor) -> bool:
        """Return whether a float convolution of ``x`` returns channels last.

        On a GPU it is cuDNN that gives channels last for channels last; torch's own kernels, which
        compute where that is switched off, give a contiguous output for any input.
        """
        return is_channels_last(x) and (x.device.type == "cpu" or torch.backends.cudnn.enabled)

    def _chained(self, q: Tensor, bias: Tensor | None, end: Ending, last: bool) -> Tensor | None:
        image = q if q.dim() == 4 else q.unsqueeze(2)
        y = self._convolution(image, bias_for(bias, self.weight.scale), end, last)
        return y if y is None or q.dim() == 4 else y.squeeze(2)

    def _unchained(self, x: Tensor, bias: Tensor | None, end: Ending) -> Tensor | None:
        g, image = self.geometry, x if x.dim() == 4 else x.unsqueeze(2)
        images = quantize(image, self.activation, g.padding, g.channels)
        bias, last = bias_for(bias, self.weight.scale), self._gives_channels_last(x)
        out = self._convolution.of_images(images, bias, end, last)
        if out is None:
            return None
        self._spread_nan(image, images.flag, out)
        return out if x.dim() == 4 else out.squeeze(2)

    @property
    def _convolution(self) -> Convolution:
        return Convolution(self.geometry, self.weight, self.activation)

    def _spread_nan(self, image: Tensor, flag: Tensor, out: Tensor) -> None:
        g = self.geometry
        m = out.numel() // g.outputs
        launch(
            spread_nan,
            (min(ceil_div(m, 32) * g.groups, NAN_PROGRAMS),),
            image,
            flag,
            out,
            m,
            g.outputs // g.groups,
            g.groups,
            *image.shape[2:],
            *out.shape[2:],
            *g.stride,
            *g.padding,
            *g.dilation,
            *image.stride(),
            *out.stride()[:2],
            out.stride(3),
            g.depth,
            g.taps[1],
            g.taps[0] * g.taps[1] * g.depth,
            BLOCK_M=32,
            BLOCK_K=32,
        )


def conv_product(
    operation: Operation, weight: QuantizedWeight, scheme: ActivationScheme, device: torch.device
) -> ConvProduct | None:
    """Return the product of a convolution; None where the integers can't be.

    Padding so wide that a window sees nothing else is left to the reference.
    """
    geometry = geometry_of(operation, weight.shape)
    axes = zip(geometry.padding, geometry.dilation, geometry.taps, strict=True)
    if any(p < 0 or p > d * (t - 1) for p, d, t in axes):
        return None
    made = integers_of(weight, scheme, device, geometry.columns())
    if made is None:
        return None
    integers, activation = made
    if geometry.depthwise:
        integers = integers.transposed(geometry.taps[0] * geometry.taps[1])
    return ConvProduct(integers, activation, geometry, len(weight.shape))
