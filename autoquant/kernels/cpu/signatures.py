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
    """

    dtype: torch.dtype
    count: Callable[[Sizes], int]
    written: bool = False
    strided: bool = False


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

    def takes(self, value: int) -> bool:
        """Return whether a number is one that the function can be given."""
        return self.least <= value <= self.most and not (self.doubles and value & (value - 1))


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
_END = Real(-LARGEST, LARGEST)
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
    if s["dilation_w"] == 1:  # taps of a row lie side by side
        return _panels(s) * s["kernel_h"] * 2 * -(-s["kernel_w"] * channels // 2)
    return _panels(s) * s["kernel_h"] * s["kernel_w"] * 2 * -(-channels // 2)


_FORM: Mapping[str, Parameter] = {
    "batch": _SIZE,
    "height": _SIZE,
    "width": _SIZE,
    "channels": _PARTS,
    "kernel_h": _TAPS,
    "kernel_w": _TAPS,
    "stride_h": _TAPS,
    "stride_w": _TAPS,
    "pad_h": _EDGE,
    "pad_w": _EDGE,
    "dilation_h": _TAPS,
    "dilation_w": _TAPS,
    "lo": _END,
    "hi": _END,
}
_READS: Mapping[str, Parameter] = {
    "x": _reads(_U8, "batch", "height", "width", "channels"),
    "zero": _reads(_I32, "batch"),
    "sample_scale": _reads(_F32, "batch"),
}
_BY_PANELS: Mapping[str, Parameter] = {
    **_READS,
    "weight": Array(_I16, _panel_weights),
    "scale": Array(_F32, _panels),
    "bias": Array(_F32, _panels),
}
_BY_CHANNELS: Mapping[str, Parameter] = {
    **_READS,
    "weight": Array(_I16, lambda s: -(-s["kernel_h"] * s["kernel_w"] // 2) * 2 * s["channels"]),
    "sums": _reads(_I32, "channels"),
    "scale": _reads(_F32, "channels"),
    "bias": _reads(_F32, "channels"),
}
_PANELS: Mapping[str, Parameter] = {
    "out": _PARTS,
    "groups": Integer(ctypes.c_ssize_t, 1, 2**62, divides="channels"),
    "wide": _FLAG,
}
_BYTES: Mapping[str, Parameter] = {
    "gelu": Integer(ctypes.c_int, 0, 2),
    "inverse": Real(2.0**-149, 2.0**127),
    "byte": Integer(ctypes.c_int, 0, 255),
}


def _channels_of_panels(s: Sizes) -> int:
    return -(-s["out"] // PANEL) * PANEL


_BY_GROUPS: Mapping[str, Parameter] = {
    "x": _reads(_U8, "batch", "rows", "columns"),
    "zero": _reads(_I32, "batch"),
    "sample_scale": _reads(_F32, "batch"),
    "weight": Array(
        _I16,
        lambda s: _channels_of_panels(s) * s["groups"] * 2 * -(-(s["columns"] // s["groups"]) // 2),
    ),
    "group_scale": Array(_F32, lambda s: _channels_of_panels(s) * s["groups"]),
    "scale": Array(_F32, _channels_of_panels),
    "bias": Array(_F32, _channels_of_panels),
}
_ROWS: Mapping[str, Parameter] = {
    "batch": _SIZE,
    "rows": _SIZE,
    "columns": _PARTS,
    "out": _PARTS,
    "groups": Integer(ctypes.c_ssize_t, 1, 2**62, divides="columns"),
    "wide": _FLAG,
    "lo": _END,
    "hi": _END,
}


def _panel_outputs(s: Sizes) -> int:
    return _pixels(s) * s["out"] * s["groups"]


def _channel_outputs(s: Sizes) -> int:
    return _pixels(s) * s["channels"]


FUNCTIONS: Mapping[str, Mapping[str, Parameter]] = {
    "quantize": {
        "x": _reads(_F32, "n"),
        "q": _writes(_U8, "n"),
        "n": _SIZE,
        "scale": _SCALE,
        "lo": _GRID,
        "hi": _GRID,
        "zero_point": _BYTE,
    },
    "quantize_smoothed": {
        "x": _reads(_F32, "outer", "channels", "inner"),
        "q": _writes(_U8, "outer", "channels", "inner"),
        "scale": _reads(_F32, "channels"),
        "outer": _SIZE,
        "channels": _SIZE,
        "inner": _SIZE,
        "lo": _GRID,
        "hi": _GRID,
        "zero_point": _BYTE,
    },
    "quantize_rotated": {
        "x": _reads(_F32, "blocks", "block"),
        "q": _writes(_U8, "blocks", "block"),
        "blocks": _SIZE,
        "block": _BLOCK,
        "norm": _SCALE,
        "scale": _SCALE,
        "lo": _GRID,
        "hi": _GRID,
        "zero_point": _BYTE,
    },
    "rotate": {
        "x": _reads(_F32, "blocks", "block"),
        "y": _writes(_F32, "blocks", "block"),
        "blocks": _SIZE,
        "block": _BLOCK,
        "norm": _SCALE,
    },
    "limit_bytes": {
        "y": _writes(_U8, "outer", "channels"),
        "limit": _reads(_U8, "channels"),
        "outer": _SIZE,
        "channels": _SIZE,
    },
    "fake_quantize": {
        "x": _reads(_F32, "n"),
        "y": _writes(_F32, "n"),
        "n": _SIZE,
        "scale": _SCALE,
        "lo": _GRID,
        "hi": _GRID,
    },
    "quantize_rows": {
        "x": _reads(_F32, "rows", "columns"),
        "q": _writes(_U8, "rows", "columns"),
        "scale": _writes(_F32, "rows"),
        "zero_point": _writes(_F32, "rows"),
        "rows": _SIZE,
        "columns": _SIZE,
        "bits": _BITS,
        "symmetric": _FLAG,
    },
    "fake_quantize_rows": {
        "x": _reads(_F32, "rows", "columns"),
        "y": _writes(_F32, "rows", "columns"),
        "rows": _SIZE,
        "columns": _SIZE,
        "bits": _BITS,
        "symmetric": _FLAG,
    },
    "finish_rows": {
        "y": _writes(_F32, "rows", "columns"),
        "scale": _reads(_F32, "rows"),
        "zero_point": _reads(_F32, "rows"),
        "sums": _reads(_F32, "columns"),
        "bias": _reads(_F32, "columns"),
        "rows": _SIZE,
        "columns": _SIZE,
    },
    "squared_errors": {
        "x": _reads(_F32, "blocks", "columns"),
        "scale": _reads(_F32, "tried", "blocks"),
        "zero_point": _reads(_F32, "tried", "blocks"),
        "errors": Array(
            _F64, lambda s: s["tried"] * s["blocks"] * -(-s["columns"] // SPAN), written=True
        ),
        "blocks": _SIZE,
        "columns": _SIZE,
        "tried": _SIZE,
        "bits": _BITS,
    },
    "change_products": {
        "x": _reads(_F32, "rows", "columns"),
        "g": _reads(_F32, "rows", "columns"),
        "scale": _reads(_F32, "tried"),
        "lo": _reads(_F32, "tried"),
        "hi": _reads(_F32, "tried"),
        "products": _writes(_F64, "rows", "tried"),
        "rows": _SIZE,
        "columns": _SIZE,
        "tried": _SIZE,
    },
    "round_weights": {
        "x": _reads(_F32, "rows", "parts", "columns"),
        "weight": _reads(_F32, "groups", "parts", "columns"),
        "scale": Array(_F32, _tried),
        "zero_point": Array(_F32, _tried),
        "delta": _writes(_F32, "tried", "rows", "parts", "columns"),
        "sums": _writes(_F32, "tried", "rows", "parts"),
        "rows": _SIZE,
        "parts": _SIZE,
        "columns": _SIZE,
        "groups": Integer(ctypes.c_ssize_t, 1, 2**62, divides="rows"),
        "tried": _SIZE,
        "bits": _BITS,
        "shared": _FLAG,
    },
    "histogram": {
        "x": _reads(_F32, "n"),
        "n": _SIZE,
        "inverse": Real(0.0, 2.0**128),
        "half": Integer(ctypes.c_int, 1, 2**24),
        "counts": Array(_I64, lambda s: 2 * s["half"], written=True),
        "sums": Array(_F64, lambda s: 2 * -(-s["n"] // PART), written=True),
        "zeros": _writes(_I64, 1),
    },
    "gru_gates": {
        "x": _steps(3),
        "y": _reads(_F32, "rows", 3, "n"),
        "h": _reads(_F32, "rows", "n"),
        "out": _writes(_F32, "rows", "n"),
        "rows": _SIZE,
        "n": _SIZE,
        "stride": _SIZE,
    },
    "lstm_gates": {
        "x": _steps(4),
        "y": _reads(_F32, "rows", 4, "n"),
        "c": _reads(_F32, "rows", "n"),
        "h": _writes(_F32, "rows", "n"),
        "cell": _writes(_F32, "rows", "n"),
        "rows": _SIZE,
        "n": _SIZE,
        "stride": _SIZE,
    },
    "product_width": {"width": _writes(_I32, 1)},
    "convolve": {
        **_BY_PANELS,
        "y": Array(_F32, _panel_outputs, written=True),
        **_FORM,
        **_PANELS,
    },
    "convolve_bytes": {
        **_BY_PANELS,
        "y": Array(_U8, _panel_outputs, written=True),
        **_FORM,
        **_PANELS,
        **_BYTES,
    },
    "multiply_groups": {
        **_BY_GROUPS,
        "y": _writes(_F32, "batch", "rows", "out"),
        **_ROWS,
    },
    "multiply_groups_bytes": {
        **_BY_GROUPS,
        "y": _writes(_U8, "batch", "rows", "out"),
        **_ROWS,
        **_BYTES,
    },
    "convolve_channels": {
        **_BY_CHANNELS,
        "y": Array(_F32, _channel_outputs, written=True),
        **_FORM,
    },
    "convolve_channels_bytes": {
        **_BY_CHANNELS,
        "y": Array(_U8, _channel_outputs, written=True),
        **_FORM,
        **_BYTES,
    },
}
"""Parameters of each function, in order. Buffers are told by the sizes of the same call."""
