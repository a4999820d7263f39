"""What an output holds, whatever its tensors and constants lie in, and how two outputs differ.

Tuples and lists (named ones too), mappings and dataclasses are gone through, within each other.
Any other object stands for the tensors that it holds: a cache of keys and values, say, is a new
object in every call, and equal where its tensors are.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    np.generic,
    torch.dtype,
    torch.device,
)
CLOSED = (nn.Module, type, torch.Generator)
"""Objects that are no outputs, though they may hold tensors."""

Leaf = tuple[str, Any]
"""Where something lies in an output ("" for the output itself), and what it is."""


def leaves(value: Any) -> list[Leaf]:
    """Return the tensors and constants in ``value``, in order; arrays of numbers as tensors."""
    return list(_leaves(value, "", ()))


def _leaves(value: Any, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    if isinstance(value, Tensor):
        parts = value.unbind() if value.is_nested else None
        if parts is None:
            yield path, value
        else:
            yield from ((f"{path}[{i}]", part) for i, part in enumerate(parts))
        return
    if isinstance(value, CONSTANTS):
        yield path, value
        return
    if isinstance(value, np.ndarray):
        yield path, torch.from_numpy(value) if value.dtype.kind in "biufc" else value.tolist()
        return
    if id(value) in above or isinstance(value, CLOSED) or callable(value):
        return
    above = (*above, id(value))
    opened = _open(value)
    if opened is not None:
        for name, part in opened:
            yield from _leaves(part, path + name, above)
        return
    for name, part in _attributes(value):
        found = _leaves(part, f"{path}.{name}", above)
        yield from (leaf for leaf in found if isinstance(leaf[1], Tensor))


def _open(value: Any) -> list[tuple[str, Any]] | None:
    """Return the parts of a container, None where ``value`` is something else."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", part) for name, part in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]
    return None


def _attributes(value: Any) -> list[tuple[str, Any]]:
    slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
    found = {name: getattr(value, name) for name in sorted(slots) if hasattr(value, name)}
    return list((found | getattr(value, "__dict__", {})).items())


def difference(a: Any, b: Any, tolerance: float) -> str | None:
    """Return in words how ``b`` differs from ``a``, None where it doesn't.

    Numbers may differ by ``tolerance`` of the largest finite one of their tensor. Infinities and
    NaN are equal to their like, at the same place. Of several differences the first is told.
    """
    return leaves_differ(leaves(a), leaves(b), tolerance)


def frozen(value: Any) -> list[Leaf]:
    """Return the leaves of ``value``, so that nobody writes into them any more."""
    return [(p, x.detach().clone() if isinstance(x, Tensor) else x) for p, x in leaves(value)]


def leaves_differ(ours: Sequence[Leaf], theirs: Sequence[Leaf], tolerance: float) -> str | None:
    """Return the ``difference`` of two values whose leaves these are."""
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors and constants, and then {len(theirs)}"
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        found = _differs(x, y, tolerance)
        if found is not None:
            return f"{_named(path)} {found}"
    return None


def _named(path: str) -> str:
    return f"output{path}" if path else "the output"


def _differs(x: Any, y: Any, tolerance: float) -> str | None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        both_nan = isinstance(x, float) and isinstance(y, float) and x != x and y != y
        if both_nan or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y):
            return None
        return f"is {_shown(x)}, and then {_shown(y)}"
    if x.shape != y.shape:
        return f"has the shape {list(x.shape)}, and then {list(y.shape)}"
    if x.layout is not torch.strided:
        x, y = x.to_dense(), y.to_dense()
    if not (x.is_floating_point() or x.is_complex()):
        wrong = int((x != y).sum())
        return f"differs in {wrong} of {x.numel()} entries" if wrong else None
    with torch.no_grad():
        odd = ~(x.isfinite() & y.isfinite())
        unlike = int((odd & (x != y) & ~(x.isnan() & y.isnan())).sum())
        if unlike:
            return f"has other infinities or NaN in {unlike} of {x.numel()} entries"
        zero = x.new_zeros(())
        most = _largest(torch.where(odd, zero, x - y))
        scale = _largest(torch.where(odd, zero, x))
    if most <= tolerance * max(scale, 1e-12):
        return None
    return f"differs by {most:.3g}, its largest number being {scale:.3g}"


def _largest(x: Tensor) -> float:
    found = float(x.abs().max()) if x.numel() else 0.0
    return found if math.isfinite(found) else math.inf


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}"
    text = repr(x)
    return text if len(text) <= 40 else f"{text[:39]}…"
