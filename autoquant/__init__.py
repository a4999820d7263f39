"""Finds the best quantization recipe for a PyTorch model, layer by layer.

The names here are imported when they are first used, so that ``import autoquant`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autoquant.version import __version__ as __version__

if TYPE_CHECKING:
    from autoquant.heap import keep_freed_memory as keep_freed_memory
    from autoquant.models.task import Task as Task
    from autoquant.nn.archive import load_archive as load
    from autoquant.optimize.resume import resume as resume
    from autoquant.optimize.run import search as search
    from autoquant.session.apply import apply as apply
    from autoquant.spec.recipe import Recipe as Recipe
    from autoquant.spec.space import SearchSpace as SearchSpace

__all__ = [
    "Recipe",
    "SearchSpace",
    "Task",
    "apply",
    "keep_freed_memory",
    "load",
    "resume",
    "search",
]

_PLACES = {
    "Recipe": ("autoquant.spec.recipe", "Recipe"),
    "SearchSpace": ("autoquant.spec.space", "SearchSpace"),
    "Task": ("autoquant.models.task", "Task"),
    "apply": ("autoquant.session.apply", "apply"),
    "keep_freed_memory": ("autoquant.heap", "keep_freed_memory"),
    "load": ("autoquant.nn.archive", "load_archive"),
    "resume": ("autoquant.optimize.resume", "resume"),
    "search": ("autoquant.optimize.run", "search"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'autoquant' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
