"""Linear layers as products of int8 matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.matmul import int8_matmul
from autoquant.kernels.gpu.device.rows import quantize_rows
from autoquant.kernels.gpu.integers import IntegerActivation, integers_of
from autoquant.kernels.gpu.launch import (
    MAX_ROWS,
    Config,
    ceil_div,
    config,
    launch,
    light,
    next_power_of_2,
)
from autoquant.kernels.gpu.product import IntegerProduct
from autoquant.kernels.gpu.reading import ROWS, DeviceReader, Ending, bias_for
from autoquant.kernels.gpu.tuning import bucket, tuned
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

ROW_ELEMENTS = 4096
"""Numbers that one program of the quantizing kernel holds at a time."""
SMALL = (
    config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
)
_LARGE = (
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
)
LARGE = (
    *_LARGE,
    config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=4),
)
CHAINED_LARGE = (
    *_LARGE,
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=64, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
)
SUM_LARGE = (
    *light(CHAINED_LARGE),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix as int8 rows: ``q`` [M, width], then one number for each row.

    ``scale`` is float32, NaN where the row holds one; ``zero`` and ``sums`` are int32.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor


def quantize(x: Tensor, activation: IntegerActivation, width: int) -> QuantizedRows:
    """Quantize ``x``, float32 [M, K] of any strides, into rows of ``width``."""
    rows, columns = x.shape
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    zero, sums = (torch.empty(rows, dtype=torch.int32, device=x.device) for _ in range(2))
    block = min(next_power_of_2(max(columns, 16)), ROW_ELEMENTS)
    per_program = min(ROW_ELEMENTS // block, 16, next_power_of_2(rows))
    launch(
        quantize_rows,
        (ceil_div(rows, per_program),),
        x,
        activation.static,
        q,
        scale,
        zero,
        sums,
        rows,
        columns,
        width,
        *x.stride(),
        SYMMETRIC=activation.symmetric,
        DYNAMIC=activation.dynamic,
        FOLD=activation.fold,
        ROWS=per_program,
        BLOCK=block,
    )
    return QuantizedRows(q, scale, zero, sums)


@dataclass(frozen=True, slots=True)
class LinearProduct(IntegerProduct):
    """x [..., K] · weight [N, K], both as integers, with K = ``columns``.

    It takes int8 where K is a multiple of 16: rows of other lengths aren't aligned.
    """

    columns: int
    layout: ClassVar[str] = ROWS

    @property
    def reads(self) -> DeviceReader | None:
        """What makes the int8 that it takes, contiguous [..., K]; None where it takes none."""
        if self.activation.dynamic or self.columns % 16 != 0:
            return None
        return DeviceReader(self.activation.static, ROWS)

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with these int8."""
        if self.reads is None or q.dtype != torch.int8 or not q.is_contiguous():
            return False
        fits = q.dim() > 0 and q.shape[-1] == self.columns
        return fits and 0 < q.numel() <= MAX_ROWS * self.columns

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """Return the shape of the output on int8 ``q``."""
        return (*q.shape[:-1], len(self.weight.scale))

    @property
    def _width(self) -> int:
        return self.columns

    def _is_taken(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or x.dim() == 0 or x.shape[-1] != self.columns:
            return False
        return x.numel() <= MAX_ROWS * self.columns

    def _chained(self, q: Tensor, bias: Tensor | None, end: Ending, last: bool) -> Tensor | None:
        return self._multiply(q, None, bias, end)

    def _unchained(self, x: Tensor, bias: Tensor | None, end: Ending) -> Tensor | None:
        matrix = x.reshape(-1, self.columns)
        rows = quantize(matrix, self.activation, self.weight.q.shape[1])
        y = self._multiply(rows.q, rows, bias, end)
        return None if y is None else y.view(self.shape(x))

    def _multiply(
        self, q: Tensor, rows: QuantizedRows | None, bias: Tensor | None, end: Ending
    ) -> Tensor | None:
        """Return the product of int8 ``q`` [..., width]: of ``rows`` with numbers of their own."""
        weight, bias = self.weight, bias_for(bias, self.weight.scale)
        n, width = weight.q.shape
        m = q.numel() // width
        static = self.activation.static
        out = torch.empty(self.shape(q), dtype=end.dtype, device=q.device)

        def run(c: Config) -> None:
            launch(
                int8_matmul,
                (ceil_div(m, c.block("BLOCK_M")) * ceil_div(n, c.block("BLOCK_N")),),
                q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                static,
                static if rows is None else rows.scale,
                weight.zero if rows is None else rows.zero,
                weight.sums if rows is None else rows.sums,
                *weight.numbers,
                *end.to(static, weight),
                m,
                n,
                width,
                OWN=rows is not None,
                HAS_BIAS=bias is not None,
                X_ZERO=not self.activation.fold,
                W_ZERO=weight.has_zero,
                **end.flags,
                EVEN=width % c.block("BLOCK_K") == 0,
                **c.arguments(),
            )

        name, large = f"int8 matmul {end.kind}", SUM_LARGE if end.addition else CHAINED_LARGE
        if rows is not None:
            name, large = "int8 matmul", LARGE
        count = bucket(m)
        choices = SMALL if count <= 32 else large
        flags = (bias is not None, not self.activation.fold, weight.has_zero, end.after)
        shape, choices = (
            (count, n, self.columns, *flags, *end.counts),
            SMALL if count <= 32 else large,
        )
        return None if tuned(name, shape, choices, run, q.device) is None else out


def linear_product(
    weight: QuantizedWeight, scheme: ActivationScheme, device: torch.device
) -> LinearProduct | None:
    """Return the product of a linear layer; None where the integers can't be."""
    made = integers_of(weight, scheme, device)
    return None if made is None else LinearProduct(*made, weight.q.shape[1])
