"""What a call was given and what it returned: whether that can be returned again, and how.

A returned value may be handed out again where it is made of tensors and constants, in tuples,
lists, dicts and whatever else ``torch.utils._pytree`` knows, and where nobody has written into it
since. Outputs that later code writes into are kept as copies, and copies are handed out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
PLAIN = (Tensor, nn.Parameter)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written into, −1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> int:
    """Return a number that changes, all but surely, with the content of a tensor."""
    words = as_words(tensor)
    return int(words.sum(dtype=torch.int64)) * 3 + int(words[1::2].sum(dtype=torch.int64))


def as_words(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as a vector of integers, in which NaN equals NaN."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().flatten().view(_WORDS[tensor.element_size()])


def fingerprint(outputs: Any) -> list[Any]:
    """Return shapes and checksums of the tensors in ``outputs``, and its numbers and strings."""
    return [
        (tuple(leaf.shape), checksum(leaf)) if type(leaf) in PLAIN and is_plain(leaf) else leaf
        for leaf in pytree.tree_leaves(outputs)
        if type(leaf) in PLAIN or isinstance(leaf, CONSTANTS)
    ]


class Inputs:
    """The arguments of one call; ``known`` says that their changes would be noticed.

    With ``watch`` their content is compared too, which finds what torch does not count.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: bool = False) -> None:
        self._given = (args, kwargs)
        self.leaves = pytree.tree_leaves(self._given)
        self.tensors = [leaf for leaf in self.leaves if type(leaf) in PLAIN]
        self.known = all(type(x) in PLAIN or isinstance(x, CONSTANTS) for x in self.leaves)
        self.known = self.known and all(map(is_plain, self.tensors))
        self._versions = [version(t) for t in self.tensors]
        self._sums = [checksum(t) for t in self.tensors] if watch and self.known else None

    def changed(self) -> bool:
        """Return whether the call wrote into a tensor or altered a container."""
        leaves = pytree.tree_leaves(self._given)
        if len(leaves) != len(self.leaves):
            return True
        if any(a is not b for a, b in zip(leaves, self.leaves, strict=True)):
            return True
        if self._versions != [version(t) for t in self.tensors]:
            return True
        return self._sums is not None and self._sums != [checksum(t) for t in self.tensors]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's memory can be named, and has content."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


@dataclass(frozen=True)
class _Given:
    """Stands for a tensor that a call returned as it was given, by its place in the arguments."""

    index: int


@dataclass(frozen=True)
class Outputs:
    """What one call returned. ``storages`` maps the memory it holds to bytes.

    ``private`` outputs are copies that nobody else has.
    """

    leaves: tuple[Any, ...]
    spec: Any
    private: bool
    versions: tuple[int, ...]
    storages: Mapping[int, int]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are kept."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def intact(self) -> bool:
        """Return whether nobody has written into the tensors since they were kept."""
        return self.private or self.versions == tuple(version(t) for t in self.tensors)

    def give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value again, for a call with these arguments."""
        if self.spec is None and not self.private:
            return self.leaves[0]
        given: list[Any] = []
        if any(type(leaf) is _Given for leaf in self.leaves):
            given = pytree.tree_leaves((args, kwargs))
        copies: dict[int, Tensor] = {}
        leaves = []
        for leaf in self.leaves:
            if type(leaf) is _Given:
                leaf = given[leaf.index]
            elif self.private and isinstance(leaf, Tensor):
                leaf = copies.setdefault(id(leaf), leaf.clone())
            leaves.append(leaf)
        return leaves[0] if self.spec is None else pytree.tree_unflatten(leaves, self.spec)


def pack(result: Any, inputs: Inputs, *, private: bool) -> Outputs | None:
    """Return what a call returned so that it can be given again, None where it can't.

    It can't where it holds anything but tensors and constants, or a view of an argument's memory:
    writing into that would have to reach the argument of another call.
    """
    if type(result) in PLAIN:
        found, spec = [result], None
    else:
        found, spec = pytree.tree_flatten(result)
    tensors = [leaf for leaf in found if not isinstance(leaf, CONSTANTS)]
    if not all(type(t) in PLAIN and is_plain(t) and t.grad_fn is None for t in tensors):
        return None
    private = private or any(t.is_inference() for t in tensors)
    places = {id(t): i for i, t in enumerate(inputs.leaves) if isinstance(t, Tensor)}
    lent = {storage_of(t) for t in inputs.tensors} - {0}
    leaves: list[Any] = []
    copies: dict[int, Tensor] = {}
    for leaf in found:
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
        elif id(leaf) in places:
            leaves.append(_Given(places[id(leaf)]))
        elif storage_of(leaf) in lent:
            return None
        elif private and id(leaf) not in copies:
            leaves.append(copies.setdefault(id(leaf), leaf.detach().clone()))
            if leaves[-1].stride() != leaf.stride():
                return None  # kernels may add up in another order
        else:
            leaves.append(copies.get(id(leaf), leaf))
    originals = {id(t): t for t in tensors if id(t) in copies}.values()
    if private and len({storage_of(t) for t in originals}) < len(originals):
        return None  # writing into one of them is seen in another
    return Outputs(tuple(leaves), spec, private, *_measure(leaves))


def _measure(leaves: Sequence[Any]) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the versions of the tensors, and the bytes of each distinct memory they hold."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    storages = {storage_of(t): t.untyped_storage().nbytes() for t in tensors}
    return tuple(version(t) for t in tensors), storages
