"""Quantizing the rows of a matrix, one token a row, and numbers that lie as they like."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.affine import choose_qparams, quantize


@triton.jit(do_not_specialize=["rows"])
def quantize_rows(
    x,  # float32 [rows, columns], any strides
    static,  # float32 [4]: scale and zero point of a static scheme, qmin, qmax
    q,  # int8 [rows, width], contiguous; columns beyond ``columns`` become 0
    scales,  # float32 [rows]; NaN where the row has a NaN
    zeros,  # int32 [rows]: what is still to be subtracted from q
    sums,  # int32 [rows]: sum of q
    rows,
    columns,
    width,
    x_row,
    x_column,
    SYMMETRIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize ``ROWS`` rows a program; FOLD stores q − zero, where every zero is 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    qmin, qmax = tl.load(static + 2), tl.load(static + 3)
    column = tl.arange(0, BLOCK)
    start = x + row.to(tl.int64)[:, None] * x_row
    bad = tl.zeros((ROWS,), tl.int32)
    if DYNAMIC:
        lo = tl.zeros((ROWS,), tl.float32)  # every range holds 0
        hi = tl.zeros((ROWS,), tl.float32)
        for first in range(0, columns, BLOCK):
            at = first + column
            mask = alive[:, None] & (at < columns)[None, :]
            block = tl.load(start + at.to(tl.int64)[None, :] * x_column, mask=mask, other=0.0)
            bad = tl.maximum(bad, tl.max((block != block).to(tl.int32), axis=1))
            block = tl.where(block == block, block, 0.0)
            lo = tl.minimum(lo, tl.min(block, axis=1))
            hi = tl.maximum(hi, tl.max(block, axis=1))
        scale, zero = choose_qparams(lo, hi, qmin, qmax, SYMMETRIC)
    else:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(static)
        zero = tl.zeros((ROWS,), tl.float32) + tl.load(static + 1)
    total = tl.zeros((ROWS,), tl.int32)
    for first in range(0, width, BLOCK):
        at = first + column
        mask = alive[:, None] & (at < columns)[None, :]
        block = tl.load(start + at.to(tl.int64)[None, :] * x_column, mask=mask, other=0.0)
        if not DYNAMIC:
            bad = tl.maximum(bad, tl.max((block != block).to(tl.int32), axis=1))
        y = quantize(block, scale[:, None], zero[:, None], qmin, qmax)
        if not FOLD:
            y += zero[:, None]
        y = tl.where(mask, y, 0.0).to(tl.int32)
        total += tl.sum(y, axis=1)
        to = q + row.to(tl.int64)[:, None] * width + at[None, :]
        tl.store(to, y.to(tl.int8), mask=alive[:, None] & (at < width)[None, :])
    # One NaN among its inputs makes every output of a linear layer NaN, and a scale carries that.
    tl.store(scales + row, tl.where(bad > 0, float("nan"), scale), mask=alive)
    tl.store(zeros + row, zero.to(tl.int32) if not FOLD else total * 0, mask=alive)
    tl.store(sums + row, total, mask=alive)


@triton.jit
def quantize_flat(
    x,  # float32 [count]
    static,  # float32 [4]: scale, zero point, qmin, qmax
    q,  # int8 [count], which lies as ``x`` does
    flag,  # int32 [1]: becomes 1 where x holds a NaN
    count,
    BLOCK: tl.constexpr,
):
    """Quantize BLOCK numbers a program, whatever tensor they are."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    block = tl.load(x + at, mask=mask, other=0.0)
    tl.store(flag + tl.zeros((BLOCK,), tl.int32), 1, mask=block != block)
    zero = tl.load(static + 1)
    y = quantize(block, tl.load(static), zero, tl.load(static + 2), tl.load(static + 3))
    tl.store(q + at, (y + zero).to(tl.int8), mask=mask)
