"""What of a value is data and what is form: a kernel's arguments at fixed addresses, and its code.

The tensors of a value, at any depth of its dataclasses, are its data; all else is its form. Kernels
that were recorded for one value serve every other of the same form once its data is copied to
where they read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def form_of(value: Any) -> Hashable:
    """Return what two values must share for the same kernels to compute with them.

    A value that cannot be compared is of a form of its own.
    """
    return _form(value, {})


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a value, each once, in the order of its fields."""
    found: dict[int, Tensor] = {}
    for tensor in _tensors(value):
        found.setdefault(id(tensor), tensor)
    return list(found.values())


def with_tensors(value: T, tensors: list[Tensor]) -> T:
    """Return the value with other ``tensors``, as ``tensors_of`` gives its own."""
    known = {id(old): new for old, new in zip(tensors_of(value), tensors, strict=True)}
    made: T = _rebuilt(value, known)
    return made


def same_memory(tensor: Tensor) -> Tensor:
    """Return an empty tensor that lies in memory as ``tensor`` does, to be written at any time."""
    with torch.inference_mode(False):
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        yield field.name, getattr(value, field.name)


def _form(value: Any, numbers: dict[int, int]) -> Hashable:
    if isinstance(value, Tensor):
        number = numbers.setdefault(id(value), len(numbers))  # which are one and the same
        return number, value.shape, value.stride(), value.dtype, value.device
    if _is_data(value):
        return type(value), tuple((name, _form(part, numbers)) for name, part in _parts(value))
    if isinstance(value, tuple | list):
        return type(value), tuple(_form(part, numbers) for part in value)
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif _is_data(value):
        for _, part in _parts(value):
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _rebuilt(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)]
    if _is_data(value):
        return dataclasses.replace(value, **{n: _rebuilt(part, known) for n, part in _parts(value)})
    if isinstance(value, tuple | list):
        return type(value)(_rebuilt(part, known) for part in value)
    return value
