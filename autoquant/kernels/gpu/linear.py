"""Linear layers as products of int8 matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.matmul import int8_matmul
from autoquant.kernels.gpu.device.rows import quantize_rows
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
    next_power_of_2,
    takes,
)
from autoquant.kernels.gpu.tuning import bucket, tuned
from autoquant.kernels.operation import Clamp
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

ROW_ELEMENTS = 4096
"""Numbers that one program of the quantizing kernel holds at a time."""
SMALL = (
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
)
LARGE = (
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=4),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
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


def empty_rows(rows: int, width: int, device: torch.device) -> QuantizedRows:
    """Return what ``quantize`` fills: every number of it."""
    return QuantizedRows(
        torch.empty(rows, width, dtype=torch.int8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )


def quantize(x: Tensor, activation: IntegerActivation, out: QuantizedRows) -> None:
    """Quantize ``x``, float32 [M, K] of any strides, into ``out``."""
    rows, columns = x.shape
    block = min(next_power_of_2(max(columns, 16)), ROW_ELEMENTS)
    per_program = min(ROW_ELEMENTS // block, 16, next_power_of_2(rows))
    launch(
        quantize_rows,
        (ceil_div(rows, per_program),),
        x,
        activation.static,
        out.q,
        out.scale,
        out.zero,
        out.sums,
        rows,
        columns,
        out.q.shape[1],
        x.stride(0),
        x.stride(1),
        SYMMETRIC=activation.symmetric,
        DYNAMIC=activation.dynamic,
        FOLD=activation.fold,
        ROWS=per_program,
        BLOCK=block,
    )


def multiply(
    x: QuantizedRows,
    weight: IntegerWeight,
    bias: Tensor | None,
    has_zero: bool,
    out: Tensor,
    c: Config,
) -> None:
    """Write the real products of ``x`` [M, K] and ``weight`` [N, K] to ``out``, float32 [M, N].

    ``has_zero`` says whether the activation's zero points are still to be corrected.
    """
    m, n = out.shape
    programs = ceil_div(m, c.block("BLOCK_M")) * ceil_div(n, c.block("BLOCK_N"))
    launch(
        int8_matmul,
        (programs,),
        x.q,
        weight.q,
        out,
        weight.scale if bias is None else bias,
        x.scale,
        x.zero,
        x.sums,
        weight.scale,
        weight.zero,
        weight.sums,
        m,
        n,
        x.q.shape[1],
        HAS_BIAS=bias is not None,
        X_ZERO=has_zero,
        W_ZERO=weight.has_zero,
        **c.arguments(),
    )


@dataclass(frozen=True, slots=True)
class LinearProduct:
    """x [..., K] · weight [N, K], both as integers."""

    weight: IntegerWeight
    activation: IntegerActivation
    columns: int
    backend: str = "triton"

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return float32 [..., N]; None for another dtype, an empty activation, a gradient."""
        outputs = self.weight.scale.shape[0]
        if x.dtype != torch.float32 or x.dim() == 0 or x.shape[-1] != self.columns:
            return None
        if not takes(x, bias, self.weight.q, outputs) or x.numel() // self.columns > MAX_ROWS:
            return None
        x, bias = x.detach(), None if bias is None else bias.detach().contiguous()
        matrix = x.reshape(-1, self.columns)
        rows = empty_rows(matrix.shape[0], self.weight.q.shape[1], x.device)
        quantize(matrix, self.activation, rows)
        out = torch.empty(matrix.shape[0], outputs, dtype=torch.float32, device=x.device)

        def run(c: Config) -> None:
            multiply(rows, self.weight, bias, not self.activation.fold, out, c)

        count = bucket(matrix.shape[0])
        flags = (bias is not None, not self.activation.fold, self.weight.has_zero)
        shape = (count, outputs, self.columns, *flags)
        best = tuned("int8 matmul", shape, SMALL if count <= 32 else LARGE, run, x.device)
        if best is None:
            return None
        run(best)
        return clamped(out, clamp).view(*x.shape[:-1], outputs)


def linear_product(
    weight: QuantizedWeight, scheme: ActivationScheme, device: torch.device
) -> LinearProduct | None:
    """Return the product of a linear layer; None where the integers can't be."""
    activation = integer_activation(scheme, device)
    if activation is None or not fits_int32(weight.q.shape[1], scheme, weight):
        return None
    integers = integer_weight(weight, device)
    if integers is None:
        return None
    return LinearProduct(integers, activation, weight.q.shape[1])
