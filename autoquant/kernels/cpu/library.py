"""The library of ``native.c`` and ``products.c``: loading it, and the one way to call it.

It is built when the package is installed, wherever there is a C compiler. Every function is called
by ``call``, which knows what each of its buffers has to be. A buffer that is not that raises: the C
code itself checks nothing, and whatever it writes beyond a buffer ends the process, or worse,
doesn't.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch
from torch import Tensor

from autoquant.kernels.cpu.signatures import FUNCTIONS, Array, Integer, Parameter, Real

_INTEGERS = {
    name: [(key, p) for key, p in parameters.items() if isinstance(p, Integer)]
    for name, parameters in FUNCTIONS.items()
}
_DIVISORS = {
    name: [(key, p.divides) for key, p in integers if p.divides is not None]
    for name, integers in _INTEGERS.items()
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
    for name, parameters in FUNCTIONS.items():
        getattr(loaded, name).argtypes = [_ctype(p) for p in parameters.values()]
    return loaded


def _ctype(parameter: Parameter) -> type:
    if isinstance(parameter, Array):
        return ctypes.c_void_p
    return parameter.kind if isinstance(parameter, Integer) else ctypes.c_float


def call(name: str, *arguments: Tensor | float) -> int:
    """Call a function of the library, which must be there, and return what it returns.

    Buffers are tensors: of the right dtype, on the CPU, without gaps, aligned, large enough, and
    such that none that is written overlaps another; one of no numbers is not looked at. Raises
    TypeError or ValueError, which name the function and the argument, where an argument is anything
    else.
    """
    native = library()
    if native is None:
        raise RuntimeError(f"native.{name}: the compiled library is missing")
    parameters = FUNCTIONS[name]
    if len(arguments) != len(parameters):
        raise TypeError(f"native.{name} takes {len(parameters)} arguments, not {len(arguments)}")
    given = dict(zip(parameters, arguments, strict=True))
    sizes: dict[str, int] = {}
    for key, integer in _INTEGERS[name]:
        value = given[key]
        if not isinstance(value, int):
            raise TypeError(f"native.{name}: {key} is {value!r}, a whole number is needed")
        if not integer.least <= value <= integer.most or (integer.doubles and value & (value - 1)):
            raise _out_of_range(name, key, value, integer)
        sizes[key] = value
    for key, whole in _DIVISORS[name]:
        if sizes[whole] % sizes[key]:
            raise ValueError(f"native.{name}: {sizes[whole]} {whole} are not {sizes[key]} {key}")
    spans: list[tuple[int, int, str]] = []
    written: list[tuple[int, int, str]] = []
    passed: list[int | float] = []
    for key, parameter in parameters.items():
        value = given[key]
        if isinstance(parameter, Array):
            count = parameter.count(sizes)
            if count == 0:
                passed.append(0)
                continue
            dtype = parameter.dtype if parameter.bytes_where is None else parameter.dtype_in(sizes)
            start = _address(name, key, value, dtype, parameter.strided, count)
            stop = start + count * dtype.itemsize
            for other_start, other_stop, other in spans if parameter.written else written:
                if start < other_stop and other_start < stop:
                    raise ValueError(f"native.{name}: {key} and {other} share memory")
            spans.append((start, stop, key))
            if parameter.written:
                written.append(spans[-1])
            passed.append(start)
        elif key in sizes:
            passed.append(sizes[key])
        else:
            if not isinstance(value, int | float):
                raise TypeError(f"native.{name}: {key} is {value!r}, a number is needed")
            if not parameter.least <= value <= parameter.most:  # NaN neither
                raise _out_of_range(name, key, value, parameter)
            passed.append(value)
    return int(getattr(native, name)(*passed))


def _out_of_range(name: str, key: str, value: float, p: Integer | Real) -> ValueError:
    return ValueError(f"native.{name}: {key} is {value}, not within {p.least} … {p.most}")


def _address(name: str, key: str, x: object, dtype: torch.dtype, strided: bool, count: int) -> int:
    """Return where a buffer begins that holds at least ``count`` numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"native.{name}: {key} is {type(x).__name__}, a tensor is needed")
    if x.dtype != dtype:
        raise TypeError(f"native.{name}: {key} is {x.dtype}, {dtype} is needed")
    if not x.is_cpu:
        raise TypeError(f"native.{name}: {key} is on {x.device}, not on the CPU")
    if x.layout != torch.strided or x.is_neg():
        raise TypeError(f"native.{name}: {key} does not hold its numbers as they are")
    width = dtype.itemsize
    held = x.untyped_storage().nbytes() // width - x.storage_offset()
    if not strided:
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
