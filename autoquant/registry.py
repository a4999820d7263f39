"""A named table of things of one kind, with a helpful answer to an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from autoquant.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing (metrics, calibrations, …) in order of registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``.

        Raises ValueError where the name is taken: two plugins must not shadow each other.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered already")

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Return what is filed under ``name``; raise UserError with the nearest names."""
        try:
            return self._items[name]
        except KeyError:
            raise UserError(unknown(self.kind, name, self.names())) from None

    def names(self) -> tuple[str, ...]:
        """Return every registered name, in order of registration."""
        return tuple(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items


def unknown(kind: str, name: object, allowed: tuple[str, ...] | list[str]) -> str:
    """Return one line that names an unknown ``name``, the nearest allowed one, and all of them."""
    near = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}allowed: {', '.join(str(a) for a in allowed)}"
