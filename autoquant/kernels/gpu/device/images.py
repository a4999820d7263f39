"""Quantizing images: the activation of a convolution, into channels-last integers with padding."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.affine import choose_qparams, quantize

# As in ``convolution``: one compiled kernel for many shapes.
SHAPE = ["samples", "channels", "height", "width", "padded_height", "padded_width"]
SHAPE += ["pad_y", "pad_x", "x_sample"]


@triton.jit(do_not_specialize=["samples"])
def sample_qparams(
    lows,  # float32 [samples]: smallest number of a sample, NaN where it holds one
    highs,  # float32 [samples]
    static,  # float32 [4]: two unused numbers, qmin, qmax
    scales,  # float32 [samples]
    zeros,  # float32 [samples]
    samples,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose scale and zero point of every sample from its range.

    As in the reference, a sample with a NaN has scale 1 where the scheme is symmetric, and is NaN
    altogether where it is not.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < samples
    lo = tl.load(lows + at, mask=mask, other=0.0)
    hi = tl.load(highs + at, mask=mask, other=0.0)
    qmin, qmax = tl.load(static + 2), tl.load(static + 3)
    bad = (lo != lo) | (hi != hi)
    scale, zero = choose_qparams(
        tl.where(bad, 0.0, lo), tl.where(bad, 0.0, hi), qmin, qmax, SYMMETRIC
    )
    if not SYMMETRIC:
        scale = tl.where(bad, float("nan"), scale)
    tl.store(scales + at, scale, mask=mask)
    tl.store(zeros + at, zero, mask=mask)


@triton.jit(do_not_specialize=SHAPE[1:])
def quantize_images(
    x,  # float32 [samples, channels, height, width], any strides
    static,  # float32 [4]: two numbers unused here, qmin, qmax
    scales,  # float32 [1], or [samples] where PER_SAMPLE
    zeros,  # float32, likewise
    q,  # int8 [samples, padded_height, padded_width, stored], contiguous
    flag,  # int32 [1]: becomes 1 where x holds a NaN
    channels,
    height,
    width,
    padded_height,
    padded_width,
    pad_y,
    pad_x,
    x_sample,
    x_channel,
    x_row,
    x_column,
    stored,  # channels of a pixel of q
    PER_SAMPLE: tl.constexpr,
    LAST: tl.constexpr,  # whether x is channels-last
    FOLD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Quantize BLOCK_P pixels × BLOCK_C channels a program, the padding among them.

    The real number 0 is the integer zero, so the padding holds the zero point; FOLD stores
    q − zero, where every zero is 0. Channels that only fill up to ``stored`` hold 0.
    """
    pixels = padded_height * padded_width
    tiles = tl.cdiv(pixels, BLOCK_P)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scales + sample * PER_SAMPLE)
    zero = tl.load(zeros + sample * PER_SAMPLE)
    row, column = pixel // padded_width - pad_y, pixel % padded_width - pad_x
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (pixel < pixels)
    real = channel < channels
    at_pixel = sample * x_sample + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
    at_channel = channel.to(tl.int64) * x_channel
    # Threads go along the last axis of a block: it has to be the one that is dense in memory.
    if LAST:
        at, inside = at_pixel[:, None] + at_channel[None, :], inside[:, None] & real[None, :]
    else:
        at, inside = at_channel[:, None] + at_pixel[None, :], real[:, None] & inside[None, :]
    block = tl.load(x + at, mask=inside, other=0.0)
    if tl.max(tl.max((block != block).to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flag, 1)
    y = quantize(block, scale, zero, tl.load(static + 2), tl.load(static + 3))
    if not LAST:
        y = tl.trans(y)
    if not FOLD:
        y = tl.where(real[None, :], y + zero, 0.0)
    to = q + (sample * pixels + pixel)[:, None] * stored + channel[None, :]
    tl.store(to, y.to(tl.int8), mask=(pixel < pixels)[:, None] & (channel < stored)[None, :])
