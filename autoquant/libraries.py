"""Importing libraries whose import changes the process, with that change taken back.

SciPy and scikit-learn add warning filters, threadpoolctl and scikit-learn set environment
variables, rich draws from Python's random numbers. Whoever imports autoquant finds all of that as
it was.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Import inside: warning filters, environment and random numbers are given back after it."""
    environment, numbers = dict(os.environ), random.getstate()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        random.setstate(numbers)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


@functools.cache
def library(name: str) -> Any:
    """Return the library of that name, imported as ``unchanged`` says."""
    with unchanged():
        return importlib.import_module(name)
