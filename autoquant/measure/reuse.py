"""Never the same work twice: results of layers and blocks, used again where they must be the same.

A model in evaluation is a function of its batch and of the choices at its sites. While it runs on
one batch, the history of the run is written down: which module was called, and which site was used
for the first time with which choice. Two runs with the same history so far have computed the same
so far, bit for bit, whatever control flow the model's code has. So a call with a known history
whose sites have the choices that they had then returns what it returned then.

What this rests on is checked on the model before it is used (``reuse_check``): no state is kept
between calls, nothing is drawn at random. Modules that write into their arguments always run.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autoquant.measure.account import Account
from autoquant.measure.calls import Call, Told, Watched, find_calls
from autoquant.measure.outputs import Inputs, as_words, fingerprint, pack
from autoquant.measure.pool import PAGED
from autoquant.measure.store import Kept, Key, Point, Store
from autoquant.nn.convert import Prepared
from autoquant.spec.recipe import SiteRecipe


@dataclass(frozen=True)
class ReuseStatistics:
    """What reuse did: calls answered and calls run, and what it holds.

    ``seconds_saved`` is the time that the answered calls took when they were run.
    """

    hits: int
    misses: int
    seconds_saved: float
    bytes: int
    budget_bytes: int


class Reuse:
    """Hands out results again while ``with reuse.batch(key):`` is around a run of the model.

    ``say`` is told in one line when something shows that this model can't have it.
    """

    def __init__(
        self, prepared: Prepared, budget_bytes: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.model: nn.Module = prepared.model
        self._engine = prepared.engine
        self._folds = prepared.folds
        self.store = Store(budget_bytes)
        self.on = budget_bytes > 0
        self.say = say
        self.watching = False  # compare arguments by content, not only by what torch counts
        self.repeating = False  # make each outermost call twice, which must not matter
        self._paused = False
        self._calls = find_calls(prepared)
        self._slots = list(prepared.slots.values())
        self._told = [Told(self._use, i) for i in range(len(self._slots))]
        reached = {site.name for site in prepared.sites}
        self._sites = frozenset(i for i, name in enumerate(prepared.slots) if name in reached)
        self._weights = Watched(prepared.model)
        self._ids: dict[tuple[int, SiteRecipe], int] = {}
        self._fresh = 0
        self._seen: set[Hashable] = set()
        self._hits = self._misses = 0
        self._saved = 0.0
        self._account = Account()
        self._current: list[int] = []
        self._by_content = False
        self._depth = self._thread = 0

    def statistics(self) -> ReuseStatistics:
        """Return what was done so far."""
        store = self.store
        return ReuseStatistics(self._hits, self._misses, self._saved, store.bytes, store.budget)

    def switch_off(self, reason: str) -> None:
        """Use nothing again from here on, and say why."""
        if self.on:
            self.on = False
            self.store.clear()
            self.say(f"layer outputs are not reused: {reason}")

    def shrink(self) -> None:
        """Give memory back: forget everything, and keep half as much from here on."""
        self.store.clear()
        self.store.budget //= 2

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run what is inside without reuse."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextlib.contextmanager
    def batch(self, key: Hashable, *, by_content: bool = False) -> Iterator[None]:
        """Reuse results in the run of the model inside; ``key`` names the data it runs on.

        With ``by_content`` the data are the arguments of each outermost call, known by their
        bits: for code that fetches its own data.
        """
        if not self.on or self._paused:
            yield
            return
        # The reference and the backends are two ways to compute: neither answers for the other.
        self._begin((key, self._engine.fast), by_content)
        # A result that is given again is not what its layer made just now.
        self._folds.trust(True)
        try:
            yield
        finally:
            self._folds.trust(False)
            for call in self._calls:
                call.remove()
            for slot in self._slots:
                slot.used = None
            if self._weights.changed():
                self.switch_off("the model's weights or buffers change while it runs")

    def _begin(self, key: Hashable, by_content: bool) -> None:
        if key in self._seen:  # the next evaluation
            self._seen.clear()
            self.store.round += 1
        self._seen.add(key)
        if self._weights.changed():
            self.store.clear()
        self._current = [self._id(i, slot.choice) for i, slot in enumerate(self._slots)]
        self._by_content = by_content
        self._thread = threading.get_ident()
        self._depth = 0
        self._reset(repr(key).encode())
        for call in self._calls:
            call.install(self._call)

    def _id(self, slot: int, choice: SiteRecipe | None) -> int:
        """Return the number of a choice at a site, a new one for a choice without a name."""
        known = None if choice is None else self._ids.get((slot, choice))
        if known is None:
            self._fresh += 1
            known = self._fresh
            if choice is not None:
                self._ids[slot, choice] = known
        return known

    # --- the history of a run ----------------------------------------------------------------

    def _reset(self, start: bytes) -> None:
        self._history = hashlib.blake2b(start, digest_size=16).digest()
        self._order: list[int] = []
        self._used: set[int] = set()
        self._left = len(self._sites)
        self._room = self._sites
        self._part_of: Call | None = None
        for slot, told in zip(self._slots, self._told, strict=True):
            slot.used = told

    def _advance(self, event: bytes) -> None:
        self._history = hashlib.blake2b(self._history + event, digest_size=16).digest()

    def _use(self, site: int) -> None:
        self._slots[site].used = None  # what is used again tells nothing new
        self._used.add(site)
        self._left = len(self._sites - self._used)
        self._order.append(site)
        self._advance(b"site" + self._current[site].to_bytes(8, "little"))

    # --- calls ---------------------------------------------------------------------------------

    def _call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            self.switch_off("the model runs in several threads")
        if not self.on:
            return call.original(*args, **kwargs)
        if self._by_content and not self._depth:
            if self.repeating and not self._repeats(call, args, kwargs):
                self.switch_off("a call of the model depends on the calls before it")
                return call.original(*args, **kwargs)
            self._reset(_digest(args, kwargs, self._fresh))
            self._fresh += 1
        if not self._left:
            # Whatever comes now depends on every site: only the same candidate could use it.
            return call.original(*args, **kwargs)
        part, self._part_of = self._part_of is call, None
        self._advance(call.event)
        self._depth += 1
        if self._depth == 1:
            self._account.begin()
        try:
            if call.opaque or call.module.training or _differentiates_or_casts():
                return call.original(*args, **kwargs)
            if call.sequence and len(args) == 1 and not kwargs:
                return self._sequence(call, args, part)
            return self._whole(call, args, kwargs, part)
        finally:
            self._depth -= 1
            if not self._depth:
                self._account.end()

    def _repeats(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call gives the same twice: only then do its arguments say all."""
        self._depth, self._left = 1, 0
        try:
            first = fingerprint(call.original(*args, **kwargs))
            return first == fingerprint(call.original(*args, **kwargs))
        finally:
            self._depth = 0

    def _whole(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], part: bool) -> Any:
        point = (self._history, -1)
        kept = None if part else self._find(point)
        if kept is not None:
            return self._give(kept, args, kwargs)
        inputs = Inputs(args, kwargs, self.watching)
        first, start = len(self._order), self._clock()
        room, self._room = self._room, call.inside
        try:
            result = call.original(*args, **kwargs)
        finally:
            self._room = room
        seconds = self._clock() - start
        self._misses += 1
        if not inputs.known or inputs.changed():
            call.opaque = True
        elif not part:
            self._keep(point, first, result, inputs, seconds, seconds)
        return result

    def _sequence(self, call: Call, args: tuple[Any, ...], part: bool) -> Any:
        """Run an ``nn.Sequential`` from the last of its children whose result is known."""
        history, last = self._history, len(call.children) - 1
        inputs = Inputs(args, {}, self.watching)
        first, start = len(self._order), self._clock()
        x, begin, before = args[0], 0, 0.0
        for k in reversed(call.stops):
            kept = None if part and k == last else self._find((history, k))
            if kept is not None:
                x, begin, before = self._give(kept, args, {}), k + 1, kept.seconds
                break
        if begin > last:
            return x
        self._misses += 1
        mine: list[Key] = []
        room, self._room = self._room, call.inside
        try:
            for k, child in list(enumerate(call.module.children()))[begin:]:
                self._part_of = call.children[k]
                x = child(x)
                if k not in call.stops or (part and k == last) or inputs.changed():
                    continue
                seconds = self._clock() - start
                self._room = room if k == last else call.inside
                point = (history, k)
                made = self._keep(point, first, x, inputs, seconds, seconds - before)
                self._room = call.inside
                if made is not None:
                    mine.append(made.key)
                    before = seconds
        finally:
            self._room = room
        if not inputs.known or inputs.changed():
            call.opaque = True
            for key in mine:
                if (spoilt := self.store.get(key)) is not None:
                    self.store.drop(spoilt)
        return x

    def _find(self, point: Point) -> Kept | None:
        kept = self.store.find(point, self._current)
        if kept is None:
            return None
        self._hits += 1
        self._saved += kept.seconds
        for site in kept.sites:
            self._slots[site].used = None
        self._used.update(kept.sites)
        self._left = len(self._sites - self._used)
        self._order.extend(kept.sites)
        self._history = kept.exit
        self.store.touch(kept)
        return kept

    def _clock(self) -> float:
        """Return the seconds by now, as they would be without reuse."""
        return time.perf_counter() + self._saved - self._account.spent

    def _give(self, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        given = kept.outputs.give(args, kwargs)
        self._account.earned += kept.seconds - (time.perf_counter() - start)
        return given

    def _keep(
        self,
        point: Point,
        first: int,
        result: Any,
        inputs: Inputs,
        seconds: float,
        gain: float,
    ) -> Kept | None:
        """Keep a result for a candidate that differs in a site used later in the call around.

        ``gain`` is the time it saves beside the results that are kept anyhow.
        """
        later = len(self._room - self._used)
        if not later or not inputs.known:
            return None
        outputs = pack(result, inputs)
        if outputs is None:
            return None
        if outputs.bytes >= PAGED and not self._account.affords(self.store.round + 1):
            return None
        sites = tuple(self._order[first:])
        choices = tuple([self._current[i] for i in sites])
        worth = gain * later / len(self._sites)
        made = Kept((point, sites, choices), outputs, self._history, seconds, worth)
        start = time.perf_counter()
        try:
            return made if self.store.add(made) else None
        except (MemoryError, torch.OutOfMemoryError):
            self.shrink()
            return None
        finally:
            self._account.spent += time.perf_counter() - start


def _differentiates_or_casts() -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _digest(args: tuple[Any, ...], kwargs: dict[str, Any], fresh: int) -> bytes:
    """Return a digest of a call's arguments, a new one each time where they can't be known."""
    inputs = Inputs(args, kwargs)
    if not inputs.known:
        return b"unknown" + fresh.to_bytes(8, "little")
    digest = hashlib.blake2b(digest_size=16)
    for leaf in inputs.leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(repr((leaf.dtype, leaf.shape, leaf.stride())).encode())
            digest.update(as_words(leaf).cpu().numpy().data)
        else:
            digest.update(repr(leaf).encode())
    digest.update(repr(pytree.tree_structure((args, kwargs))).encode())
    return digest.digest()
