"""Product of two int8 matrices, with all that follows it in its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.epilogue import correct, numbers_of
from autoquant.kernels.gpu.device.handing import finish


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return (row, column) of a tile, in an order that keeps neighbours in the L2 cache."""
    per_group = GROUP_M * tiles_n
    first = program // per_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + program % per_group % height, program % per_group // height


@triton.jit(do_not_specialize=["M"])
def int8_matmul(
    a,  # int8 [M, width], contiguous
    b,  # int8 [N, width], contiguous; zeros from K on
    out,  # [M, N], contiguous: int8 where HANDS, else float32
    bias,  # float32 [N]
    static,  # float32 [4] of a: scale, zero point, qmin, qmax
    x_scale,  # float32 [M] where rows have numbers of their OWN, as the next two
    x_zero,  # int32 [M]
    x_sum,  # int32 [M]
    w_scale,  # float32 [N]
    w_zero,  # int32 [N]
    w_sum,  # int32 [N]
    to_static,  # float32 [4] of out, where HANDS
    flag,  # int32 [1]: becomes 1 where out is in doubt
    other,  # float32, lies as out: where ADDS it is added, before what is after
    statics,  # a tuple of float32 [4]
    integers,  # as many, int8 [M, N]: what each makes of out
    low,  # least and largest output, where AFTER is 1
    high,
    M,
    N,
    width,  # a multiple of 16
    OWN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    AFTER: tl.constexpr,  # see ``activated``
    HANDS: tl.constexpr,
    ADDS: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_K divides width
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile of out = after(real(a) · real(b)ᵀ + bias + other) a program."""
    # Says nothing new, but the compiler sees that 16 neighbours are one load.
    width = width // 16 * 16
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the first ones again, so that only K needs a mask.
    a_at = a + (m % M).to(tl.int64)[:, None] * width + k[None, :]
    b_at = b + (n % N).to(tl.int64)[None, :] * width + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, width, BLOCK_K):
        if EVEN:
            x = tl.load(a_at)
            w = tl.load(b_at)
        else:
            left = k < width - first
            x = tl.load(a_at, mask=left[None, :], other=0)
            w = tl.load(b_at, mask=left[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        if W_ZERO and not OWN:
            total += tl.sum(x.to(tl.int32), axis=1)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if W_ZERO and OWN:
        total = tl.load(x_sum + m % M)
    scale, zero = numbers_of(static, x_scale, x_zero, m % M, OWN)
    rows, columns = m < M, n < N
    acc = correct(acc, total, zero, w_zero, w_sum, n, columns, X_ZERO, W_ZERO)
    end = (to_static, flag, other, statics, integers, low, high)
    finish(
        acc,
        out,
        scale,
        w_scale,
        bias,
        end,
        rows,
        columns,
        m,
        n,
        N,
        1,
        HAS_BIAS,
        AFTER,
        HANDS,
        ADDS,
        True,
    )
