"""Convolutions of channels-last integers whose padding is already in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.epilogue import correct, to_real
from autoquant.kernels.gpu.device.matmul import tile_of

# Triton compiles a kernel anew for every argument that becomes 1 or a multiple of 16. For these
# that gains nothing, and a network has many shapes.
SHAPE = ["M", "height", "width", "out_height", "out_width", "out_sample"]
SHAPE += ["stride_y", "stride_x", "dilation_y", "dilation_x"]
IMAGE = ["groups", "N", "depth", "K", "pad_y", "pad_x", "out_channel", "out_pixel"]
IMAGE += ["x_sample", "x_channel", "x_row", "x_column", "taps_x"]


@triton.jit
def place_of(m, out_height, out_width):
    """Return (sample, row, column) of output pixel ``m``."""
    area = out_height * out_width
    return m // area, m % area // out_width, m % out_width


@triton.jit
def store(out, y, at_m, at_n, rows, columns, LAST: tl.constexpr):
    """Store ``y`` [M, N] at ``at_m`` [M] + ``at_n`` [N], neighbouring threads side by side.

    Threads go along the last axis of a block, so it has to be the one that is dense in memory.
    """
    if LAST:
        mask = rows[:, None] & columns[None, :]
        tl.store(out + at_m[:, None] + at_n[None, :], y, mask=mask)
    else:
        mask = columns[:, None] & rows[None, :]
        tl.store(out + at_n[:, None] + at_m[None, :], tl.trans(y), mask=mask)


@triton.jit(do_not_specialize=[*SHAPE, "N", "K"])
def int8_convolution(
    q,  # int8 [samples, height, width, channels], contiguous, padding included
    w,  # int8 [groups · N, w_width], contiguous; columns are (row, column, channel)
    out,  # float32, channels first or last, contiguous
    bias,  # float32 [groups · N]
    x_scale,  # float32 [1], or [samples] where PER_SAMPLE
    x_zero,  # float32, likewise
    w_scale,  # float32 [groups · N]
    w_zero,  # int32 [groups · N]
    w_sum,  # int32 [groups · N]
    M,  # output pixels of all samples
    N,  # output channels of a group
    w_width,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    out_sample,
    out_channel,
    out_pixel,
    channels,
    depth,  # channels of a group
    taps_x,
    K,  # taps · depth
    ALIGNED: tl.constexpr,  # at most 16; divides channels and depth
    PER_SAMPLE: tl.constexpr,
    LAST: tl.constexpr,  # whether out is channels-last
    HAS_BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute BLOCK_M pixels × BLOCK_N channels of one group a program, as a matrix product.

    The window of a pixel is a row of K integers at fixed distances from its first one, so an
    address is the sum of one number a pixel and one number a column.
    """
    # Says nothing new, but the compiler sees that 16 neighbours are one load.
    channels = channels // ALIGNED * ALIGNED
    depth = depth // ALIGNED * ALIGNED
    K = K // ALIGNED * ALIGNED
    group = tl.program_id(1)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m < M, n < N
    sample, out_y, out_x = place_of(m % M, out_height, out_width)
    first_row = (sample * height + out_y * stride_y).to(tl.int64)
    window = q + (first_row * width + out_x * stride_x) * channels + group * depth
    channel_n = group * N + n % N
    weights = w + channel_n.to(tl.int64) * w_width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        tap = k // depth
        offset = (tap // taps_x * dilation_y * width + tap % taps_x * dilation_x) * channels
        offset += k % depth
        x = tl.load(window[:, None] + offset[None, :], mask=(k < K)[None, :], other=0)
        b = tl.load(weights[None, :] + k[:, None], mask=(k < K)[:, None], other=0)
        acc = tl.dot(x, b, acc, out_dtype=tl.int32)
        if W_ZERO:
            total += tl.sum(x.to(tl.int32), axis=1)
    zero = tl.load(x_zero + sample * PER_SAMPLE).to(tl.int32)
    acc = correct(
        acc,
        total,
        zero,
        tl.load(w_zero + channel_n),
        tl.load(w_sum + channel_n),
        X_ZERO,
        W_ZERO,
    )
    scale = tl.load(w_scale + channel_n)
    shift = scale * 0.0
    if HAS_BIAS:
        shift = tl.load(bias + channel_n)
    y = to_real(acc, tl.load(x_scale + sample * PER_SAMPLE), scale, shift)
    at_m = sample.to(tl.int64) * out_sample + (out_y * out_width + out_x).to(tl.int64) * out_pixel
    store(out, y, at_m, channel_n.to(tl.int64) * out_channel, rows, columns, LAST)


@triton.jit(do_not_specialize=SHAPE)
def depthwise_convolution(
    q,  # int8 [samples, height, width, channels], contiguous, padding included
    w,  # int8 [taps, N], contiguous
    out,  # float32, channels first or last, contiguous
    bias,  # float32 [N]
    x_scale,  # float32 [1], or [samples] where PER_SAMPLE
    x_zero,  # float32, likewise
    w_scale,  # float32 [N]
    w_zero,  # int32 [N]
    M,
    N,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    out_sample,
    out_channel,
    out_pixel,
    channels,
    MULTIPLIER: tl.constexpr,  # output channels of one input channel
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    LAST: tl.constexpr,  # whether out is channels-last
    HAS_BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M pixels × BLOCK_N channels a program, each from one input channel."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m < M, n < N
    mask = rows[:, None] & columns[None, :]
    sample, out_y, out_x = place_of(m % M, out_height, out_width)
    first_row = (sample * height + out_y * stride_y).to(tl.int64)
    window = q + (first_row * width + out_x * stride_x) * channels
    window = window[:, None] + (n // MULTIPLIER)[None, :]
    zero = tl.load(x_zero + sample * PER_SAMPLE).to(tl.int32)
    w_shift = tl.load(w_zero + n, mask=columns, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(TAPS_Y * TAPS_X):
        offset = (tap // TAPS_X * dilation_y * width + tap % TAPS_X * dilation_x) * channels
        x = tl.load(window + offset, mask=mask, other=0).to(tl.int32)
        if X_ZERO:
            x -= zero[:, None]
        b = tl.load(w + tap * N + n, mask=columns, other=0).to(tl.int32) - w_shift
        acc += x * b[None, :]
    scale = tl.load(w_scale + n, mask=columns, other=0.0)
    shift = scale * 0.0
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=columns, other=0.0)
    y = to_real(acc, tl.load(x_scale + sample * PER_SAMPLE), scale, shift)
    at_m = sample.to(tl.int64) * out_sample + (out_y * out_width + out_x).to(tl.int64) * out_pixel
    store(out, y, at_m, n.to(tl.int64) * out_channel, rows, columns, LAST)


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
