"""What a call was given and what it returned: whether that can be returned again, and how.

A value may be returned again where it is made of tensors and constants, in tuples, lists, dicts
and whatever else ``torch.utils._pytree`` knows. Copies are kept and copies are handed out: what
later code writes into them reaches nobody else. A copy has the strides of the original, and shares
memory with its siblings as the originals do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.kernels.operation import Reader
from autoquant.nn.layer_output import After, Compute, LayerOutput, as_real, version_of

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
PLAIN = (Tensor, nn.Parameter)
KNOWN = (*PLAIN, LayerOutput)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def checksum(tensor: Tensor) -> int:
    """Return a number that changes, all but surely, with the content of a tensor."""
    if isinstance(tensor, LayerOutput) and tensor.held is not None and not tensor.written:
        tensor = tensor.held  # nobody is to notice that it was looked at
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
        (tuple(leaf.shape), checksum(leaf)) if type(leaf) in KNOWN and is_plain(leaf) else leaf
        for leaf in pytree.tree_leaves(outputs)
        if type(leaf) in KNOWN or isinstance(leaf, CONSTANTS)
    ]


class Inputs:
    """The arguments of one call; ``known`` says that their changes would be noticed.

    With ``watch`` their content is compared too, which finds what torch does not count.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: bool = False) -> None:
        self._given = (args, kwargs)
        # Most calls have a tensor or two: those need no walk through what they may hold.
        flat = not kwargs and all(type(x) in KNOWN for x in args)
        self.leaves = list(args) if flat else pytree.tree_leaves(self._given)
        self.tensors = [leaf for leaf in self.leaves if type(leaf) in KNOWN]
        self.known = all(type(x) in KNOWN or isinstance(x, CONSTANTS) for x in self.leaves)
        self.known = self.known and all(map(is_plain, self.tensors))
        self._versions = [version_of(t) for t in self.tensors]
        self._sums = [checksum(t) for t in self.tensors] if watch and self.known else None

    def changed(self) -> bool:
        """Return whether the call wrote into a tensor or altered a container."""
        leaves = pytree.tree_leaves(self._given)
        if len(leaves) != len(self.leaves):
            return True
        if any(a is not b for a, b in zip(leaves, self.leaves, strict=True)):
            return True
        if self._versions != [version_of(t) for t in self.tensors]:
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
class _View:
    """Stands for a tensor that was returned: where it lies in which of the kept memories."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Ahead:
    """Stands for a LayerOutput: where what it holds and its source lie, and what else makes it."""

    held: _View
    source: _View
    reader: Reader | None
    compute: Compute
    stride: tuple[int, ...]
    ahead: After
    done: After


@dataclass(frozen=True)
class Outputs:
    """What one call returned: ``leaves`` and ``memories``, flat tensors that nobody else has."""

    leaves: tuple[Any, ...]
    spec: Any
    memories: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """The bytes of the memories."""
        return sum(m.nbytes for m in self.memories)

    def kept(self, copy: Callable[[Tensor], Tensor]) -> Outputs:
        """Return the same with copies of the memories."""
        return replace(self, memories=tuple(copy(m) for m in self.memories))

    def give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a copy of the value, for a call with these arguments."""
        given: list[Any] = []
        if any(type(leaf) is _Given for leaf in self.leaves):
            given = pytree.tree_leaves((args, kwargs))
        copies = [m.clone() for m in self.memories]
        made: dict[int, Tensor] = {}  # one tensor returned twice is one tensor again

        def tensor(view: _View) -> Tensor:
            return copies[view.memory].as_strided(view.size, view.stride, view.offset)

        leaves = []
        for leaf in self.leaves:
            if type(leaf) is _Given:
                leaf = given[leaf.index]
            elif type(leaf) in (_View, _Ahead) and id(leaf) in made:
                leaf = made[id(leaf)]
            elif type(leaf) is _View:
                leaf = made.setdefault(id(leaf), tensor(leaf))
            elif type(leaf) is _Ahead:
                held, source = tensor(leaf.held), tensor(leaf.source)
                known = (leaf.reader, leaf.compute, leaf.stride, leaf.ahead, leaf.done)
                leaf = made.setdefault(id(leaf), LayerOutput.of(held, source, *known))
            leaves.append(leaf)
        return leaves[0] if self.spec is None else pytree.tree_unflatten(leaves, self.spec)


def pack(result: Any, inputs: Inputs) -> Outputs | None:
    """Return what a call returned, its memories not copied yet; None where it can't be kept.

    It can't where it holds anything but tensors and constants, or a view of an argument's memory:
    writing into that would have to reach the argument of another call.
    """
    if type(result) in KNOWN:
        found, spec = [result], None
    else:
        found, spec = pytree.tree_flatten(result)
    places = {id(t): i for i, t in enumerate(inputs.leaves) if isinstance(t, Tensor)}
    ahead = {id(t): t for t in found if type(t) is LayerOutput and id(t) not in places}
    if any(t.written or t.held is None for t in ahead.values()):
        return None
    parts = [part for t in ahead.values() for part in (t.held, t.source)]
    fixed = (*CONSTANTS, LayerOutput)
    tensors = {id(t): t for t in (*found, *parts) if not isinstance(t, fixed)}
    if not all(type(t) in PLAIN and is_plain(t) and t.grad_fn is None for t in tensors.values()):
        return None
    owned = (as_real(t) for t in inputs.tensors if type(t) in PLAIN or t.seen)
    lent = {storage_of(t) for t in owned} - {0}
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors.values():
        if id(t) in places:
            continue
        if t.is_conj() or t.is_neg() or storage_of(t) in lent:
            return None
        groups.setdefault(storage_of(t) or id(t), []).append(t)
    memories: list[Tensor] = []
    views: dict[int, Any] = {i: _Given(place) for i, place in places.items()}
    for group in groups.values():
        if len({t.dtype for t in group}) > 1:
            return None
        start = min(t.storage_offset() for t in group)
        stop = max(t.storage_offset() + _extent(t) for t in group)
        for t in group:
            at = t.storage_offset() - start
            views[id(t)] = _View(len(memories), tuple(t.shape), tuple(t.stride()), int(at))
        memories.append(group[0].detach().as_strided((stop - start,), (1,), start))
    for i, t in ahead.items():
        lie = views[id(t.held)], views[id(t.source)]
        views[i] = _Ahead(*lie, t.reader, t.compute, t.stride(), t.ahead, t.done)
    leaves = tuple(views[id(x)] if isinstance(x, Tensor) else x for x in found)
    return Outputs(leaves, spec, tuple(memories))


def _extent(tensor: Tensor) -> int:
    """Return how many elements of memory lie between a tensor's first and last, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
