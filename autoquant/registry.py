"""A named table of things of one kind, with a helpful answer to an unknown name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from autoquant.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing (metrics, calibrations, …) in order of registration.

    ``package`` is one each of whose modules registers the thing that it is named after: names are
    known without importing any, and a new thing is a new file there. ``group`` are the entry points
    by which other distributions add theirs. Both come after what is registered by itself.
    """

    def __init__(self, kind: str, package: str = "", group: str = "") -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._package = package
        self._group = group
        self._elsewhere: dict[str, str] | None = None

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
        if name not in self._items and name in self._modules():
            importlib.import_module(self._modules()[name])
        try:
            return self._items[name]
        except KeyError:
            raise UserError(unknown(self.kind, name, self.names())) from None

    def names(self) -> tuple[str, ...]:
        """Return every name: in order of registration, those of the package's files last."""
        later = self._modules()
        return (*(name for name in self._items if name not in later), *later)

    def _modules(self) -> dict[str, str]:
        """Return name → module of what registers itself when it is imported."""
        if self._elsewhere is None:
            found = {}
            spec = importlib.util.find_spec(self._package) if self._package else None
            for row in pkgutil.iter_modules(spec.submodule_search_locations if spec else ()):
                found[row.name] = f"{self._package}.{row.name}"
            if self._group:
                found |= {e.name: e.module for e in entry_points(group=self._group)}
            self._elsewhere = found
        return self._elsewhere

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()


def unknown(kind: str, name: object, allowed: tuple[str, ...] | list[str]) -> str:
    """Return one line that names an unknown ``name``, the nearest allowed one, and all of them."""
    near = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}allowed: {', '.join(str(a) for a in allowed)}"
