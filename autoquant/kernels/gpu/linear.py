"""Linear layers as products of int8 matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.adding import added, can_add, is_norm, normalized
from autoquant.kernels.gpu.device.chained import chained_matmul
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
    light,
    next_power_of_2,
    takes,
)
from autoquant.kernels.gpu.reading import (
    ROWS,
    DeviceReader,
    Ending,
    bias_for,
    ending,
    is_bias,
    stored,
)
from autoquant.kernels.gpu.tuning import bucket, tuned
from autoquant.kernels.operation import Added, Clamp, Norm, Reader
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
CHAINED_SMALL = (
    config(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
)
CHAINED_LARGE = (
    config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, warps=4, stages=4),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=4, stages=3),
    config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, warps=8, stages=3),
    config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, warps=8, stages=3),
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
    """x [..., K] · weight [N, K], both as integers, with K = ``columns``.

    By a static scheme it takes int8 and hands int8 on, where K is a multiple of 16: rows of other
    lengths aren't aligned.
    """

    weight: IntegerWeight
    activation: IntegerActivation
    columns: int
    backend: str = "triton"

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return float32 [..., N]; None for another dtype, an empty activation, a gradient."""
        outputs = self.weight.scale.shape[0]
        if not self._is_taken(x) or not takes(x, bias, self.weight.q, outputs):
            return None
        q = self.stored(x)
        if q is not None:
            return self._chained(q, bias_for(bias, self.weight.scale), Ending(clamp))
        x, bias = x.detach(), bias_for(bias, self.weight.scale)
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

    @property
    def reads(self) -> DeviceReader | None:
        """What makes the int8 that it takes, contiguous [..., K]; None where it takes none."""
        if self.activation.dynamic or self.columns % 16 != 0:
            return None
        return DeviceReader(self.activation.static, ROWS)

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the int8 of a real activation; None where nobody collects doubts (``doubt``)."""
        reader = self.reads
        if reader is None or not self._is_taken(x):
            return None
        return stored(x, reader, self.columns) if takes(x, None, self.weight.q, 0) else None

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with these int8."""
        if self.reads is None or q.dtype != torch.int8 or not q.is_contiguous():
            return False
        fits = q.dim() > 0 and q.shape[-1] == self.columns
        return fits and 0 < q.numel() <= MAX_ROWS * self.columns

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return float32 [..., N] of an activation's int8."""
        y = self._chained(q, bias_for(bias, self.weight.scale), Ending(clamp))
        if y is None:
            raise RuntimeError("the GPU runs the product in none of its block sizes")
        return y

    def handed(
        self,
        q: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        reader: Reader,
        gelu: str | None = None,
    ) -> Tensor | None:
        """Return it as the int8 [..., N] that ``reader`` makes of it, in the same pass."""
        end = ending(clamp, gelu, reader, ROWS, q)
        if end is None or not is_bias(bias, self.weight.scale):
            return None
        return self._chained(q, bias_for(bias, self.weight.scale), end)

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """Return the shape of the output on int8 ``q``."""
        return (*q.shape[:-1], self.weight.scale.shape[0])

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
        if not self._can_add(q, bias, other):
            return None
        bias = bias_for(bias, self.weight.scale)
        return added(lambda end: self._chained(q, bias, end), other, clamp, readers, ROWS)

    def normalized(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        norm: Norm,
        readers: Sequence[Reader],
        keeps: bool,
    ) -> Added | None:
        """Return the norm of it plus ``other``, as float32 and as int8, in a second pass."""
        if not self._can_add(q, bias, other) or not is_norm(norm, self.weight.scale):
            return None
        y = self._chained(q, bias_for(bias, self.weight.scale), Ending())
        return None if y is None else normalized(y, other, norm, readers, keeps)

    def _can_add(self, q: Tensor, bias: Tensor | None, other: Tensor) -> bool:
        return is_bias(bias, self.weight.scale) and can_add(other, self.shape(q), False, q)

    def _is_taken(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or x.dim() == 0 or x.shape[-1] != self.columns:
            return False
        return x.numel() <= MAX_ROWS * self.columns

    def _chained(self, q: Tensor, bias: Tensor | None, end: Ending) -> Tensor | None:
        """Return the product of int8 ``q`` [..., K], ended so."""
        weight, k, n = self.weight, self.columns, self.weight.scale.shape[0]
        m = q.numel() // k
        out = torch.empty(*q.shape[:-1], n, dtype=end.dtype, device=q.device)

        def run(c: Config) -> None:
            launch(
                chained_matmul,
                (ceil_div(m, c.block("BLOCK_M")) * ceil_div(n, c.block("BLOCK_N")),),
                q,
                weight.q,
                out,
                weight.scale if bias is None else bias,
                self.activation.static,
                weight.scale,
                weight.zero,
                weight.sums,
                *end.to(self.activation.static, weight),
                m,
                n,
                k,
                *end.ends,
                HAS_BIAS=bias is not None,
                W_ZERO=weight.has_zero,
                **end.flags,
                EVEN=k % c.block("BLOCK_K") == 0,
                **c.arguments(),
            )

        count = bucket(m)
        shape = (count, n, k, bias is not None, weight.has_zero, end.after, *end.counts)
        large = CHAINED_LARGE if end.addition is None else SUM_LARGE
        choices = CHAINED_SMALL if count <= 32 else large
        best = tuned(f"int8 matmul {end.kind}", shape, choices, run, q.device)
        if best is None:
            return None
        run(best)
        return out


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
