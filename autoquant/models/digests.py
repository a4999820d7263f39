"""Digests of data: of a part, of each sample, and quick ones that tell one batch from another."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoquant.models.trees import Tree, batch_size, sample

if TYPE_CHECKING:
    from autoquant.models.data import Splits

PARTS = ("calibrate", "search", "confirm")
"""The parts of a task's data."""
GLIMPSE = 1 << 16
"""Most elements of a tensor that ``glimpse`` looks at."""


def digests(splits: Splits) -> dict[str, str]:
    """Return a digest of each part that there is: inputs and targets, in their order."""
    found = {}
    for part in PARTS:
        batches = getattr(splits, part)
        if batches:
            state = hashlib.blake2b(digest_size=16)
            for batch in batches:
                _feed(state, batch)
            found[part] = state.hexdigest()
    return found


def sample_digests(batches: Iterable[Tree]) -> Iterator[bytes]:
    """Yield a digest of each sample's inputs: types, shapes and every bit."""
    for inputs in batches:
        for i in range(batch_size(inputs)):
            state = hashlib.blake2b(digest_size=16)
            _feed(state, sample(inputs, i))
            yield state.digest()


def glimpse(batch: Tree) -> bytes:
    """Return a digest of a batch that looks at some elements of each tensor, evenly spread."""
    state = hashlib.blake2b(digest_size=16)
    _feed(state, batch, GLIMPSE)
    return state.digest()


def _feed(state: Any, value: Any, most: int | None = None) -> None:
    """Add ``value`` to a hash: type, shape and every bit, or ``most`` elements of a tensor."""
    if isinstance(value, Tensor):
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.reshape(-1)
        if most is not None and len(flat) > most:
            flat = flat[:: -(-len(flat) // most)]
        state.update(flat.contiguous().view(torch.uint8).numpy())
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        state.update(f"{type(value).__name__}{len(value)}".encode())
        for key, part in items:
            state.update(f"{key!r}:".encode())
            _feed(state, part, most)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        state.update(f"{type(value).__name__}{value!r};".encode())
    else:  # a sample of the user's own type, whose text may be no more than its address
        state.update(type(value).__name__.encode())
        with contextlib.suppress(Exception):
            state.update(pickle.dumps(value))
