"""Convolutions of channels-last integers, as matrix products or channel by channel."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.epilogue import correct, numbers_of
from autoquant.kernels.gpu.device.handing import finish
from autoquant.kernels.gpu.device.matmul import tile_of

# Triton compiles a kernel anew for every argument that becomes 1 or a multiple of 16. For these
# that gains nothing, and a network has many shapes.
SHAPE = ["M", "height", "width", "out_height", "out_width"]
SHAPE += ["stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"]
DENSE = ["N", "w_width", "channels", "depth", "taps_x", "K"]
IMAGE = ["groups", "N", "depth", "K", "out_sample", "out_channel", "out_pixel"]
IMAGE += ["x_sample", "x_channel", "x_row", "x_column", "taps_x"]


@triton.jit
def place_of(m, out_height, out_width):
    """Return (sample, row, column) of output pixel ``m``."""
    area = out_height * out_width
    return m // area, m % area // out_width, m % out_width


@triton.jit(do_not_specialize=SHAPE + DENSE)
def int8_convolution(
    q,  # int8 [samples, height, width, channels], contiguous
    w,  # int8 [groups · N, w_width] of (row, column, channel); [taps, N] where WINDOW is 3
    out,  # int8 where HANDS, else float32; channels last where LAST, else first; contiguous
    bias,  # float32 [groups · N]
    static,  # float32 [4] of q: scale, zero point, qmin, qmax
    x_scale,  # float32 [samples] where those have numbers of their OWN, as the next
    x_zero,  # float32 [samples]
    w_scale,  # float32 [groups · N]
    w_zero,  # int32 [groups · N]
    w_sum,  # int32 [groups · N]
    to_static,  # float32 [4] of out, where HANDS
    flag,  # int32 [1]: becomes 1 where out is in doubt
    other,  # float32, lies as out: where ADDS it is added, before what is after
    statics,  # a tuple of float32 [4]
    integers,  # as many, int8 channels last: what each makes of out
    low,  # least and largest output, where AFTER is 1
    high,
    M,  # output pixels of all samples
    N,  # output channels of a group
    w_width,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    channels,
    depth,  # channels of a group, what fills up a pixel included
    taps_x,
    K,  # taps, times depth where WINDOW is not 3
    OWN: tl.constexpr,
    ALIGNED: tl.constexpr,  # at most 16; divides channels, and depth where WINDOW is not 3
    ALIGNED_N: tl.constexpr,  # at most 16; divides N
    WINDOW: tl.constexpr,  # 0: one pixel; 1: BLOCK_K divides depth; 2: any; 3: of one channel alone
    PADDED: tl.constexpr,  # whether windows reach beyond q; not where those have their OWN numbers
    LAST: tl.constexpr,
    ALIGNED_AREA: tl.constexpr,  # at most 4; divides the output pixels of a sample
    HAS_BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    AFTER: tl.constexpr,  # see ``activated``
    HANDS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr = 1,
    GROUP_M: tl.constexpr = 1,
    MULTIPLIER: tl.constexpr = 1,  # output channels of one input channel, where WINDOW is 3
    TAPS_Y: tl.constexpr = 1,  # so many taps there
    TAPS_X: tl.constexpr = 1,
):
    """Compute BLOCK_M pixels × BLOCK_N channels of one group a program.

    That is a matrix product, or where WINDOW is 3 each channel from one of the input: all are one
    group then. The window of a pixel is a row of K integers at fixed distances from its first one.
    What lies beside the image is the integer zero point: the real number 0. Where channels only
    fill a pixel up, their weights are 0, and they are 0 themselves or W_ZERO is not set.
    """
    # Says nothing new, but the compiler sees that 16 neighbours are one load, or one store.
    channels = channels // ALIGNED * ALIGNED
    N = N // ALIGNED_N * ALIGNED_N
    M = M // ALIGNED_AREA * ALIGNED_AREA
    area = out_height * out_width // ALIGNED_AREA * ALIGNED_AREA
    if WINDOW == 3:
        group, outputs = 0, N
        tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    else:
        depth = depth // ALIGNED * ALIGNED
        K = K // ALIGNED * ALIGNED
        w_width = w_width // 16 * 16
        group, outputs = tl.program_id(1), N * tl.num_programs(1)
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m < M, n < N
    channel = group * N + n
    sample, out_y, out_x = place_of(m % M, out_height, out_width)
    y0, x0 = out_y * stride_y - pad_y, out_x * stride_x - pad_x
    first_pixel = ((sample * height + y0).to(tl.int64) * width + x0) * channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if WINDOW == 3:
        scale, zero = numbers_of(static, x_scale, x_zero, sample, OWN)
        window = q + first_pixel[:, None] + (n // MULTIPLIER)[None, :]
        w_shift = tl.load(w_zero + n, mask=columns, other=0)
        for tap in range(TAPS_Y * TAPS_X):
            dy, dx = tap // TAPS_X * dilation_y, tap % TAPS_X * dilation_x
            at = window + (dy * width + dx) * channels
            if PADDED:
                row, column = y0 + dy, x0 + dx
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                x = tl.load(at, mask=inside[:, None] & columns[None, :], other=0).to(tl.int32)
            else:
                x = tl.load(at, mask=columns[None, :], other=0).to(tl.int32)
            if X_ZERO:
                x -= zero[:, None]
            if PADDED:
                x = tl.where(inside[:, None], x, 0)
            b = tl.load(w + tap * N + n, mask=columns, other=0).to(tl.int32) - w_shift
            acc += x * b[None, :]
    else:
        window = q + first_pixel + group * depth
        weights = w + (group * N + n % N).to(tl.int64) * w_width
        beside = tl.load(static + 1).to(tl.int8)
        step = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + step
            if WINDOW == 0:
                x = tl.load(window[:, None] + k[None, :], mask=(k < K)[None, :], other=0)
            elif WINDOW == 1:
                tap = first // depth
                dy, dx = tap // taps_x * dilation_y, tap % taps_x * dilation_x
                offset = (dy * width + dx) * channels + (first - tap * depth) + step
                at = window[:, None] + offset[None, :]
                if PADDED:
                    row, column = y0 + dy, x0 + dx
                    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                    x = tl.load(at, mask=inside[:, None], other=0)
                    x = tl.where(inside[:, None], x, beside)
                else:
                    x = tl.load(at)
            else:
                tap = k // depth
                dy, dx = tap // taps_x * dilation_y, tap % taps_x * dilation_x
                offset = (dy * width + dx) * channels + k % depth
                at = window[:, None] + offset[None, :]
                if PADDED:
                    row, column = y0[:, None] + dy[None, :], x0[:, None] + dx[None, :]
                    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                    x = tl.load(at, mask=inside & (k < K)[None, :], other=0)
                    x = tl.where(inside | (k >= K)[None, :], x, beside)
                else:
                    x = tl.load(at, mask=(k < K)[None, :], other=0)
            b = tl.load(weights[None, :] + k[:, None], mask=(k < K)[:, None], other=0)
            acc = tl.dot(x, b, acc, out_dtype=tl.int32)
            if W_ZERO:
                total += tl.sum(x.to(tl.int32), axis=1)
        scale, zero = numbers_of(static, x_scale, x_zero, sample, OWN)
        acc = correct(acc, total, zero, w_zero, w_sum, channel, columns, X_ZERO, W_ZERO)
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
        channel,
        outputs,
        area,
        HAS_BIAS,
        AFTER,
        HANDS,
        ADDS,
        LAST,
    )


@triton.jit(do_not_specialize=SHAPE + IMAGE)
def spread_nan(
    x,  # float32 [samples, channels, height, width], any strides, without padding
    flag,  # int32 [1]: 0 where x holds no NaN, and nothing is to be done
    out,  # float32, channels first or last, contiguous
    M,
    N,  # output channels of a group
    groups,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    x_sample,
    x_channel,
    x_row,
    x_column,
    out_sample,
    out_channel,
    out_pixel,
    depth,
    taps_x,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Make NaN every output whose window holds a NaN, which an integer cannot be.

    A few programs go through all tiles, so that it costs nothing where there is no NaN.
    """
    if tl.load(flag) != 0:
        tiles = tl.cdiv(M, BLOCK_M)
        for tile in range(tl.program_id(0), tiles * groups, tl.num_programs(0)):
            group = tile // tiles
            m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            sample, out_y, out_x = place_of(m % M, out_height, out_width)
            bad = tl.zeros((BLOCK_M,), tl.int32)
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                tap = k // depth
                row = (out_y * stride_y - pad_y)[:, None] + (tap // taps_x * dilation_y)[None, :]
                column = (out_x * stride_x - pad_x)[:, None]
                column += (tap % taps_x * dilation_x)[None, :]
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                at = x + (sample.to(tl.int64) * x_sample)[:, None]
                at += ((group * depth + k % depth).to(tl.int64) * x_channel)[None, :]
                at += row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
                block = tl.load(at, mask=inside & (k < K)[None, :], other=0.0)
                bad = tl.maximum(bad, tl.max((block != block).to(tl.int32), axis=1))
            to = out + sample.to(tl.int64) * out_sample
            to += (out_y * out_width + out_x).to(tl.int64) * out_pixel
            nan = tl.zeros((BLOCK_M,), tl.float32) + float("nan")
            for n in range(N):
                at_n = (group * N + n).to(tl.int64) * out_channel
                tl.store(to + at_n, nan, mask=(bad > 0) & (m < M))
