"""Memory for kept tensors: used again, because fresh pages can cost more than a layer does.

On a CPU it is taken from the system page by page, beside the allocator: memory that the model's own
tensors have had would have to be replaced by fresh pages when the model runs next.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

import torch
from torch import Tensor

PAGED = 1 << 16
"""Bytes from which a tensor has pages of its own."""
RECENT = 0.2
"""Weight of the newest measurement of what fresh memory costs."""

Form = tuple[torch.device, torch.dtype, int]


class Pool:
    """Flat tensors that are lent, or free to be lent again; ``bytes`` are those of both."""

    def __init__(self) -> None:
        self.bytes = 0
        self._free: dict[Form, list[Tensor]] = {}
        self._seconds_per_byte = 0.0
        self._seconds_per_copied = 0.0

    def effort(self, sources: Sequence[Tensor]) -> float:
        """Return the seconds that it takes to copy ``sources`` and to copy them back, about."""
        pages = sum(s.nbytes for s in sources if s.nbytes >= PAGED)
        return 2 * pages * self._seconds_per_copied

    def cost(self, sources: Sequence[Tensor]) -> float:
        """Return the seconds that fresh memory for copies of ``sources`` will take, about."""
        fresh = sum(s.nbytes for s in sources if s.nbytes >= PAGED and not self._free.get(_form(s)))
        return fresh * self._seconds_per_byte

    def doubt(self) -> None:
        """Believe that fresh memory is a little cheaper: where none is taken, none is measured."""
        self._seconds_per_byte *= 0.99

    def copy(self, source: Tensor, most: int) -> Tensor:
        """Return a copy of a flat tensor; at most ``most`` bytes are held, free ones go first.

        Raises MemoryError or torch.OutOfMemoryError where the system has no more.
        """
        if free := self._free.get(_form(source)):
            start = time.perf_counter()
            found = free.pop().copy_(source)
            if found.nbytes >= PAGED:
                new = (time.perf_counter() - start) / found.nbytes
                self._seconds_per_copied += RECENT * (new - self._seconds_per_copied)
            return found
        self.trim(most - source.nbytes)
        start = time.perf_counter()
        found = _fresh(source).copy_(source)
        self.bytes += found.nbytes
        if found.nbytes >= PAGED:
            new = (time.perf_counter() - start) / found.nbytes
            self._seconds_per_byte += RECENT * (new - self._seconds_per_byte)
        return found

    def put(self, tensor: Tensor) -> None:
        """Take back what was lent."""
        self._free.setdefault(_form(tensor), []).append(tensor)

    def trim(self, most: int) -> None:
        """Give free memory back to the system until at most ``most`` bytes are held."""
        while self.bytes > most and self._free:
            form = next(iter(self._free))
            free = self._free.pop(form)
            while free and self.bytes > most:
                self.bytes -= free.pop().nbytes
            if free:
                self._free[form] = free


def _form(tensor: Tensor) -> Form:
    return tensor.device, tensor.dtype, tensor.numel()


def _fresh(source: Tensor) -> Tensor:
    # Made for inference only, it could not be written into again outside of that mode.
    with torch.inference_mode(False):
        if source.device.type != "cpu" or source.nbytes < PAGED:
            return torch.empty_like(source)
        try:
            pages = mmap.mmap(-1, source.nbytes)
        except OSError as error:
            raise MemoryError(str(error)) from error
        return torch.frombuffer(pages, dtype=source.dtype, count=source.numel())
