"""The library of ``native.c``: loading it, and what to do where it is missing.

It is built when the package is installed, wherever there is a C compiler. Without it the same
numbers come from several eager passes: slower, never different.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoquant.quant.activation import fake_quantize_activation, token_qparams
from autoquant.quant.affine import QParams
from autoquant.quant.affine import quantize as quantize_eagerly
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

OFFSET = 128
"""What is added to an integer to store it as an unsigned byte, as oneDNN's kernels take it."""

_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "quantize": (_POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, _FLOAT, _INT),
    "fake_quantize": (_POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, _FLOAT),
    "quantize_rows": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _INT, _INT),
    "fake_quantize_rows": (_POINTER, _POINTER, _SIZE, _SIZE, _INT, _INT),
    "squared_errors": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT),
    "change_products": (*[_POINTER] * 6, _SIZE, _SIZE, _SIZE),
    "round_weights": (*[_POINTER] * 6, *[_SIZE] * 5, _INT, _INT),
    "histogram": (_POINTER, _SIZE, _FLOAT, _INT, _POINTER, _POINTER, _POINTER),
    "gru_gates": (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE),
    "lstm_gates": (*[_POINTER] * 5, _SIZE, _SIZE, _SIZE),
    "finish_rows": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, None where it was not built or can't be loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                loaded = ctypes.CDLL(str(path))
                for name, signature in _SIGNATURES.items():
                    getattr(loaded, name).argtypes = signature
            except (OSError, AttributeError):  # built for another machine, or from older source
                continue
            return loaded
    return None


def dense(x: Tensor) -> Tensor:
    """Return ``x``, copied only where its numbers do not lie without gaps, sample after sample."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def fake_quantize(x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
    """Return ``x`` quantized and dequantized, in its own dtype; NaN stays NaN.

    A layer of ``kind`` multiplies it. In one pass where ``x`` is float32 on a CPU.
    """
    native = library()
    if native is None or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return fake_quantize_activation(x, scheme, kind)
    x = dense(x)
    y = torch.empty_like(x)
    if scheme.scale is not None:
        lo, hi = bounds(scheme)
        native.fake_quantize(x.data_ptr(), y.data_ptr(), x.numel(), scheme.scale, lo, hi)
        return y
    if not _rows_are_dense(x, kind):
        return fake_quantize_activation(x, scheme, kind)
    rows, columns = _rows(x, kind)
    bad = native.fake_quantize_rows(
        x.data_ptr(), y.data_ptr(), rows, columns, scheme.bits, scheme.symmetric
    )
    return fake_quantize_activation(x, scheme, kind) if bad else y


def quantize(x: Tensor, scheme: ActivationScheme) -> Tensor | None:
    """Return the integers of float32 ``x``, plus OFFSET, as uint8; None where it holds NaN.

    The scheme is static.
    """
    assert scheme.scale is not None
    native = library()
    if native is None:
        if x.isnan().any():
            return None
        scale = torch.tensor(scheme.scale)
        zero_point = torch.tensor(float(scheme.zero_point or 0))
        return _stored(quantize_eagerly(x, QParams(scale, zero_point, scheme.bits)))
    x = dense(x)
    q = torch.empty_like(x, dtype=torch.uint8)
    lo, hi = bounds(scheme)
    bad = native.quantize(
        x.data_ptr(), q.data_ptr(), x.numel(), scheme.scale, lo, hi, scheme.zero_point or 0
    )
    return None if bad else q


def quantize_rows(
    x: Tensor, scheme: ActivationScheme, kind: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (integers plus OFFSET, scale [tokens], zero_point [tokens]); None on NaN.

    Each token of ``x``, float32, has a scale of its own, from its own range.
    """
    native = library()
    x = dense(x) if kind.startswith("conv") else x.contiguous()
    rows, columns = _rows(x, kind)
    if native is None:
        if x.isnan().any():
            return None
        p = token_qparams(x, scheme, kind)
        return _stored(quantize_eagerly(x, p)), p.scale.flatten(), p.zero_point.flatten()
    q = torch.empty_like(x, dtype=torch.uint8)
    scale, zero_point = torch.empty(rows), torch.empty(rows)
    bad = native.quantize_rows(
        x.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        rows,
        columns,
        scheme.bits,
        scheme.symmetric,
    )
    return None if bad else (q, scale, zero_point)


def finish_rows(y: Tensor, scale: Tensor, zero_point: Tensor, sums: Tensor, bias: Tensor) -> None:
    """Turn products into outputs, in place: (y − zero_point · sums) · scale + bias.

    ``y`` is [tokens, channels], contiguous; scale and zero point [tokens]; the others [channels].
    """
    native = library()
    if native is None:
        y.sub_(zero_point[:, None] * sums).mul_(scale[:, None]).add_(bias)
        return
    native.finish_rows(
        y.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        sums.data_ptr(),
        bias.data_ptr(),
        y.shape[0],
        y.shape[1],
    )


_PART = 65536
"""Numbers that ``histogram`` sums at a time: PART in ``native.c``."""


