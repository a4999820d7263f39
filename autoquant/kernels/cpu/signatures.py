"""What each function of the compiled library takes: its buffers, numbers and their limits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Sizes = Mapping[str, int]
"""The whole numbers of a call, by name."""


@dataclass(frozen=True, slots=True)
class Array:
    """A buffer: the dtype of its numbers, and how many the function touches.

    ``strided`` ones may have gaps between rows: then the memory behind them must be long enough.
    Its numbers are bytes instead where the whole number named in ``bytes_where`` is not 0.
    """

    dtype: torch.dtype
    count: Callable[[Sizes], int]
    written: bool = False
    strided: bool = False
    bytes_where: str | None = None

    def dtype_in(self, sizes: Sizes) -> torch.dtype:
        """Return the dtype of its numbers in a call."""
        return torch.uint8 if self.bytes_where and sizes[self.bytes_where] else self.dtype


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number between two ends, passed as a C type.

    A power of two where ``doubles``; one that divides the numbers named in ``divides``.
    """

    kind: type
    least: int
    most: int
    doubles: bool = False
    divides: str | None = None


@dataclass(frozen=True, slots=True)
class Real:
    """A float32 between two ends; never NaN."""

    least: float
    most: float


Parameter = Array | Integer | Real

LARGEST = float(torch.finfo(torch.float32).max)
"""An end that is none: ∞ is no number that a function takes."""

_SIZE = Integer(ctypes.c_ssize_t, 0, 2**62)
_PARTS = Integer(ctypes.c_ssize_t, 1, 2**62)
_TAPS = Integer(ctypes.c_ssize_t, 1, 2**15)
_EDGE = Integer(ctypes.c_ssize_t, 0, 2**15)
_BITS = Integer(ctypes.c_int, 2, 8)
_FLAG = Integer(ctypes.c_int, 0, 1)
_BYTE = Integer(ctypes.c_int, -128, 127)
_BLOCK = Integer(ctypes.c_ssize_t, 16, 1024, doubles=True)
_SCALE = Real(2.0**-149, 2.0**128)
_GRID = Real(-255.0, 255.0)
_LIMIT = Real(-LARGEST, LARGEST)
_F32, _F64, _U8, _I64 = torch.float32, torch.float64, torch.uint8, torch.int64
_I16, _I32 = torch.int16, torch.int32

PANEL = 16
"""Channels whose weights lie together: PANEL in ``products.c``."""
PART = 65536
"""Numbers that ``histogram`` sums at a time: PART in ``native.c``."""
SPAN = 8192
"""Columns that ``squared_errors`` sums at a time: SPAN in ``native.c``."""


def _reads(dtype: torch.dtype, *dims: str | int, strided: bool = False) -> Array:
    return Array(dtype, _product(dims), strided=strided)


def _writes(dtype: torch.dtype, *dims: str | int) -> Array:
    return Array(dtype, _product(dims), written=True)


def _product(dims: tuple[str | int, ...]) -> Callable[[Sizes], int]:
    def count(sizes: Sizes) -> int:
        total = 1
        for dim in dims:
            total *= sizes[dim] if isinstance(dim, str) else dim
        return total

    return count


def _steps(gates: int) -> Array:
    """Rows of ``gates`` · n numbers, one every ``stride``: a step of a sequence."""

    def count(sizes: Sizes) -> int:
        rows, width = sizes["rows"], gates * sizes["n"]
        return (rows - 1) * sizes["stride"] + width if rows and width else 0

    return Array(_F32, count, strided=True)


def _tried(sizes: Sizes) -> int:
    return sizes["tried"] * (1 if sizes["shared"] else sizes["rows"] * sizes["parts"])


def _side(s: Sizes, size: str, axis: str) -> int:
    """Return how many outputs there are on one axis of a convolution."""
    reach = s[f"dilation_{axis}"] * (s[f"kernel_{axis}"] - 1) + 1
    left = s[size] + 2 * s[f"pad_{axis}"] - reach
    if left < 0:
        raise ValueError(f"a window of {reach} is larger than what it is moved over, by {-left}")
    return left // s[f"stride_{axis}"] + 1


