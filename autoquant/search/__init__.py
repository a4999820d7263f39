"""The study: samplers, trials, confirmation.

``autoquant.search`` is a function of the public interface, and this package has the same name, so
the package can be called: it then does what ``autoquant.search.run.search`` does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, as something that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from autoquant.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
