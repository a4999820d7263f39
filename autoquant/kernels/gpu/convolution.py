"""Convolutions of int8 that lie channels last, to real numbers or to such int8."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.convolution import int8_convolution
from autoquant.kernels.gpu.geometry import Geometry
from autoquant.kernels.gpu.images import QuantizedImages
from autoquant.kernels.gpu.integers import IntegerActivation, IntegerWeight
from autoquant.kernels.gpu.launch import Config, ceil_div, config, launch, light
from autoquant.kernels.gpu.reading import Ending
from autoquant.kernels.gpu.tuning import bucket, tuned

DENSE = (
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=256, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, warps=4, stages=4),
)
SUM_DENSE = light(DENSE)
GROUPED = (
    config(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=32, BLOCK_K=64, GROUP_M=8, warps=4, stages=3),
)
DEPTHWISE = (
    config(BLOCK_M=16, BLOCK_N=32, warps=4),
    config(BLOCK_M=32, BLOCK_N=32, warps=4),
    config(BLOCK_M=64, BLOCK_N=32, warps=4),
    config(BLOCK_M=32, BLOCK_N=64, warps=4),
    config(BLOCK_M=16, BLOCK_N=128, warps=4),
    config(BLOCK_M=32, BLOCK_N=128, warps=4),
)
ONE_PIXEL, ONE_TAP, ANY, ONE_CHANNEL = range(4)
"""What a block of columns of a window holds, as kernels call it."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A weight and how it meets an activation."""

    geometry: Geometry
    weight: IntegerWeight
    activation: IntegerActivation

    def __call__(self, q: Tensor, bias: Tensor | None, end: Ending, last: bool) -> Tensor | None:
        """Return the output on ``q``, int8 [samples, channels, height, width] channels last.

        It lies channels last where it is integers or ``last`` says so. None where no cut of the
        kernel runs on this GPU.
        """
        return self._run(self.geometry, q, None, bias, end, last)

    def of_images(
        self, x: QuantizedImages, bias: Tensor | None, end: Ending, last: bool
    ) -> Tensor | None:
        """Return the same on images whose padding is in memory, and by their own numbers."""
        geometry = replace(self.geometry, padding=(0, 0))
        return self._run(geometry, x.q.permute(0, 3, 1, 2), x, bias, end, last)

    def _run(
        self,
        g: Geometry,
        q: Tensor,
        images: QuantizedImages | None,
        bias: Tensor | None,
        end: Ending,
        last: bool,
    ) -> Tensor | None:
        weight, static, last = self.weight, self.activation.static, last or end.reader is not None
        samples, _, height, width = q.shape
        rows, columns = g.out_size(height, width)
        shape = (samples, rows, columns, g.outputs) if last else (samples, g.outputs, rows, columns)
        out = torch.empty(shape, dtype=end.dtype, device=q.device)
        own = images is not None and self.activation.dynamic
        m, n = samples * rows * columns, g.outputs // g.groups
        window = {"ALIGNED": math.gcd(g.group_depth, 16), "W_ZERO": weight.has_zero}
        if g.depthwise:
            window = {"WINDOW": ONE_CHANNEL, "ALIGNED": math.gcd(g.channels, 16), "W_ZERO": False}
            window |= {"MULTIPLIER": n, "TAPS_Y": g.taps[0], "TAPS_X": g.taps[1]}
            n = g.outputs

        def run(c: Config) -> None:
            tiles = ceil_div(m, c.block("BLOCK_M")), ceil_div(n, c.block("BLOCK_N"))
            held = {} if g.depthwise else {"WINDOW": self._window(c.block("BLOCK_K"))}
            launch(
                int8_convolution,
                tiles if g.depthwise else (tiles[0] * tiles[1], g.groups),
                q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                static,
                static if images is None else images.scale,
                static if images is None else images.zero,
                *weight.numbers,
                *end.to(static, weight),
                m,
                n,
                weight.q.shape[1],
                height,
                width,
                rows,
                columns,
                *g.stride,
                *g.padding,
                *g.dilation,
                g.channels,
                g.group_depth,
                g.taps[1],
                g.taps[0] * g.taps[1] * g.group_depth,
                OWN=own,
                ALIGNED_N=math.gcd(n, 16),
                PADDED=any(g.padding),
                LAST=last,
                ALIGNED_AREA=1 if last else math.gcd(rows * columns, 4),
                HAS_BIAS=bias is not None,
                X_ZERO=not self.activation.fold,
                **end.flags,
                **(window | held),
                **c.arguments(),
            )

        choices = GROUPED if n <= 32 else DENSE if end.addition is None else SUM_DENSE
        name, choices = ("depthwise", DEPTHWISE) if g.depthwise else ("int8", choices)
        problem = (bucket(m), g.outputs, g.depth, g.groups, *g.taps, *g.stride)
        more = (last, images is not None, *end.counts)
        name = f"{name} convolution {end.kind}"
        if tuned(name, (*problem, *more), choices, run, q.device) is None:
            return None
        return out.permute(0, 3, 1, 2) if last else out

    def _window(self, block: int) -> int:
        """Return what a block of so many columns of a window holds."""
        if self.geometry.taps == (1, 1):
            return ONE_PIXEL
        return ONE_TAP if self.geometry.group_depth % block == 0 else ANY
