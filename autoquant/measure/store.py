"""Results kept within a number of bytes: what is worth least for its bytes goes out first.

The worth of a result is the time that it saves times the chance that it will be asked for, both
given by whoever keeps it; it halves with every HALF_LIFE evaluations in which nobody asked. All
worths shrink at the same rate, so their order stays as it is and a heap can hold it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoquant.measure.outputs import Outputs
from autoquant.measure.pool import Pool

HALF_LIFE = 8
"""Evaluations after which a result that nobody asked for is worth half."""
ADVANTAGE = 0.3
"""Powers of two by which a newcomer must be worth more: equals that push each other out, batch
after batch, would all be gone when they are asked for."""
REPAID = 1
"""Uses within which a result must save the time that fresh memory for it takes."""
OVERHEAD = 1024
"""Bytes that a kept result takes beside its tensors, about."""

Point = tuple[bytes, int]
"""A call: all that was computed before it, and how far it had come."""
Key = tuple[Point, tuple[int, ...], tuple[int, ...]]
"""A call, the sites that were first used in it, and what they were switched to."""


@dataclass(eq=False)
class Kept:
    """One result. ``worth`` is seconds times chance, ``exit`` the history after the call.

    ``seconds`` is what the call took.
    """

    key: Key
    outputs: Outputs
    exit: bytes
    seconds: float
    worth: float
    round: int = 0
    score: float = 0.0

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites first used in the call."""
        return self.key[1]

    @property
    def bytes(self) -> int:
        """The bytes that the result takes."""
        return OVERHEAD + self.outputs.bytes


class Store:
    """Results of calls, never more than ``budget`` bytes, memory to be used again included."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.round = 0
        self._pool = Pool()
        self._used = 0  # by entries; the pool may hold more, which is free
        self._entries: dict[Key, Kept] = {}
        self._ways: dict[Point, dict[tuple[int, ...], int]] = {}
        self._heap: list[tuple[float, int, Kept]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Kept]:
        return iter(list(self._entries.values()))

    @property
    def bytes(self) -> int:
        """The bytes that are held."""
        return self._pool.bytes + OVERHEAD * len(self._entries)

    def find(self, point: Point, current: Sequence[int]) -> Kept | None:
        """Return the result of a call under the ``current`` choice of every site, if it is kept."""
        for sites in self._ways.get(point, ()):
            kept = self._entries.get((point, sites, tuple([current[i] for i in sites])))
            if kept is not None:
                return kept
        return None

    def get(self, key: Key) -> Kept | None:
        """Return what is kept under a key."""
        return self._entries.get(key)

    def touch(self, kept: Kept) -> None:
        """Note that a result was asked for."""
        if kept.round != self.round and self._entries.get(kept.key) is kept:
            self._rank(kept)

    def add(self, kept: Kept) -> bool:
        """Keep a copy of a result, in place of what is worth less; return whether there was room.

        Raises MemoryError or torch.OutOfMemoryError where the system has no more.
        """
        if kept.key in self._entries:
            self.drop(self._entries[kept.key])
        kept.round = self.round
        kept.score = _score(kept)
        if self._pool.cost(kept.outputs.memories) > REPAID * kept.worth:
            self._pool.doubt()
            return False
        if self._pool.effort(kept.outputs.memories) > kept.worth:
            return False
        victims = self._victims(kept)
        if victims is None:
            return False
        for victim in victims:
            self.drop(victim)
        most = self.budget - OVERHEAD * (len(self._entries) + 1)
        self._pool.trim(most)
        kept.outputs = kept.outputs.kept(lambda memory: self._pool.copy(memory, most))
        self._used += kept.bytes
        self._entries[kept.key] = kept
        ways = self._ways.setdefault(kept.key[0], {})
        ways[kept.sites] = ways.get(kept.sites, 0) + 1
        self._rank(kept)
        return True

    def drop(self, kept: Kept) -> None:
        """Forget one result, if it is still there."""
        if self._entries.get(kept.key) is not kept:
            return
        del self._entries[kept.key]
        point = kept.key[0]
        ways = self._ways[point]
        ways[kept.sites] -= 1
        if not ways[kept.sites]:
            del ways[kept.sites]
        if not ways:
            del self._ways[point]
        self._used -= kept.bytes
        for memory in kept.outputs.memories:
            self._pool.put(memory)

    def clear(self) -> None:
        """Forget all results."""
        self._used = 0
        self._pool = Pool()
        self._entries.clear()
        self._ways.clear()
        self._heap.clear()

    def _rank(self, kept: Kept) -> None:
        kept.round = self.round
        kept.score = _score(kept)
        self._pushed += 1
        heapq.heappush(self._heap, (kept.score, self._pushed, kept))
        if len(self._heap) > 4 * len(self._entries) + 64:
            self._heap = [(k.score, i, k) for i, k in enumerate(self._entries.values())]
            self._pushed = len(self._heap)
            heapq.heapify(self._heap)

    def _victims(self, kept: Kept) -> list[Kept] | None:
        """Return what must go for ``kept``, None where it is not worth that."""
        if kept.bytes > self.budget:
            return None
        room = self.budget - self._used - kept.bytes
        victims: list[Kept] = []
        popped = []
        while room < 0 and self._heap:
            item = heapq.heappop(self._heap)
            score, _, victim = item
            if self._entries.get(victim.key) is not victim or victim.score != score:
                continue  # forgotten, or ranked anew
            popped.append(item)
            if score + ADVANTAGE > kept.score:
                break
            victims.append(victim)
            room += victim.bytes
        if room < 0:
            for item in popped:
                heapq.heappush(self._heap, item)
            return None
        return victims


def _score(kept: Kept) -> float:
    """Return the logarithm of worth for each byte, as it will be when all have aged alike."""
    return math.log2(max(kept.worth, 1e-12) / kept.bytes) + kept.round / HALF_LIFE
