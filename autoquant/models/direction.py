"""Which way a metric goes: in words, and whether a function's name says it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

SMALLER = re.compile(
    r".*(loss|losses|error|errors|perplexity|entropy|rmse)"
    r"|err|mse|mae|mape|smape|rmsle|msle|nll|bce|mpjpe|ppl|bpc|bpb|bpd|wer|cer|ter|eer|fid|kid|lpips"
    r"|kl|divergence|distance|dist|deviation|residual|regret|brier|cost|penalty|risk"
)
"""A word of a name that usually means: the smaller the better."""


def in_words(higher_is_better: bool) -> str:
    """Return which way a metric goes."""
    return "higher is better" if higher_is_better else "lower is better"


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def sounds_smaller(name: str) -> bool:
    """Return whether a name says loss, error or the like: ``val_loss``, ``MSELoss``, ``rmse``."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return any(SMALLER.fullmatch(word.lower()) for word in words)
