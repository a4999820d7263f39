"""Products of float activations with packed weights, unpacked in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_field(packed, SPAN_NUMBER: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Return the WIDTH bits of span SPAN_NUMBER of a field that starts at ``packed``, int32."""
    LANES: tl.constexpr = 8 // WIDTH
    field = tl.load(packed + SPAN_NUMBER // LANES * SPAN).to(tl.int32)
    return (field >> (SPAN_NUMBER % LANES * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def unpack_span(packed, SPAN_NUMBER: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr):
    """Return the integers, float32, of one span of the chunks that ``packed`` points at."""
    if BITS == 8:
        q = unpack_field(packed, SPAN_NUMBER, 8, SPAN)
    elif BITS >= 4:
        q = unpack_field(packed, SPAN_NUMBER, 4, SPAN)
        if BITS >= 6:
            q |= unpack_field(packed + 4 * SPAN, SPAN_NUMBER, 2, SPAN) << 4
            if BITS == 7:
                q |= unpack_field(packed + 6 * SPAN, SPAN_NUMBER, 1, SPAN) << 6
        elif BITS == 5:
            q |= unpack_field(packed + 4 * SPAN, SPAN_NUMBER, 1, SPAN) << 4
    else:
        q = unpack_field(packed, SPAN_NUMBER, 2, SPAN)
        if BITS == 3:
            q |= unpack_field(packed + 2 * SPAN, SPAN_NUMBER, 1, SPAN) << 2
    return (q - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def group_of(chunk, groups, SPAN_NUMBER: tl.constexpr, GROUP_SPANS: tl.constexpr):
    """Return the group of a span; spans of one group load one scale if the compiler sees it.

    What fills up the last chunk has no scale of its own: the last one will do.
    """
    if GROUP_SPANS == 0:
        group = 0
    elif 8 % GROUP_SPANS == 0:
        group = min(chunk * (8 // GROUP_SPANS) + SPAN_NUMBER // GROUP_SPANS, groups - 1)
    else:
        group = min((chunk * 8 + SPAN_NUMBER) // GROUP_SPANS, groups - 1)
    return group


@triton.jit(do_not_specialize=["M", "chunks", "groups"])
def packed_vector(
    x,  # float [M, K], contiguous
    packed,  # uint8 [N, chunks, BITS · SPAN], contiguous
    scales,  # float32 [N, groups], contiguous
    zeros,  # float32 [N, groups], contiguous
    bias,  # like x, [N]
    out,  # like x, [M, N], contiguous
    M,
    N,
    K,
    chunks,
    groups,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_SPANS: tl.constexpr,  # spans that share a scale; 0 where a channel has one
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_N outputs of one row a program: for few rows, where memory is the limit."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, SPAN)
    row = (n % N).to(tl.int64)
    at = packed + (row * chunks * (BITS * SPAN))[:, None] + lane[None, :]
    acc = tl.zeros((BLOCK_N, SPAN), tl.float32)
    for chunk in range(chunks):
        for span in tl.static_range(8):
            k = (chunk * 8 + span) * SPAN + lane
            own = row * groups + group_of(chunk, groups, span, GROUP_SPANS)
            scale, zero = tl.load(scales + own)[:, None], tl.load(zeros + own)[:, None]
            w = (unpack_span(at, span, BITS, SPAN) - zero) * scale
            v = tl.load(x + m * K + k, mask=k < K, other=0.0)
            acc += v.to(tl.float32)[None, :] * w.to(x.dtype.element_ty).to(tl.float32)
        at += BITS * SPAN
    y = tl.sum(acc, axis=1)
    mask = n < N
    if HAS_BIAS:
        y += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "chunks", "groups"])
def packed_matmul(
    x,  # float [M, K], contiguous
    packed,  # uint8 [N, chunks, BITS · SPAN], contiguous
    scales,  # float32 [N, groups], contiguous
    zeros,  # float32 [N, groups], contiguous
    bias,  # like x, [N]
    out,  # like x, [M, N], contiguous
    M,
    N,
    K,
    chunks,
    groups,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M × BLOCK_N outputs a program, by tensor cores where x has 16 bits."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, SPAN)
    row = (n % N).to(tl.int64)
    at = packed + (row * chunks * (BITS * SPAN))[None, :] + lane[:, None]
    x_at = x + (m % M).to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(chunks):
        for span in tl.static_range(8):
            k = (chunk * 8 + span) * SPAN + lane
            own = row * groups + group_of(chunk, groups, span, GROUP_SPANS)
            scale, zero = tl.load(scales + own)[None, :], tl.load(zeros + own)[None, :]
            w = (unpack_span(at, span, BITS, SPAN) - zero) * scale
            v = tl.load(x_at + k[None, :], mask=(k < K)[None, :], other=0.0)
            # TF32 would keep 10 bits of a float32.
            acc = tl.dot(v, w.to(x.dtype.element_ty), acc, input_precision="ieee")
        at += BITS * SPAN
    rows, columns = m < M, n < N
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)[None, :]
    to = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=rows[:, None] & columns[None, :])
