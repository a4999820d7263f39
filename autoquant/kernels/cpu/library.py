"""The library of ``native.c``: loading it, and the one entry through which it is called.

It is built when the package is installed, wherever there is a C compiler. Every function is called
by ``call``, which knows what each of its buffers has to be. A buffer that is not that raises: the C
code itself checks nothing, and whatever it writes beyond a buffer ends the process, or worse,
doesn't.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Sizes = Mapping[str, int]
"""The whole numbers of a call, by name."""


@dataclass(frozen=True, slots=True)
class _Array:
    """A buffer: the dtype of its numbers, and how many the function touches.

    ``strided`` ones may have gaps between rows: then the memory behind them must be long enough.
    """

    dtype: torch.dtype
    count: Callable[[Sizes], int]
    written: bool = False
    strided: bool = False


@dataclass(frozen=True, slots=True)
class _Integer:
    """A whole number between two ends, passed as a C type; a power of two where ``doubles``."""

    kind: type
    least: int
    most: int
    doubles: bool = False

    def takes(self, value: int) -> bool:
        """Return whether a number is one that the function can be given."""
        return self.least <= value <= self.most and not (self.doubles and value & (value - 1))


@dataclass(frozen=True, slots=True)
class _Real:
    """A float32 between two ends; never NaN."""

    least: float
    most: float


_Parameter = _Array | _Integer | _Real

_SIZE = _Integer(ctypes.c_ssize_t, 0, 2**62)
_PARTS = _Integer(ctypes.c_ssize_t, 1, 2**62)
_BITS = _Integer(ctypes.c_int, 2, 8)
_FLAG = _Integer(ctypes.c_int, 0, 1)
_BYTE = _Integer(ctypes.c_int, -128, 127)
_BLOCK = _Integer(ctypes.c_ssize_t, 16, 1024, doubles=True)
_SCALE = _Real(2.0**-149, 2.0**128)
_GRID = _Real(-255.0, 255.0)
_F32, _F64, _U8, _I64 = torch.float32, torch.float64, torch.uint8, torch.int64

PART = 65536
"""Numbers that ``histogram`` sums at a time: PART in ``native.c``."""
SPAN = 8192
"""Columns that ``squared_errors`` sums at a time: SPAN in ``native.c``."""


def _reads(dtype: torch.dtype, *dims: str | int, strided: bool = False) -> _Array:
    return _Array(dtype, _product(dims), strided=strided)


def _writes(dtype: torch.dtype, *dims: str | int) -> _Array:
    return _Array(dtype, _product(dims), written=True)


def _product(dims: tuple[str | int, ...]) -> Callable[[Sizes], int]:
    def count(sizes: Sizes) -> int:
        total = 1
        for dim in dims:
            total *= sizes[dim] if isinstance(dim, str) else dim
        return total

    return count


def _steps(gates: int) -> _Array:
    """Rows of ``gates`` · n numbers, one every ``stride``: a step of a sequence."""

    def count(sizes: Sizes) -> int:
        rows, width = sizes["rows"], gates * sizes["n"]
        return (rows - 1) * sizes["stride"] + width if rows and width else 0

    return _Array(_F32, count, strided=True)


def _tried(sizes: Sizes) -> int:
    return sizes["tried"] * (1 if sizes["shared"] else sizes["rows"] * sizes["parts"])


_FUNCTIONS: Mapping[str, Mapping[str, _Parameter]] = {
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
        "errors": _Array(
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
        "scale": _Array(_F32, _tried),
        "zero_point": _Array(_F32, _tried),
        "delta": _writes(_F32, "tried", "rows", "parts", "columns"),
        "sums": _writes(_F32, "tried", "rows", "parts"),
        "rows": _SIZE,
        "parts": _SIZE,
        "columns": _SIZE,
        "groups": _PARTS,
        "tried": _SIZE,
        "bits": _BITS,
        "shared": _FLAG,
    },
    "histogram": {
        "x": _reads(_F32, "n"),
        "n": _SIZE,
        "inverse": _Real(0.0, 2.0**128),
        "half": _Integer(ctypes.c_int, 1, 2**24),
        "counts": _Array(_I64, lambda s: 2 * s["half"], written=True),
        "sums": _Array(_F64, lambda s: 2 * -(-s["n"] // PART), written=True),
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
}
"""Parameters of each function, in order. Buffers are told by the sizes of the same call."""

_INTEGERS = {
    name: [(key, p) for key, p in parameters.items() if isinstance(p, _Integer)]
    for name, parameters in _FUNCTIONS.items()
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, None where it was not built or can't be loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                return load(path)
            except (OSError, AttributeError):  # built for another machine, or from older source
                continue
    return None


def load(path: Path) -> ctypes.CDLL:
    """Load the library from ``path``; raise OSError or AttributeError where it is not ours."""
    loaded = ctypes.CDLL(str(path))
    for name, parameters in _FUNCTIONS.items():
        getattr(loaded, name).argtypes = [_ctype(p) for p in parameters.values()]
    return loaded


def _ctype(parameter: _Parameter) -> type:
    if isinstance(parameter, _Array):
        return ctypes.c_void_p
    return parameter.kind if isinstance(parameter, _Integer) else ctypes.c_float


def call(name: str, *arguments: Tensor | float) -> int:
    """Call a function of the library, which must be there, and return what it returns.

    Buffers are tensors: of the right dtype, on the CPU, without gaps, aligned, large enough, and
    such that none that is written overlaps another. Raises TypeError or ValueError, which name the
    function and the argument, where an argument is anything else.
    """
    native = library()
    if native is None:
        raise RuntimeError(f"native.{name}: the compiled library is missing")
    parameters = _FUNCTIONS[name]
    if len(arguments) != len(parameters):
        raise TypeError(f"native.{name} takes {len(parameters)} arguments, not {len(arguments)}")
    given = dict(zip(parameters, arguments, strict=True))
    sizes: dict[str, int] = {}
    for key, integer in _INTEGERS[name]:
        value = given[key]
        if not isinstance(value, int):
            raise TypeError(f"native.{name}: {key} is {value!r}, a whole number is needed")
        if not integer.takes(value):
            raise _out_of_range(name, key, value, integer)
        sizes[key] = value
    if sizes.get("groups", 1) > 1 and sizes["rows"] % sizes["groups"]:
        raise ValueError(f"native.{name}: {sizes['rows']} rows are not {sizes['groups']} groups")
    spans: list[tuple[int, int, str, bool]] = []
    passed: list[int | float] = []
    for key, parameter in parameters.items():
        value = given[key]
        if isinstance(parameter, _Array):
            count = parameter.count(sizes)
            start = _address(name, key, value, parameter, count)
            stop = start + count * parameter.dtype.itemsize
            for other_start, other_stop, other, also in spans:
                if start < other_stop and other_start < stop and (parameter.written or also):
                    raise ValueError(f"native.{name}: {key} and {other} share memory")
            spans.append((start, stop, key, parameter.written))
            passed.append(start)
        elif isinstance(parameter, _Integer):
            passed.append(sizes[key])
        else:
            if not isinstance(value, int | float):
                raise TypeError(f"native.{name}: {key} is {value!r}, a number is needed")
            if not parameter.least <= value <= parameter.most:  # NaN neither
                raise _out_of_range(name, key, value, parameter)
            passed.append(value)
    return int(getattr(native, name)(*passed))


def _out_of_range(name: str, key: str, value: float, p: _Integer | _Real) -> ValueError:
    return ValueError(f"native.{name}: {key} is {value}, not within {p.least} … {p.most}")


def _address(name: str, key: str, x: object, array: _Array, count: int) -> int:
    """Return where a buffer begins that holds at least ``count`` numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"native.{name}: {key} is {type(x).__name__}, a tensor is needed")
    if x.dtype != array.dtype:
        raise TypeError(f"native.{name}: {key} is {x.dtype}, {array.dtype} is needed")
    if not x.is_cpu:
        raise TypeError(f"native.{name}: {key} is on {x.device}, not on the CPU")
    if x.layout != torch.strided or x.is_neg():
        raise TypeError(f"native.{name}: {key} does not hold its numbers as they are")
    width = array.dtype.itemsize
    held = x.untyped_storage().nbytes() // width - x.storage_offset()
    if not array.strided:
        if not is_dense(x):
            raise ValueError(
                f"native.{name}: {key} has gaps: strides {x.stride()} of {tuple(x.shape)}"
            )
        held = min(held, x.numel())
    if held < count:
        raise ValueError(f"native.{name}: {key} holds {held} numbers, {count} are needed")
    start = x.data_ptr()
    if start % width:
        raise ValueError(f"native.{name}: {key} is not aligned to {width} bytes")
    return start


def is_dense(x: Tensor) -> bool:
    """Return whether numbers lie without gaps, sample after sample."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
