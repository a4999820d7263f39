"""What the user's data functions yield, read safely and brought to one form.

A batch becomes a tree (see ``trees``) of detached CPU tensors; NumPy arrays become tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoquant.errors import TaskError
from autoquant.models.trees import EXPECTED, Tree, batch_size
from autoquant.models.usercode import file_of, guarded

Pair = tuple[Tree, Tree]
"""(inputs, targets) of one batch; targets are None where the data has none."""


class NoBatches(TaskError):
    """The user's data are empty."""


def read(
    source: str, name: str, function: Callable[[], Iterable[Any]]
) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, batch) of the user's data; the user's exceptions become TaskError."""
    number = 0
    file = file_of(function) or source
    with guarded(lambda reason: TaskError(f"{source}: {name}() failed: {reason}"), file):
        batches = function()
        if batches is None or isinstance(batches, str) or not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise TaskError(f"{source}: {name}() returned {kind}, not batches to iterate over")
        iterator = iter(batches)

    def failed(reason: str) -> TaskError:
        return TaskError(f"{source}: {name}, batch {number + 1} failed: {reason}")

    while True:
        try:
            with guarded(failed, file, passing=(StopIteration,)):
                batch = next(iterator)
        except StopIteration:
            break
        number += 1
        yield number, batch
    if not number:
        raise NoBatches(f"{source}: {name}() has no batches")


def is_pair(batch: Any) -> bool:
    """Return whether a batch reads as (inputs, targets): a list of two strings does not."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[0], str)


def as_pair(batch: Any, where: str) -> Pair:
    """Return (inputs, targets) with checked sizes; what is no pair has no targets."""
    if not is_pair(batch):
        inputs = as_inputs(batch, where)
        checked_size(inputs, where)
        return inputs, None
    targets = None if batch[1] is None else as_targets(batch[1], where)
    if targets is None:
        inputs = as_inputs(batch[0], where)
        checked_size(inputs, where)
        return inputs, None
    given = checked_size(targets, f"{where}, targets")
    inputs = as_inputs(batch[0], where, given)
    size = checked_size(inputs, f"{where}, inputs")
    if size != given:
        raise TaskError(f"{where} has {size} inputs but {given} targets")
    return inputs, targets


def checked_size(tree: Tree, where: str) -> int:
    """Return the number of samples; raise TaskError, naming ``where``, for none or a mismatch."""
    try:
        size = batch_size(tree)
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from None
    if not size:
        raise TaskError(f"{where} is empty")
    return size


def as_inputs(value: Any, where: str, samples: int | None = None) -> Tree:
    """Return inputs as a tree: arrays as tensors, float64 arrays as float32 ones.

    A list of tensors, which is what a DataLoader makes of several inputs, is read as a tuple where
    they agree in the first dimension (with ``samples``, where that is known) and one has a second;
    otherwise as a list with one tensor a sample.
    """
    tree = _as_tree(value, where, single=True)
    if isinstance(tree, list) and tree and all(isinstance(t, Tensor) and t.ndim for t in tree):
        sizes = {len(t) for t in tree}
        if len(sizes) == 1 and any(t.ndim > 1 for t in tree) and samples in (None, *sizes):
            return tree[0] if len(tree) == 1 else tuple(tree)
    return tree


def as_targets(value: Any, where: str) -> Tree:
    """Return targets as a tree; their dtypes stay."""
    return _as_tree(value, where)


def _as_tree(value: Any, where: str, single: bool = False) -> Tree:
    """Return tensors and arrays as detached CPU tensors in a tree of plain containers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return value.tolist()
    if isinstance(value, np.ndarray | np.number):
        return _as_tensor(np.asarray(value), where, single)
    if isinstance(value, list):
        return [_as_item(item, where, single) for item in value]
    if isinstance(value, tuple):
        parts = [_as_tree(part, where, single) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if hasattr(value, "keys") and hasattr(value, "__getitem__"):
        return {key: _as_tree(value[key], where, single) for key in value.keys()}  # noqa: SIM118
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TaskError(f"{where} holds a {type(value).__name__}: expected {EXPECTED}")


def _as_item(value: Any, where: str, single: bool) -> Any:
    """Return one sample of a list: arrays as tensors, anything else as the user gave it."""
    return _as_tree(value, where, single) if isinstance(value, Tensor | np.ndarray) else value


def _as_tensor(array: np.ndarray, where: str, single: bool) -> Tensor:
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if single and array.dtype == np.float64:
        array = array.astype(np.float32)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise TaskError(f"{where} holds an array of {array.dtype}: expected numbers") from None
