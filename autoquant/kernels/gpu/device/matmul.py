"""Product of two int8 matrices with the zero points, scales and bias in its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.epilogue import correct, to_real


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
    out,  # float32 [M, N], contiguous
    bias,  # float32 [N]
    x_scale,  # float32 [M]
    x_zero,  # int32 [M]
    x_sum,  # int32 [M]
    w_scale,  # float32 [N]
    w_zero,  # int32 [N]
    w_sum,  # int32 [N]
    M,
    N,
    width,
    HAS_BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile of out = dequantized(a) · dequantized(b)ᵀ + bias a program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the first ones again, so that only K needs a mask.
    a_at = a + (m % M).to(tl.int64)[:, None] * width + k[None, :]
    b_at = b + (n % N).to(tl.int64)[None, :] * width + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, width, BLOCK_K):
        left = k < width - first
        x = tl.load(a_at, mask=left[None, :], other=0)
        w = tl.load(b_at, mask=left[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K
    rows, columns = m < M, n < N
    acc = correct(
        acc,
        tl.load(x_sum + m, mask=rows, other=0),
        tl.load(x_zero + m, mask=rows, other=0),
        tl.load(w_zero + n, mask=columns, other=0),
        tl.load(w_sum + n, mask=columns, other=0),
        X_ZERO,
        W_ZERO,
    )
    scale = tl.load(w_scale + n, mask=columns, other=0.0)
    shift = scale * 0.0
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=columns, other=0.0)
    y = to_real(acc, tl.load(x_scale + m, mask=rows, other=0.0), scale, shift)
    to = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, y, mask=rows[:, None] & columns[None, :])
