"""The arguments and results of a call that is recorded: tensors on a device, and constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autoquant.measure.outputs import CONSTANTS, KNOWN, is_plain
from autoquant.nn.forms import same_memory
from autoquant.nn.layer_output import as_real, version_of

MOST_LENGTHS = 4096
"""Most numbers of a tensor on the CPU that are taken for constants."""


@dataclass(frozen=True)
class Given:
    """What a call is given. ``shape`` is all of it but the numbers in its ``tensors``."""

    leaves: tuple[Any, ...]
    spec: Any
    tensors: list[Tensor]
    shape: object
    versions: tuple[int, ...]

    def changed(self) -> bool:
        """Return whether the call wrote into a tensor of its arguments."""
        return self.versions != tuple(map(version_of, self.tensors))

    def fixed(self) -> list[Tensor]:
        """Return copies of the tensors that lie in memory as they do."""
        return [same_memory(t).copy_(t) for t in self.tensors]

    def rebuilt(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors."""
        args, kwargs = pytree.tree_unflatten(_filled(self.leaves, tensors), self.spec)
        return args, kwargs


@dataclass(frozen=True)
class Returned:
    """What a call returned."""

    leaves: tuple[Any, ...]
    spec: Any
    tensors: list[Tensor]

    def rebuilt(self, tensors: list[Tensor]) -> Any:
        """Return it with other tensors."""
        return pytree.tree_unflatten(_filled(self.leaves, tensors), self.spec)


class _Place:
    """Stands for a tensor, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True, eq=False)
class _Lengths:
    """Stands for integers that the host knows, such as those of a packed sequence: a constant."""

    tensor: Tensor
    numbers: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> _Lengths:
        return _Lengths(tensor.clone(), (*tensor.shape, *tensor.flatten().tolist()))


def _is_lengths(leaf: Any, device: torch.device) -> bool:
    """Return whether a tensor is on the CPU where the model is not: its numbers make the program.

    Kernels can't read it, and what it decides (shapes, steps) was decided when it was recorded.
    """
    if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or device.type == "cpu":
        return False
    return leaf.numel() <= MOST_LENGTHS and leaf.dtype in (torch.int64, torch.int32, torch.bool)


def _filled(leaves: tuple[Any, ...], tensors: list[Tensor]) -> list[Any]:
    return [tensors[x.number] if isinstance(x, _Place) else getattr(x, "tensor", x) for x in leaves]


def _taken(leaves: list[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return the leaves with tensors taken out, each once, and the tensors."""
    tensors: list[Tensor] = []
    places: dict[int, _Place] = {}
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) not in places:
                places[id(leaf)] = _Place(len(tensors))
                tensors.append(leaf)
            leaf = places[id(leaf)]
        found.append(leaf)
    return tuple(found), tensors


def given(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Given | str:
    """Return what a call is given; or why it can't be recorded, to follow its name."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    problem = _problem(leaves, "is given")
    if problem is not None:
        return problem
    leaves = [_own(as_real(leaf)) for leaf in leaves]
    leaves = [_Lengths.of(leaf) if _is_lengths(leaf, device) else leaf for leaf in leaves]
    kept, tensors = _taken(leaves)
    elsewhere = [t for t in tensors if t.device != device]
    if elsewhere:
        return f"is given a tensor on {elsewhere[0].device}"
    memories = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    if len(set(memories)) < len(memories):
        return "is given two tensors of one memory"
    constants = tuple(
        x.number if isinstance(x, _Place) else (type(x), getattr(x, "numbers", x)) for x in kept
    )
    forms = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
    versions = tuple(map(version_of, tensors))
    return Given(kept, spec, tensors, (constants, forms, spec), versions)


def _own(leaf: Any) -> Any:
    """Return a tensor whose numbers lie apart, so that others can be written in their place."""
    if isinstance(leaf, Tensor) and any(
        step == 0 and size > 1 for size, step in zip(leaf.shape, leaf.stride(), strict=True)
    ):
        return leaf.contiguous()
    return leaf


def returned(result: Any) -> Returned | str:
    """Return what a call gave; or why it can't be recorded, to follow its name."""
    leaves, spec = pytree.tree_flatten(result)
    problem = _problem(leaves, "returns")
    if problem is not None:
        return problem
    kept, tensors = _taken(leaves)
    return Returned(kept, spec, tensors)


def _problem(leaves: list[Any], does: str) -> str | None:
    """Return why leaves can't be recorded, None where they can."""
    for leaf in leaves:
        if type(leaf) in KNOWN:
            if not is_plain(leaf):
                return f"{does} a tensor that is not dense"
        elif not isinstance(leaf, CONSTANTS):
            return f"{does} a {type(leaf).__name__}"
    return None
