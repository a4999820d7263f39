"""Inputs that are on the device already: a batch is copied there once, not for every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autoquant.models.data import to_device
from autoquant.nn.layer_output import version_of

MOST_BYTES = 8 << 30
"""Most bytes of inputs that are kept on a device."""
SHARE = 0.25
"""Most of a device's free memory that they take."""


@dataclass(frozen=True)
class _Staged:
    """One batch as it was given, its copy, and how often either had been written into by then."""

    given: Any
    copy: Any
    versions: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether nobody wrote into it since."""
        return self.versions == _versions(self.given, self.copy)


class Staging:
    """Keeps inputs on a device; on the CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._room: float | None = None
        self._staged: dict[int, _Staged] = {}
        self._refused: dict[int, Any] = {}

    def of(self, inputs: Any) -> Any:
        """Return ``inputs`` on the device."""
        if self.device.type == "cpu":
            return to_device(inputs, self.device)
        known = self._staged.get(id(inputs))
        if known is not None:
            if known.same:
                return known.copy
            self.bytes -= _bytes(self._staged.pop(id(inputs)).copy)
            self._refused[id(inputs)] = inputs  # who writes into it once does it again
        copy = to_device(inputs, self.device)
        if id(inputs) in self._refused:
            return copy
        size = _bytes(copy)
        if self._room is None:
            self._room = min(MOST_BYTES, SHARE * free_bytes(self.device))
        if size and self.bytes + size <= self._room:
            self._staged[id(inputs)] = _Staged(inputs, copy, _versions(inputs, copy))
            self.bytes += size
        return copy

    def clear(self) -> None:
        """Give the memory back, and keep nothing more."""
        self._staged.clear()
        self.bytes, self._room = 0, 0.0


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free where ``device`` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: Any) -> int:
    return sum(t.nbytes for t in _tensors(tree))


def _versions(*trees: Any) -> tuple[int, ...]:
    return tuple(map(version_of, _tensors(trees)))
