"""What the library of ``native.c`` computes, on tensors, and what stands in where it is missing.

Without it the same numbers come from several eager passes: slower, never different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant.kernels.cpu.library import call, is_dense, library
from autoquant.kernels.cpu.signatures import PART, SPAN
from autoquant.quant.activation import fake_quantize_activation, token_qparams
from autoquant.quant.affine import QParams
from autoquant.quant.affine import quantize as quantize_eagerly
from autoquant.quant.rotation import Rotation
from autoquant.quant.transforms import InputTransform
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

OFFSET = 128
"""What is added to an integer to store it as an unsigned byte, as oneDNN's kernels take it."""

LEAST_BLOCK = 16
"""Numbers that are rotated together by the library, at least: WIDTH in ``native.c``."""


def dense(x: Tensor) -> Tensor:
    """Return ``x``, copied only where its numbers do not lie without gaps, sample after sample."""
    return x if is_dense(x) else x.contiguous()


def fake_quantize(x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
    """Return ``x`` quantized and dequantized, in its own dtype; NaN stays NaN.

    A layer of ``kind`` multiplies it. In one pass where ``x`` is float32 on a CPU.
    """
    if library() is None or not _is_float32(x) or not x.numel() or not _fits(scheme):
        return fake_quantize_activation(x, scheme, kind)
    x = dense(x)
    y = torch.empty_like(x)
    if scheme.scale is not None:
        call("fake_quantize", x, y, x.numel(), scheme.scale, *bounds(scheme))
        return y
    if not _rows_are_dense(x, kind):
        return fake_quantize_activation(x, scheme, kind)
    bad = call("fake_quantize_rows", x, y, *_rows(x, kind), scheme.bits, scheme.symmetric)
    return fake_quantize_activation(x, scheme, kind) if bad else y


def quantize(
    x: Tensor, scheme: ActivationScheme, transform: InputTransform | None = None
) -> Tensor | None:
    """Return the integers of float32 ``x``, plus OFFSET, as uint8; None where it holds NaN.

    The scheme is static. A ``transform`` comes first, in the same pass.
    """
    assert scheme.scale is not None
    if transform is not None:
        found = _quantize_transformed(x, scheme, transform)
        return quantize(transform.of_input(x), scheme) if found is None else found[0]
    if library() is None or not _fits(scheme):
        if x.isnan().any():
            return None
        scale = torch.tensor(scheme.scale, dtype=torch.float32, device=x.device)
        zero_point = torch.tensor(scheme.zero_point or 0, dtype=torch.float32, device=x.device)
        return _stored(quantize_eagerly(x, QParams(scale, zero_point, scheme.bits)))
    x = dense(x)
    q = torch.empty_like(x, dtype=torch.uint8)
    bad = call("quantize", x, q, x.numel(), scheme.scale, *bounds(scheme), scheme.zero_point or 0)
    return None if bad else q


def _quantize_transformed(
    x: Tensor, scheme: ActivationScheme, transform: InputTransform
) -> tuple[Tensor | None] | None:
    """Return what ``quantize`` does, in one pass; None where it takes several."""
    if library() is None or not _fits(scheme) or not x.numel():
        return None
    assert scheme.scale is not None
    ends = (*bounds(scheme), scheme.zero_point or 0)
    if isinstance(transform, Rotation):
        if transform.block < LEAST_BLOCK:
            return None
        x = x.contiguous()
        q = torch.empty_like(x, dtype=torch.uint8)
        blocks = x.numel() // transform.block
        bad = call(
            "quantize_rotated", x, q, blocks, transform.block, transform.norm, scheme.scale, *ends
        )
        return (None if bad else q,)
    # Factors are powers of two: to divide by both at once rounds no other way.
    scales = transform.factors * scheme.scale
    if not 2.0**-126 <= float(scales.min()) <= float(scales.max()) < 2.0**127:
        return None
    channels, inner = transform.layout.channels, 1
    axis = transform.layout.activation_axis
    if not x.movedim(axis, -1).is_contiguous():
        x, inner = x.contiguous(), math.prod(x.shape[axis:][1:])
    q = torch.empty_like(x, dtype=torch.uint8)
    lying = (t if inner > 1 else t.movedim(axis, -1) for t in (x, q))
    outer = x.numel() // (channels * inner)
    bad = call("quantize_smoothed", *lying, scales, outer, channels, inner, *ends)
    return (None if bad else q,)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return H·x, up to the rounding of sums: float32 [..., channels] on a CPU, in one pass."""
    if library() is None or rotation.block < LEAST_BLOCK or not x.numel():
        return rotation.of_input(x)
    x = x.contiguous()
    y = torch.empty_like(x)
    call("rotate", x, y, x.numel() // rotation.block, rotation.block, rotation.norm)
    return y


def limit_bytes(y: Tensor, limit: Tensor, axis: int) -> None:
    """Make bytes ``y`` no larger than ``limit`` [channels], in place; channels are on ``axis``."""
    last = y.movedim(axis, -1)
    if library() is None or not last.is_contiguous():
        torch.minimum(last, limit, out=last)
        return
    call("limit_bytes", last, limit, last.numel() // len(limit), len(limit))


def quantize_rows(
    x: Tensor, scheme: ActivationScheme, kind: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (integers plus OFFSET, scale [tokens], zero_point [tokens]); None on NaN.

    Each token of ``x``, float32, has a scale of its own, from its own range.
    """
    x = dense(x) if kind.startswith("conv") else x.contiguous()
    if library() is None:
        if x.isnan().any():
            return None
        p = token_qparams(x, scheme, kind)
        return _stored(quantize_eagerly(x, p)), p.scale.flatten(), p.zero_point.flatten()
    rows, columns = _rows(x, kind)
    q = torch.empty_like(x, dtype=torch.uint8)
    scale, zero_point = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    bad = call(
        "quantize_rows", x, q, scale, zero_point, rows, columns, scheme.bits, scheme.symmetric
    )
    return None if bad else (q, scale, zero_point)


def finish_rows(y: Tensor, scale: Tensor, zero_point: Tensor, sums: Tensor, bias: Tensor) -> None:
    """Turn products into outputs, in place: (y − zero_point · sums) · scale + bias.

    ``y`` is [tokens, channels], contiguous; scale and zero point [tokens]; the others [channels].
    """
    if library() is None:
        y.sub_(zero_point[:, None] * sums).mul_(scale[:, None]).add_(bias)
        return
    call("finish_rows", y, scale, zero_point, sums, bias, *y.shape)


def histogram(x: Tensor, inverse_width: float, counts: Tensor) -> tuple[float, float, int] | None:
    """Count finite float32 numbers ``x`` [n], in place; return Σ y, Σ y² and how many are 0.

    ``counts`` [bins] is int64, half of the bins are below 0, and y is x in units of a bin's width;
    all lie within the bins. None, with nothing counted, where the library is missing.
    """
    if library() is None or not _is_float32(x):
        return None
    x = x.contiguous()
    sums = torch.empty(-(-x.numel() // PART), 2, dtype=torch.float64)
    zeros = torch.zeros(1, dtype=torch.int64)
    found = counts.clone()
    failed = call("histogram", x, x.numel(), inverse_width, len(counts) // 2, found, sums, zeros)
    if failed:  # no memory, or a number outside of the bins
        return None
    counts.copy_(found)
    total, square = sums.sum(0).tolist()
    return total, square, int(zeros)


def squared_errors(blocks: Tensor, p: QParams) -> Tensor | None:
    """Return Σ (x − Q(x))², float64 [tried, n], of float32 ``blocks`` [n, k] on a CPU.

    ``p`` holds [tried, n]: parameters to try on each block. The least of a block's errors is exact,
    others may be cut short as soon as they are beyond it. None where the library is missing.
    """
    if library() is None or not _is_float32(blocks):
        return None
    blocks, scale, zero_point = (t.contiguous() for t in (blocks, p.scale, p.zero_point))
    (n, k), tried = blocks.shape, len(scale)
    errors = torch.empty(tried, n, -(-k // SPAN), dtype=torch.float64)
    call("squared_errors", blocks, scale, zero_point, errors, n, k, tried, p.bits)
    return errors.sum(2)


def change_products(x: Tensor, g: Tensor, schemes: Sequence[ActivationScheme]) -> Tensor | None:
    """Return Σ (Q(x) − x)·g over all but the first axis, float64 [len(x), schemes], in one pass.

    ``x`` and ``g`` have the same shape. None where a scheme is dynamic, the numbers are not float32
    on a CPU, or the library is missing.
    """
    if library() is None or not (_is_float32(x) and _is_float32(g)) or not x.numel():
        return None
    if any(s.scale is None or not _fits(s) for s in schemes):
        return None
    x = dense(x)
    g = g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)
    ends = torch.tensor([bounds(s) for s in schemes], dtype=torch.float32).T.contiguous()
    scales = torch.tensor([s.scale for s in schemes], dtype=torch.float32)
    found = torch.empty(len(x), len(schemes), dtype=torch.float64)
    rows, columns = len(x), x.numel() // len(x)
    call("change_products", x, g, scales, *ends, found, rows, columns, len(schemes))
    return found


def round_weights(x: Tensor, weights: Tensor, p: QParams) -> tuple[Tensor, Tensor] | None:
    """Return what rounding changes of a matrix, and the weighted sums of its squares.

    ``x`` is [rows, parts, columns], float32 on a CPU, ``weights`` [groups, parts, columns], for as
    many rows each; ``p`` holds [tried, rows · parts], or [tried, 1]. Changes are [tried, rows,
    parts, columns], sums [tried, rows, parts]. None where the library is missing.
    """
    if library() is None or x.device.type != "cpu":
        return None
    x, weights, scale, zero_point = (
        t.float().contiguous() for t in (x, weights, p.scale, p.zero_point)
    )
    rows, parts, columns = x.shape
    delta = torch.empty(len(scale), *x.shape, dtype=torch.float32)
    sums = torch.empty(delta.shape[:3], dtype=torch.float32)
    shared = scale.shape[1] != rows * parts
    call(
        "round_weights", x, weights, scale, zero_point, delta, sums,
        rows, parts, columns, len(weights), len(scale), p.bits, shared,
    )  # fmt: skip
    return delta, sums


def bounds(scheme: ActivationScheme) -> tuple[int, int]:
    """Return the least and largest integer of a static scheme, less its zero point."""
    grid, zero_point = FORMATS[scheme.bits], scheme.zero_point or 0
    return grid.qmin - zero_point, grid.qmax - zero_point


def _rows(x: Tensor, kind: str) -> tuple[int, int]:
    """Return (tokens, numbers in each); see quant.activation.token_dims."""
    if not kind.startswith("conv"):
        return math.prod(x.shape[:-1]), math.prod(x.shape[-1:])
    return (x.shape[0], math.prod(x.shape[1:])) if x.dim() > 2 else (1, x.numel())


def _is_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _fits(scheme: ActivationScheme) -> bool:
    """Return whether a scheme's scale is a number of float32 that can divide."""
    return scheme.scale is None or 2.0**-149 <= scheme.scale < 2.0**128


def _rows_are_dense(x: Tensor, kind: str) -> bool:
    """Return whether each token is one span of memory: a vector of channels-last data is not."""
    return kind.startswith("conv") or x.is_contiguous()


def _stored(q: Tensor) -> Tensor:
    return (q.to(torch.int16) + OFFSET).to(torch.uint8)
