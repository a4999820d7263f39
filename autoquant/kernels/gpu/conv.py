"""Convolutions on one or two axes as products of channels-last integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.adding import added, can_add
from autoquant.kernels.gpu.chained_conv import Convolution
from autoquant.kernels.gpu.device.convolution import (
    depthwise_convolution,
    int8_convolution,
    spread_nan,
)
from autoquant.kernels.gpu.geometry import Geometry, geometry_of
from autoquant.kernels.gpu.images import QuantizedImages, quantize
from autoquant.kernels.gpu.integers import (
    IntegerActivation,
    IntegerWeight,
    fits_int32,
    integer_activation,
    integer_weight,
)
from autoquant.kernels.gpu.launch import (
    MAX_ROWS,
    Config,
    ceil_div,
    clamped,
    config,
    launch,
    takes,
)
from autoquant.kernels.gpu.reading import (
    FILLED,
    PIXELS,
    DeviceReader,
    Ending,
    bias_for,
    ending,
    is_bias,
    stored,
)
from autoquant.kernels.gpu.tuning import bucket, tuned
from autoquant.kernels.layout import contiguous_stride, is_channels_last
from autoquant.kernels.operation import Added, Clamp, Norm, Operation, Reader
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

DENSE = (
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, warps=4, stages=4),
)
GROUPED = (
    config(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=32, BLOCK_K=64, GROUP_M=8, warps=4, stages=3),
)
DEPTHWISE = (
    config(BLOCK_M=16, BLOCK_N=32, warps=4),
    config(BLOCK_M=32, BLOCK_N=32, warps=4),
    config(BLOCK_M=64, BLOCK_N=32, warps=4),
    config(BLOCK_M=32, BLOCK_N=64, warps=4),
    config(BLOCK_M=16, BLOCK_N=128, warps=4),
)
NAN_PROGRAMS = 512
"""Programs that look for NaN once the quantizing kernel has seen one."""


@dataclass(frozen=True, slots=True)
class ConvProduct:
    """x [batch, channels, *spatial] convolved with a weight, both as integers.

    By a static scheme it takes int8 and hands int8 on.
    """

    geometry: Geometry
    weight: IntegerWeight
    activation: IntegerActivation
    dims: int
    backend: str = "triton"

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return float32 [batch, N, *spatial]; None for another dtype, no batch, a gradient."""
        g = self.geometry
        if not self._is_taken(x) or not takes(x, bias, self.weight.q, g.outputs):
            return None
        last = _gives_channels_last(x)
        q = self.stored(x)
        if q is not None:
            return self._chained(q, bias, Ending(clamp), last)
        x, bias = x.detach(), bias_for(bias, self.weight.scale)
        image = x if x.dim() == 4 else x.unsqueeze(2)
        out = _empty(image.shape[0], g.outputs, g.out_size(*image.shape[2:]), last, x.device)
        quantized = quantize(image, self.activation, g.padding, g.channels)
        run = self._depthwise if g.depthwise else self._dense
        if not run(quantized, bias, out):
            return None
        self._spread_nan(image, quantized.flag, out)
        out = clamped(out, clamp)
        return out if x.dim() == 4 else out.squeeze(2)

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

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the int8 of a real activation; None where nobody collects doubts (``doubt``)."""
        reader = self.reads
        if reader is None or not self._is_taken(x):
            return None
        if not takes(x, None, self.weight.q, 0):
            return None
        return stored(x, reader, self.geometry.channels)

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

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return float32 [batch, N, *spatial] of an activation's int8."""
        y = self._chained(q, bias, Ending(clamp), channels_last and q.dim() == 4)
        if y is None:
            raise RuntimeError("the GPU runs the convolution in none of its block sizes")
        return y

    def handed(
        self,
        q: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        reader: Reader,
        gelu: str | None = None,
    ) -> Tensor | None:
        """Return it as the int8 that ``reader`` makes of it, channels last, in the same pass."""
        end = ending(clamp, gelu, reader, PIXELS, q)
        if end is None or not is_bias(bias, self.weight.scale):
            return None
        return self._chained(q, bias, end, True)

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """Return the shape of the output on int8 ``q``."""
        size = self.geometry.out_size(*(q.shape[2:] if q.dim() == 4 else (1, q.shape[2])))
        return (q.shape[0], self.geometry.outputs, *size[4 - q.dim() :])

    def added(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        clamp: Clamp | None,
        readers: Sequence[Reader],
        channels_last: bool,
    ) -> Added | None:
        """Return it plus ``other``, clamped, as float32 and as int8, all in the same pass."""
        last = channels_last and q.dim() == 4
        if not is_bias(bias, self.weight.scale) or not can_add(other, self.shape(q), last, q):
            return None
        return added(lambda end: self._chained(q, bias, end, last), other, clamp, readers, PIXELS)

    def normalized(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        norm: Norm,
        readers: Sequence[Reader],
        keeps: bool,
    ) -> None:
        """Return None: the last axis of a convolution's output is not its channels."""
        return None

    @property
    def _channels(self) -> int:
        return self.geometry.groups * self.geometry.depth

    def _is_taken(self, x: Tensor) -> bool:
        return x.dtype == torch.float32 and self._fits(x)

    def _fits(self, x: Tensor) -> bool:
        """Return whether an activation of this shape gives an output, and not too large a one."""
        if x.dim() != self.dims or x.shape[1] != self._channels:
            return False
        height, width = (1, x.shape[2]) if x.dim() == 3 else x.shape[2:]
        rows, columns = self.geometry.out_size(height, width)
        return min(rows, columns) > 0 and x.shape[0] * rows * columns <= MAX_ROWS

    def _chained(
        self, q: Tensor, bias: Tensor | None, end: Ending, channels_last: bool
    ) -> Tensor | None:
        convolve = Convolution(self.geometry, self.weight, self.activation.static)
        image = q if q.dim() == 4 else q.unsqueeze(2)
        y = convolve(image, bias_for(bias, self.weight.scale), end, channels_last)
        return y if y is None or q.dim() == 4 else y.squeeze(2)

    def _dense(self, x: QuantizedImages, bias: Tensor | None, out: Tensor) -> bool:
        g, weight = self.geometry, self.weight
        m, n = out.numel() // g.outputs, g.outputs // g.groups
        k = g.taps[0] * g.taps[1] * g.group_depth

        def run(c: Config) -> None:
            tiles = ceil_div(m, c.block("BLOCK_M")) * ceil_div(n, c.block("BLOCK_N"))
            launch(
                int8_convolution,
                (tiles, g.groups),
                x.q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                x.scale,
                x.zero,
                weight.scale,
                weight.zero,
                weight.sums,
                m,
                n,
                weight.q.shape[1],
                *x.q.shape[1:3],
                *out.shape[2:],
                *g.stride,
                *g.dilation,
                *out.stride()[:2],
                out.stride(3),
                g.channels,
                g.group_depth,
                g.taps[1],
                k,
                ALIGNED=math.gcd(g.group_depth, 16),
                PER_SAMPLE=self.activation.dynamic,
                LAST=out.stride(1) == 1,
                HAS_BIAS=bias is not None,
                X_ZERO=not self.activation.fold,
                W_ZERO=weight.has_zero,
                **c.arguments(),
            )

        choices = GROUPED if n <= 32 else DENSE
        return self._launch("int8 convolution", m, choices, run, out)

    def _depthwise(self, x: QuantizedImages, bias: Tensor | None, out: Tensor) -> bool:
        g, weight = self.geometry, self.weight
        m, n = out.numel() // g.outputs, g.outputs

        def run(c: Config) -> None:
            launch(
                depthwise_convolution,
                (ceil_div(m, c.block("BLOCK_M")), ceil_div(n, c.block("BLOCK_N"))),
                x.q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                x.scale,
                x.zero,
                weight.scale,
                weight.zero,
                m,
                n,
                *x.q.shape[1:3],
                *out.shape[2:],
                *g.stride,
                *g.dilation,
                *out.stride()[:2],
                out.stride(3),
                g.channels,
                MULTIPLIER=g.outputs // g.groups,
                TAPS_Y=g.taps[0],
                TAPS_X=g.taps[1],
                PER_SAMPLE=self.activation.dynamic,
                LAST=out.stride(1) == 1,
                HAS_BIAS=bias is not None,
                X_ZERO=not self.activation.fold,
                **c.arguments(),
            )

        return self._launch("depthwise convolution", m, DEPTHWISE, run, out)

    def _launch(
        self,
        kernel: str,
        m: int,
        choices: Sequence[Config],
        run: Callable[[Config], None],
        out: Tensor,
    ) -> bool:
        g = self.geometry
        shape = (bucket(m), g.outputs, g.depth, g.groups, *g.taps, *g.stride)
        best = tuned(kernel, shape, choices, run, out.device)
        if best is not None:
            run(best)
        return best is not None

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


def _gives_channels_last(x: Tensor) -> bool:
    """Return whether a float convolution of ``x`` returns channels last.

    On a GPU it is cuDNN that gives channels last for channels last; torch's own kernels, which
    compute where that is switched off, give a contiguous output for any input.
    """
    return is_channels_last(x) and (x.device.type == "cpu" or torch.backends.cudnn.enabled)


def _empty(
    samples: int, channels: int, size: tuple[int, int], last: bool, device: torch.device
) -> Tensor:
    """Return an output that is to be filled, channels last or contiguous."""
    if last:
        shape = (samples, *size, channels)
        return torch.empty(shape, dtype=torch.float32, device=device).permute(0, 3, 1, 2)
    return torch.empty(samples, channels, *size, dtype=torch.float32, device=device)


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
    activation = integer_activation(scheme, device)
    if activation is None or not fits_int32(weight.q.shape[1], scheme, weight):
        return None
    integers = integer_weight(weight, device, geometry.columns())
    if integers is None:
        return None
    if geometry.depthwise:
        integers = integers.transposed(geometry.taps[0] * geometry.taps[1])
    return ConvProduct(geometry, integers, activation, len(weight.shape))
