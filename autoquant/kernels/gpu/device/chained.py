"""Linear layers between integers: quantizing an activation, and products that take it as int8."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.affine import quantize
from autoquant.kernels.gpu.device.epilogue import correct
from autoquant.kernels.gpu.device.handing import finish
from autoquant.kernels.gpu.device.matmul import tile_of


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


@triton.jit(do_not_specialize=["M"])
def chained_matmul(
    a,  # int8 [M, K], contiguous
    b,  # int8 [N, K], contiguous
    out,  # [M, N], contiguous: int8 where HANDS, else float32
    bias,  # float32 [N]
    static,  # float32 [4] of a: scale, zero point, qmin, qmax
    w_scale,  # float32 [N]
    w_zero,  # int32 [N]
    w_sum,  # int32 [N]
    to_static,  # float32 [4] of out, where HANDS
    flag,  # int32 [1]: becomes 1 where out is in doubt
    other,  # float32, lies as out: where ADDS it is added, before what is after
    statics,  # a tuple of float32 [4]
    integers,  # as many, int8 [M, N]: what each makes of out
    M,
    N,
    K,  # a multiple of 16
    low,  # least and largest output, where AFTER is 1
    high,
    HAS_BIAS: tl.constexpr,
    W_ZERO: tl.constexpr,
    AFTER: tl.constexpr,  # see ``activated``
    HANDS: tl.constexpr,
    ADDS: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_K divides K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile of out = after(real(a) · real(b)ᵀ + bias + other) a program."""
    # Says nothing new, but the compiler sees that 16 neighbours are one load.
    K = K // 16 * 16
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the first ones again, so that only K needs a mask.
    a_at = a + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    b_at = b + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, K, BLOCK_K):
        if EVEN:
            x = tl.load(a_at)
            w = tl.load(b_at)
        else:
            left = k < K - first
            x = tl.load(a_at, mask=left[None, :], other=0)
            w = tl.load(b_at, mask=left[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        if W_ZERO:
            total += tl.sum(x.to(tl.int32), axis=1)
        a_at += BLOCK_K
        b_at += BLOCK_K
    rows, columns = m < M, n < N
    acc = correct(
        acc,
        total,
        tl.zeros((BLOCK_M,), tl.int32) + tl.load(static + 1).to(tl.int32),
        tl.load(w_zero + n, mask=columns, other=0),
        tl.load(w_sum + n, mask=columns, other=0),
        True,
        W_ZERO,
    )
    scale = tl.load(w_scale + n, mask=columns, other=0.0)
    shift = scale * 0.0
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=columns, other=0.0)
    finish(
        acc,
        out,
        static,
        scale,
        shift,
        to_static,
        flag,
        other,
        statics,
        integers,
        rows,
        columns,
        m,
        n,
        N,
        1,
        low,
        high,
        AFTER,
        HANDS,
        ADDS,
        True,
    )
