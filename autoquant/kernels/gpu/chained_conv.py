"""Convolutions of int8 that lie channels last and unpadded, to real numbers or to such int8."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.chained_convolution import chained_convolution, chained_depthwise
from autoquant.kernels.gpu.geometry import Geometry
from autoquant.kernels.gpu.integers import IntegerWeight
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
ONE_PIXEL, ONE_TAP, ANY = 0, 1, 2
"""What a block of columns of a window holds, as kernels call it."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A weight and how it meets an activation by ``static``, float32 [4]."""

    geometry: Geometry
    weight: IntegerWeight
    static: Tensor

    def __call__(self, q: Tensor, bias: Tensor | None, end: Ending, last: bool) -> Tensor | None:
        """Return the output on ``q``, int8 [samples, channels, height, width] channels last.

        It lies channels last where it is integers or ``last`` says so. None where no cut of the
        kernel runs on this GPU.
        """
        g, last = self.geometry, last or end.reader is not None
        samples, _, height, width = q.shape
        rows, columns = g.out_size(height, width)
        shape = (samples, rows, columns, g.outputs) if last else (samples, g.outputs, rows, columns)
        out = torch.empty(shape, dtype=end.dtype, device=q.device)
        run = self._depthwise if g.depthwise else self._dense
        if not run(q, bias, out, end, samples * rows * columns, last):
            return None
        return out.permute(0, 3, 1, 2) if last else out

    def _dense(
        self, q: Tensor, bias: Tensor | None, out: Tensor, end: Ending, m: int, last: bool
    ) -> bool:
        g, weight = self.geometry, self.weight
        n, k = g.outputs // g.groups, g.taps[0] * g.taps[1] * g.group_depth

        def run(c: Config) -> None:
            tiles = ceil_div(m, c.block("BLOCK_M")) * ceil_div(n, c.block("BLOCK_N"))
            whole = ONE_TAP if g.group_depth % c.block("BLOCK_K") == 0 else ANY
            launch(
                chained_convolution,
                (tiles, g.groups),
                q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                self.static,
                weight.scale,
                weight.zero,
                weight.sums,
                *end.to(self.static, weight),
                m,
                n,
                weight.q.shape[1],
                *self._sizes(q),
                g.channels,
                g.group_depth,
                g.taps[1],
                k,
                *end.ends,
                ALIGNED=math.gcd(g.group_depth, 16),
                ALIGNED_N=math.gcd(n, 16),
                WINDOW=ONE_PIXEL if g.taps == (1, 1) else whole,
                PADDED=any(g.padding),
                LAST=last,
                ALIGNED_AREA=1 if last else math.gcd(out.shape[2] * out.shape[3], 4),
                HAS_BIAS=bias is not None,
                W_ZERO=weight.has_zero,
                **end.flags,
                **c.arguments(),
            )

        name, wide = f"int8 convolution {end.kind}", DENSE if end.addition is None else SUM_DENSE
        return self._tuned(name, m, GROUPED if n <= 32 else wide, run, out, (last, *end.counts))

    def _depthwise(
        self, q: Tensor, bias: Tensor | None, out: Tensor, end: Ending, m: int, last: bool
    ) -> bool:
        g, weight = self.geometry, self.weight
        n = g.outputs

        def run(c: Config) -> None:
            launch(
                chained_depthwise,
                (ceil_div(m, c.block("BLOCK_M")), ceil_div(n, c.block("BLOCK_N"))),
                q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                self.static,
                weight.scale,
                weight.zero,
                *end.to(self.static, weight),
                m,
                n,
                *self._sizes(q),
                g.channels,
                *end.ends,
                MULTIPLIER=n // g.groups,
                TAPS_Y=g.taps[0],
                TAPS_X=g.taps[1],
                LAST=last,
                ALIGNED_AREA=1 if last else math.gcd(out.shape[2] * out.shape[3], 4),
                HAS_BIAS=bias is not None,
                **end.flags,
                **c.arguments(),
            )

        name = f"depthwise convolution {end.kind}"
        return self._tuned(name, m, DEPTHWISE, run, out, (last, *end.counts))

    def _sizes(self, q: Tensor) -> tuple[int, ...]:
        """Return height and width of image and output, then stride, padding, dilation."""
        g, (height, width) = self.geometry, q.shape[2:]
        return (
            *(height, width),
            *g.out_size(height, width),
            *g.stride,
            *g.padding,
            *g.dilation,
        )

    def _tuned(
        self,
        kernel: str,
        m: int,
        choices: Sequence[Config],
        run: Callable[[Config], None],
        out: Tensor,
        more: tuple[int, ...],
    ) -> bool:
        g = self.geometry
        shape = (bucket(m), g.outputs, g.depth, g.groups, *g.taps, *g.stride, *more)
        best = tuned(kernel, shape, choices, run, out.device)
        if best is not None:
            run(best)
        return best is not None
