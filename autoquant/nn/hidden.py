"""Parameters that a model reaches past torch: in plain lists, dictionaries and objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_TORCHS = frozenset({"_parameters", "_buffers", "_modules", "_flat_weights"})
"""Attributes in which torch itself keeps what it knows of."""
DEEPEST = 6
"""Levels of attributes and items that are looked into."""


def hidden_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (where, parameter) of every parameter that is held, or used, outside torch's own view.

    Such a layer is computed with, but neither listed, saved nor moved with the model.
    """
    known = {id(module) for module in model.modules()}
    seen = set(known)
    for path, module in model.named_modules():
        yield from _inside(module, path, known, seen, DEEPEST)


def _inside(
    value: Any, path: str, known: set[int], seen: set[int], depth: int
) -> Iterator[tuple[str, Tensor]]:
    for name, part in _parts(value, path, id(value) in known):
        if isinstance(part, nn.Parameter):
            yield name, part
        elif id(part) not in seen and depth:
            seen.add(id(part))
            yield from _inside(part, name, known, seen, depth - 1)


def _parts(value: Any, path: str, listed: bool) -> Iterator[tuple[str, Any]]:
    """Yield (path, part) of what ``value`` holds; of a module in the model's list beside that."""
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, nn.Module) or _is_plain(value):
        dot = f"{path}." if path else ""
        for name, part in list(vars(value).items()):
            if not isinstance(value, nn.Module) or name not in _TORCHS:
                yield f"{dot}{name}", part
            elif not listed and name != "_flat_weights":
                yield from ((f"{dot}{key}", own) for key, own in list(part.items()))


def _is_plain(value: Any) -> bool:
    """Return whether a value is an object with attributes of its own, of the user's making."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | Tensor)
        and not callable(value)
        and not type(value).__module__.startswith("torch.")
    )