def histogram(x: Tensor, inverse_width: float, counts: Tensor) -> tuple[float, float, int] | None:
    """Count finite float32 numbers ``x`` [n], in place; return Σ y, Σ y² and how many are 0.

    ``counts`` [bins] is int64, half of the bins are below 0, and y is x in units of a bin's width;
    all lie within the bins. None, with nothing counted, where the library is missing.
    """
    native = library()
    if native is None or x.device.type != "cpu":
        return None
    x = x.contiguous()
    sums = torch.empty(-(-x.numel() // _PART), 2, dtype=torch.float64)
    zeros = ctypes.c_int64()
    found = counts.clone()
    failed = native.histogram(
        x.data_ptr(),
        x.numel(),
        inverse_width,
        len(counts) // 2,
        found.data_ptr(),
        sums.data_ptr(),
        ctypes.byref(zeros),
    )
    if failed:
        return None
    counts.copy_(found)
    total, square = sums.sum(0).tolist()
    return total, square, zeros.value


_SPAN = 8192
"""Columns that ``squared_errors`` sums at a time: SPAN in ``native.c``."""


def squared_errors(blocks: Tensor, p: QParams) -> Tensor | None:
    """Return Σ (x − Q(x))², float64 [tried, n], of float32 ``blocks`` [n, k] on a CPU.

    ``p`` holds [tried, n]: parameters to try on each block. The least of a block's errors is exact,
    others may be cut short as soon as they are beyond it. None where the library is missing.
    """
    native = library()
    if native is None or blocks.device.type != "cpu":
        return None
    blocks, scale, zero_point = (t.contiguous() for t in (blocks, p.scale, p.zero_point))
    (n, k), tried = blocks.shape, len(scale)
    errors = torch.empty(tried, n, -(-k // _SPAN), dtype=torch.float64)
    native.squared_errors(
        blocks.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        errors.data_ptr(),
        n,
        k,
        tried,
        p.bits,
    )
    return errors.sum(2)


def change_products(x: Tensor, g: Tensor, schemes: Sequence[ActivationScheme]) -> Tensor | None:
    """Return Σ (Q(x) − x)·g over all but the first axis, float64 [len(x), schemes], in one pass.

    ``x`` and ``g`` have the same shape. None where a scheme is dynamic, the numbers are not float32
    on a CPU, or the library is missing.
    """
    native = library()
    if native is None or x.device.type != "cpu" or not len(x):
        return None
    if {x.dtype, g.dtype} != {torch.float32} or any(s.scale is None for s in schemes):
        return None
    x = dense(x)
    g = g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)
    ends = torch.tensor([bounds(s) for s in schemes], dtype=torch.float32).T.contiguous()
    scales = torch.tensor([s.scale for s in schemes], dtype=torch.float32)
    found = torch.empty(len(x), len(schemes), dtype=torch.float64)
    native.change_products(
        x.data_ptr(),
        g.data_ptr(),
        scales.data_ptr(),
        ends[0].data_ptr(),
        ends[1].data_ptr(),
        found.data_ptr(),
        len(x),
        x.numel() // len(x),
        len(schemes),
    )
    return found


def round_weights(x: Tensor, weights: Tensor, p: QParams) -> tuple[Tensor, Tensor] | None:
    """Return what rounding changes of a matrix, and the weighted sums of its squares.

    ``x`` is [rows, parts, columns], float32 on a CPU, ``weights`` [groups, parts, columns], for as
    many rows each; ``p`` holds [tried, rows · parts], or [tried, 1]. Changes are [tried, rows,
    parts, columns], sums [tried, rows, parts]. None where the library is missing.
    """
    native = library()
    if native is None or x.device.type != "cpu":
        return None
    x, weights, scale, zero_point = (
        t.float().contiguous() for t in (x, weights, p.scale, p.zero_point)
    )
    rows, parts, columns = x.shape
    delta = torch.empty(len(scale), *x.shape)
    sums = torch.empty(delta.shape[:3])
    native.round_weights(
        x.data_ptr(),
        weights.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        delta.data_ptr(),
        sums.data_ptr(),
        rows,
        parts,
        columns,
        len(weights),
        len(scale),
        p.bits,
        scale.shape[1] != rows * parts,
    )
    return delta, sums


def bounds(scheme: ActivationScheme) -> tuple[int, int]:
    """Return the least and largest integer of a static scheme, less its zero point."""
    grid, zero_point = FORMATS[scheme.bits], scheme.zero_point or 0
    return grid.qmin - zero_point, grid.qmax - zero_point


def _rows(x: Tensor, kind: str) -> tuple[int, int]:
    """Return (tokens, numbers in each); see quant.activation.token_dims."""
    if not kind.startswith("conv"):
        return x.numel() // x.shape[-1], x.shape[-1]
    return (x.shape[0], x.numel() // x.shape[0]) if x.dim() > 2 else (1, x.numel())


def _rows_are_dense(x: Tensor, kind: str) -> bool:
    """Return whether each token is one span of memory: a vector of channels-last data is not."""
    return kind.startswith("conv") or x.is_contiguous()


def _stored(q: Tensor) -> Tensor:
    return (q.to(torch.int16) + OFFSET).to(torch.uint8)
