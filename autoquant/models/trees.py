"""Batches as trees: a tensor, or tuples and dicts of tensors, or a list with one item per sample.

In a tuple or dict every entry is one argument and holds all samples (first dimension, or a list);
None, numbers, strings and 0-d tensors in it are constants that belong to the whole batch. A list
is never an argument list: its items are the samples (strings, phonemes, ragged tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoquant.errors import TaskError

Tree = Any
"""A batch; see the module's docstring."""

CONSTANTS = (type(None), bool, int, float, str)
"""Types that, inside a tuple or a dict, belong to the whole batch."""


def batch_size(tree: Tree) -> int:
    """Return the number of samples; raise TaskError where parts differ or none has samples."""
    sizes = _sizes(tree, "")
    if not sizes:
        raise TaskError(f"a {type(tree).__name__} is no batch: expected {EXPECTED}")
    first = next(iter(sizes.values()))
    if any(size != first for size in sizes.values()):
        parts = ", ".join(f"{path or 'batch'}: {size}" for path, size in sizes.items())
        raise TaskError(f"parts of one batch differ in their number of samples ({parts})")
    return first


EXPECTED = "a tensor, a tuple or dict of tensors, or a list with one item per sample"


def _sizes(tree: Tree, path: str) -> dict[str, int]:
    """Return the number of samples of every part that has any, by its path."""
    if isinstance(tree, Tensor):
        return {path: len(tree)} if tree.ndim else {}
    if isinstance(tree, list):
        return {path: len(tree)}
    sizes: dict[str, int] = {}
    for key, part in _entries(tree, path):
        sizes |= _sizes(part, f"{path}[{key!r}]")
    return sizes


def _entries(tree: Tree, path: str) -> list[tuple[Any, Tree]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple):
        return list(enumerate(tree))
    if isinstance(tree, CONSTANTS):
        return []
    raise TaskError(f"{path or 'a batch'} is a {type(tree).__name__}: expected {EXPECTED}")


def take(tree: Tree, indices: Sequence[int] | np.ndarray) -> Tree:
    """Return the samples ``indices`` (repeats allowed), in that order, as a tree like ``tree``."""
    index = np.asarray(indices, dtype=np.int64)
    return _rebuild(
        tree,
        lambda tensor: tensor[torch.from_numpy(index).to(tensor.device)] if tensor.ndim else tensor,
        lambda items: [items[i] for i in index.tolist()],
    )


def sample(tree: Tree, i: int) -> Tree:
    """Return one sample as a tree like ``tree``, whose tensors are views: to be read, not kept."""
    return _rebuild(
        tree,
        lambda tensor: tensor[i : i + 1] if tensor.ndim else tensor,
        lambda items: [items[i]],
    )


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """Return ``tree`` with every tensor, also those inside lists, on ``device``."""

    def item(value: Any) -> Any:
        return (
            to_device(value, device) if isinstance(value, Tensor | list | tuple | dict) else value
        )

    return _rebuild(
        tree, lambda tensor: tensor.to(device), lambda items: [item(value) for value in items]
    )


def _rebuild(
    tree: Tree, tensor: Callable[[Tensor], Tensor], items: Callable[[list[Any]], list[Any]]
) -> Tree:
    """Return a tree of the same form with each tensor and each list of samples replaced."""
    if isinstance(tree, Tensor):
        return tensor(tree)
    if isinstance(tree, list):
        return items(tree)
    if isinstance(tree, Mapping):
        return {key: _rebuild(part, tensor, items) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return _like(tree, [_rebuild(part, tensor, items) for part in tree])
    return tree


def _like(tree: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """Return ``parts`` as a tuple of the same type: a named tuple stays one."""
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def concat(trees: Sequence[Tree]) -> Tree | None:
    """Return the samples of all ``trees`` as one tree, or None where their forms do not fit.

    Tensors must agree in dtype, device and all dimensions but the first; constants must be equal.
    """
    try:
        return _concat(trees)
    except _Misfit:
        return None


class _Misfit(Exception):
    """Two batches can not become one."""


def _concat(trees: Sequence[Tree]) -> Tree:
    first = trees[0]
    if any(type(tree) is not type(first) for tree in trees):
        raise _Misfit
    if isinstance(first, Tensor):
        if any((t.shape[1:], t.dtype, t.device) != (first.shape[1:], first.dtype, first.device)
               or t.ndim != first.ndim for t in trees):  # fmt: skip
            raise _Misfit
        if first.ndim:
            return torch.cat(list(trees))
        if any(not torch.equal(t, first) for t in trees):
            raise _Misfit
        return first
    if isinstance(first, list):
        return [item for tree in trees for item in tree]
    if isinstance(first, Mapping):
        if any(tree.keys() != first.keys() for tree in trees):
            raise _Misfit
        return {key: _concat([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple):
        if any(len(tree) != len(first) for tree in trees):
            raise _Misfit
        return _like(first, [_concat(parts) for parts in zip(*trees, strict=True)])
    if any(tree != first for tree in trees):
        raise _Misfit
    return first