def _pixels(s: Sizes) -> int:
    return s["batch"] * _side(s, "height", "h") * _side(s, "width", "w")


def _panels(s: Sizes) -> int:
    return s["groups"] * -(-s["out"] // PANEL) * PANEL


def _panel_weights(s: Sizes) -> int:
    channels = s["channels"] // s["groups"]
    if s["runs"] > 1:
        return _panels(s) * s["runs"] * _even(channels // s["runs"])
    if s["dilation_w"] == 1:  # taps of a row lie side by side
        return _panels(s) * s["kernel_h"] * _even(s["kernel_w"] * channels)
    return _panels(s) * s["kernel_h"] * s["kernel_w"] * _even(channels)


def _even(n: int) -> int:
    return n + n % 2


def _takes(**parameters: Parameter) -> Mapping[str, Parameter]:
    return parameters


def _each(parameter: Parameter, *names: str) -> Mapping[str, Parameter]:
    return dict.fromkeys(names, parameter)


_STATIC = _takes(lo=_GRID, hi=_GRID, zero_point=_BYTE)
_ROWS = _each(_SIZE, "rows", "columns")
_BLOCKS = _takes(blocks=_SIZE, block=_BLOCK, norm=_SCALE)
_BY_ROW = _takes(**_ROWS, bits=_BITS, symmetric=_FLAG)
_READS = _takes(
    x=_reads(_U8, "batch", "height", "width", "channels"),
    zero=_reads(_I32, "batch"),
    sample_scale=_reads(_F32, "batch"),
)
_FORM = _takes(
    **_each(_SIZE, "batch", "height", "width"),
    channels=_PARTS,
    **_each(_TAPS, "kernel_h", "kernel_w", "stride_h", "stride_w"),
    **_each(_EDGE, "pad_h", "pad_w"),
    **_each(_TAPS, "dilation_h", "dilation_w"),
)
_END = _takes(
    lo=_LIMIT,
    hi=_LIMIT,
    after=Integer(ctypes.c_int, 0, 3),
    inverse=Real(2.0**-149, 2.0**127),
    byte=Integer(ctypes.c_int, 0, 255),
)


def _divisor(of: str) -> Integer:
    return Integer(ctypes.c_ssize_t, 1, 2**62, divides=of)


def _outputs(*dims: str) -> Array:
    channels = _product(dims)
    return Array(_F32, lambda s: _pixels(s) * channels(s), written=True, bytes_where="after")


FUNCTIONS: Mapping[str, Mapping[str, Parameter]] = {
    "quantize": _takes(x=_reads(_F32, "n"), q=_writes(_U8, "n"), n=_SIZE, scale=_SCALE, **_STATIC),
    "quantize_smoothed": _takes(
        x=_reads(_F32, "outer", "channels", "inner"),
        q=_writes(_U8, "outer", "channels", "inner"),
        scale=_reads(_F32, "channels"),
        **_each(_SIZE, "outer", "channels", "inner"),
        **_STATIC,
    ),
    "quantize_rotated": _takes(
        x=_reads(_F32, "blocks", "block"),
        q=_writes(_U8, "blocks", "block"),
        **_BLOCKS,
        scale=_SCALE,
        **_STATIC,
    ),
    "rotate": _takes(
        x=_reads(_F32, "blocks", "block"),
        y=_writes(_F32, "blocks", "block"),
        **_BLOCKS,
    ),
    "limit_bytes": _takes(
        y=_writes(_U8, "outer", "channels"),
        limit=_reads(_U8, "channels"),
        **_each(_SIZE, "outer", "channels"),
    ),
    "fake_quantize": _takes(
        x=_reads(_F32, "n"), y=_writes(_F32, "n"), n=_SIZE, scale=_SCALE, lo=_GRID, hi=_GRID
    ),
    "quantize_rows": _takes(
        x=_reads(_F32, "rows", "columns"),
        q=_writes(_U8, "rows", "columns"),
        scale=_writes(_F32, "rows"),
        zero_point=_writes(_F32, "rows"),
        **_BY_ROW,
    ),
    "fake_quantize_rows": _takes(
        x=_reads(_F32, "rows", "columns"), y=_writes(_F32, "rows", "columns"), **_BY_ROW
    ),
    "finish_rows": _takes(
        y=_writes(_F32, "rows", "columns"),
        scale=_reads(_F32, "rows"),
        zero_point=_reads(_F32, "rows"),
        sums=_reads(_F32, "columns"),
        bias=_reads(_F32, "columns"),
        **_ROWS,
    ),
    "squared_errors": _takes(
        x=_reads(_F32, "blocks", "columns"),
        scale=_reads(_F32, "tried", "blocks"),
        zero_point=_reads(_F32, "tried", "blocks"),
        errors=Array(
            _F64, lambda s: s["tried"] * s["blocks"] * -(-s["columns"] // SPAN), written=True
        ),
        **_each(_SIZE, "blocks", "columns", "tried"),
        bits=_BITS,
    ),
    "change_products": _takes(
        x=_reads(_F32, "rows", "columns"),
        g=_reads(_F32, "rows", "columns"),
        **_each(_reads(_F32, "tried"), "scale", "lo", "hi"),
        products=_writes(_F64, "rows", "tried"),
        **_ROWS,
        tried=_SIZE,
    ),
    "round_weights": _takes(
        x=_reads(_F32, "rows", "parts", "columns"),
        weight=_reads(_F32, "groups", "parts", "columns"),
        scale=Array(_F32, _tried),
        zero_point=Array(_F32, _tried),
        delta=_writes(_F32, "tried", "rows", "parts", "columns"),
        sums=_writes(_F32, "tried", "rows", "parts"),
        **_each(_SIZE, "rows", "parts", "columns"),
        groups=_divisor("rows"),
        tried=_SIZE,
        bits=_BITS,
        shared=_FLAG,
    ),
    "histogram": _takes(
        x=_reads(_F32, "n"),
        n=_SIZE,
        inverse=Real(0.0, 2.0**128),
        half=Integer(ctypes.c_int, 1, 2**24),
        counts=_writes(_I64, 2, "half"),
        sums=Array(_F64, lambda s: 2 * -(-s["n"] // PART), written=True),
        zeros=_writes(_I64, 1),
    ),
    "gru_gates": _takes(
        x=_steps(3),
        y=_reads(_F32, "rows", 3, "n"),
        h=_reads(_F32, "rows", "n"),
        out=_writes(_F32, "rows", "n"),
        **_each(_SIZE, "rows", "n", "stride"),
    ),
    "lstm_gates": _takes(
        x=_steps(4),
        y=_reads(_F32, "rows", 4, "n"),
        c=_reads(_F32, "rows", "n"),
        h=_writes(_F32, "rows", "n"),
        cell=_writes(_F32, "rows", "n"),
        **_each(_SIZE, "rows", "n", "stride"),
    ),
    "product_width": _takes(width=_writes(_I32, 1)),
    "multiply_panels": _takes(
        **_READS,
        weight=Array(_I16, _panel_weights),
        run_scale=Array(_F32, lambda s: _panels(s) * s["runs"] if s["runs"] > 1 else 0),
        scale=Array(_F32, _panels),
        bias=Array(_F32, _panels),
        y=_outputs("out", "groups"),
        **_FORM,
        out=_PARTS,
        groups=_divisor("channels"),
        runs=_divisor("channels"),
        wide=_FLAG,
        **_END,
    ),
    "multiply_channels": _takes(
        **_READS,
        weight=Array(_I16, lambda s: _even(s["kernel_h"] * s["kernel_w"]) * s["channels"]),
        sums=_reads(_I32, "channels"),
        scale=_reads(_F32, "channels"),
        bias=_reads(_F32, "channels"),
        y=_outputs("channels"),
        **_FORM,
        **_END,
    ),
}
"""Parameters of each function, in order. Buffers are told by the sizes of the same call."""
