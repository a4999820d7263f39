"""What a user asks of a search, as plain values that a study keeps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.errors import UserError
from autoquant.spec.costs import OBJECTIVES, average_bits
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import FLOAT32, RESTS
from autoquant.spec.space import SiteSpace

MAX_DROP = "1%"
"""The maximum drop of a search that is told none."""
AUTO = "auto"
"""As many trials as it takes; see ``optimize.termination``."""
TRIALS = 60
"""Most trials of a search that is told neither --trials nor --timeout, and ends itself."""
BLOCK, FULL = "block", "full"
TUNINGS = (AUTO, "none", "layer", BLOCK, FULL)
"""Whether recipes are tuned after the trials: not at all, layer by layer, block by block or all
layers together after that, or (auto) layer by layer and all together, where it is no more work than
twice the trials."""


@dataclass(frozen=True)
class Options:
    """The options of one search; ``trials`` None means as many as ``timeout`` seconds allow, and
    AUTO as many as it takes.

    ``max_drop`` None is MAX_DROP, which nobody asked for where there is a budget. ``memory`` is the
    size that results of layers may take, "0" for none, None for the default. ``rest`` is the format
    of what stays in float.
    """

    max_drop: str | None = None
    bits: float | None = None
    size: str | None = None
    trials: int | str | None = None
    timeout: float | None = None
    sampler: str = "knapsack"
    device: str = "auto"
    seed: int = 0
    max_latency: str | None = None
    objective: str | None = None
    backend: str = "auto"
    prune: bool = True
    memory: str | None = None
    tune: str = AUTO
    rest: str = FLOAT32

    @property
    def most_drop(self) -> str:
        """The maximum drop, asked for or not."""
        return MAX_DROP if self.max_drop is None else self.max_drop

    @property
    def asks_latency(self) -> bool:
        """Whether latency has to be known."""
        return self.max_latency is not None or self.objective == "latency"

    def plain(self) -> dict[str, Any]:
        """Return the options as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Options:
        """Return the options that ``plain`` wrote."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in plain.items() if k in known})

    @property
    def most_trials(self) -> int | None:
        """How many trials the study may have."""
        if isinstance(self.trials, str):
            return None
        if self.trials is None and self.timeout is None:
            return TRIALS
        return self.trials

    @property
    def ends_itself(self) -> bool:
        """Whether the search ends where more trials would gain too little."""
        return self.trials == AUTO or (self.trials is None and self.timeout is None)

    @property
    def memory_bytes(self) -> int | None:
        """The bytes of ``memory``; UserError where it is no size."""
        return None if self.memory is None else parse_memory(self.memory)


_DURATION = re.compile(r"(\d{1,12}(?:\.\d+)?)\s*(s|m|h|d)?")
_SECONDS = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Return the seconds of "90", "90s", "10m", "2h" or "1d"; UserError on anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--timeout {text!r}: write a time such as 90s, 10m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*(%|[kmg]i?b|b)?", re.IGNORECASE)
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str, float_size_bytes: int) -> int:
    """Return the bytes of "25%" (of the float model) or "4MB"; UserError on anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] is None or float(match[1]) <= 0:
        raise UserError(f"--size {text!r}: write a share of the float size (25%) or bytes (4MB)")
    unit = match[2].lower()
    if unit == "%":
        return math.floor(float(match[1]) / 100 * float_size_bytes)
    return math.floor(float(match[1]) * _BYTES[unit])


_LATENCY = re.compile(r"(\d{1,12}(?:\.\d+)?)\s*(%|s|ms|us|µs|μs)", re.IGNORECASE)
_LATENCY_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}


def parse_latency(text: str, float_seconds: float) -> float:
    """Return the seconds of "20ms" or "60%" (of the float model); UserError on anything else."""
    match = _LATENCY.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(
            f"--max-latency {text!r}: write a time (20ms, 0.5s, 300us) or a share of the float "
            "model's (60%)"
        )
    unit = match[2].lower()
    return float(match[1]) * (float_seconds / 100 if unit == "%" else _LATENCY_SECONDS[unit])


def parse_memory(text: str) -> int:
    """Return the bytes of "512MB", "2GiB" or "0"; UserError on anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] == "%" or (match[2] is None and float(match[1])):
        raise UserError(f"--memory {text!r}: write a size such as 512MB or 2GB, or 0 for none")
    return math.floor(float(match[1]) * _BYTES[(match[2] or "b").lower()])


def check(options: Options) -> None:
    """Raise UserError on an option that no model could satisfy."""
    if options.bits is not None and not 2 <= options.bits <= FLOAT_BITS:
        raise UserError(f"--bits {options.bits:g}: average weight bits lie between 2 and 16")
    if options.bits is not None and options.size is not None:
        raise UserError("--bits and --size are two budgets; give one")
    if options.max_latency is not None:
        parse_latency(options.max_latency, 1.0)
    if options.objective is not None and options.objective not in OBJECTIVES:
        raise UserError(f"--objective {options.objective!r}: give {', '.join(OBJECTIVES)}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: give an integer from 0 to {2**32 - 1}")
    if options.tune not in TUNINGS:
        raise UserError(f"--tune {options.tune!r}: give {', '.join(TUNINGS)}")
    if options.rest not in RESTS:
        raise UserError(f"--rest {options.rest!r}: give {' or '.join(RESTS)}")
    if options.rest != FLOAT32 and options.asks_latency:
        raise UserError(
            f"--rest {options.rest}: layers are timed with the rest in float32, so neither "
            "--max-latency nor --objective latency goes with it"
        )
    trials = options.trials
    if isinstance(trials, str) and trials != AUTO:
        raise UserError(f"--trials {trials!r}: give a number, or {AUTO}")
    if isinstance(trials, int) and trials < 1:
        raise UserError(f"--trials {trials}: give at least 1")
    if options.memory is not None:
        parse_memory(options.memory)


def check_budget(
    bits: float | None, spaces: Mapping[str, SiteSpace], numel: Mapping[str, int], rest: int = 0
) -> None:
    """Raise UserError where the narrowest recipe of the space is wider than ``bits``.

    ``rest`` weights stay in float, beside those of ``spaces``.
    """
    if bits is None:
        return
    widths = [(numel[name], narrowest(space)) for name, space in spaces.items()]
    least = average_bits(widths, rest)
    if least > bits + 1e-9:
        share = rest / (rest + sum(numel.values()))
        floats = f", for {share:.0%} of the weights stay in float" if rest else ""
        raise UserError(
            f"--bits {bits:g}: the space's narrowest recipe has {least:.4g} average weight bits"
            f"{floats}; give --bits {math.ceil(least * 100) / 100:g} or more, or a space with "
            "fewer bits"
        )


def narrowest(space: SiteSpace) -> int:
    """Return the fewest weight bits that a site may take."""
    if space.fixed is not None:
        return space.fixed.weight_bits
    return int(min(space.choices["weight_bits"]))
