"""The calls whose results can be kept: the modules of a model that hold sites, wrapped for a while.

A wrapper stands in a module's ``forward`` only while a batch is measured, so copies of the model,
exports and the user's own calls never meet it.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from autoquant.nn.convert import Prepared
from autoquant.nn.converted import converted_of

Forward = Callable[..., Any]
Run = Callable[["Call", tuple[Any, ...], dict[str, Any]], Any]


class Call:
    """One module that holds sites. ``inside`` are the sites that it holds.

    ``stops`` are the children after which the result of an ``nn.Sequential`` can be kept, empty for
    any other module: no code of the user's is between two of its children, so the results before
    the last one that still holds are not needed. ``opaque`` says that it must always run.
    """

    def __init__(self, index: int, path: str, module: nn.Module, inside: frozenset[int]) -> None:
        self.path = path
        self.module = module
        self.inside = inside
        self.event = b"call" + index.to_bytes(8, "little")
        self.opaque = False
        self.children: list[Call | None] = []
        self.stops: tuple[int, ...] = ()
        self.original: Forward = module.forward
        self._had: tuple[Forward, ...] = ()

    @property
    def sequence(self) -> bool:
        """Whether the module runs its children one after the other, and nothing else."""
        if not self.stops or self._had:
            return False
        return len(self.children) == len(self.module)  # type: ignore[arg-type]

    def install(self, run: Run) -> None:
        """Put ``run`` in the place of the module's ``forward``."""
        held = vars(self.module)
        self._had = (held["forward"],) if "forward" in held else ()
        self.original = self.module.forward
        held["forward"] = _Wrapper(self, run)

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        held = vars(self.module)
        held.pop("forward", None)
        if self._had:
            held["forward"] = self._had[0]


class _Wrapper:
    """Stands for a module's ``forward``; a copy of the module gets its own back."""

    def __init__(self, call: Call, run: Run) -> None:
        self.call = call
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.call, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.call._had:
            return copy.deepcopy(self.call._had[0], memo)
        return _own_forward(copy.deepcopy(self.call.module, memo))

    def __reduce__(self) -> Any:
        return _own_forward, (self.call.module,)


def _own_forward(module: nn.Module) -> Forward:
    return types.MethodType(type(module).forward, module)


class Told:
    """Tells ``hear`` that a slot was used; it stays one with copies, and is not pickled."""

    def __init__(self, hear: Callable[[int], None], index: int) -> None:
        self.hear = hear
        self.index = index

    def __call__(self) -> None:
        """Tell it."""
        self.hear(self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Told:
        return self  # what the copy computes depends on the same choice

    def __reduce__(self) -> Any:
        return type(None), ()


def find_calls(prepared: Prepared) -> list[Call]:
    """Return every module that holds a site that is reached, parents first."""
    reached = {site.name for site in prepared.sites}
    slots = enumerate(prepared.slots.items())
    numbers = {id(slot): i for i, (name, slot) in slots if name in reached}
    inside: dict[int, set[int]] = {}
    for path, module in prepared.model.named_modules():
        converted = converted_of(module)
        held = () if converted is None else converted.sites.values()
        own = {numbers[id(slot)] for slot in held if id(slot) in numbers}
        parts = path.split(".") if path else []
        for depth in range(len(parts) + 1) if own else ():
            above = prepared.model.get_submodule(".".join(parts[:depth]))
            inside.setdefault(id(above), set()).update(own)
    # A module that hangs in two places is named once, but its other parents hold it too.
    for module in reversed(list(prepared.model.modules())):
        for child in module.children():
            if id(child) in inside:
                inside.setdefault(id(module), set()).update(inside[id(child)])
    calls = {
        id(module): Call(i, path, module, frozenset(inside[id(module)]))
        for i, (path, module) in enumerate(prepared.model.named_modules())
        if id(module) in inside
    }
    for call in calls.values():
        if type(call.module).forward is nn.Sequential.forward:
            call.children = [calls.get(id(child)) for child in call.module.children()]
            call.stops = _stops(call.children)
    return list(calls.values())


def _stops(children: list[Call | None]) -> tuple[int, ...]:
    """Return after which children to keep a result: behind what runs without sites of its own."""
    first = next((i for i, child in enumerate(children) if child is not None), len(children))
    last = len(children) - 1
    return tuple(i for i in range(first, last + 1) if i == last or children[i + 1] is not None)


def _address(x: Tensor) -> int:
    """Return where the numbers of ``x`` lie, 0 where they have no one place, as those of sparse."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0


class Watched:
    """Tells whether the weights and buffers of a model were replaced or written into."""

    def __init__(self, model: nn.Module) -> None:
        self._holders = [
            held for m in model.modules() for held in (m._parameters, m._buffers) if held
        ]
        self._last = self._state()

    def _state(self) -> list[tuple[Tensor, int, int]]:
        return [
            (t, _address(t), -1 if t.is_inference() else t._version)
            for held in self._holders
            for t in held.values()
            if t is not None
        ]

    def changed(self) -> bool:
        """Return whether anything is not as it was the last time."""
        state, last = self._state(), self._last
        self._last = state
        if len(state) != len(last):
            return True
        return any(
            a is not b or p != q or v != w for (a, p, v), (b, q, w) in zip(state, last, strict=True)
        )
