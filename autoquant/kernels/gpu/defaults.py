"""How a kernel is cut where nothing was measured: the tiles of ``configs.json``, by an estimate.

The file lists, for every kind of GPU and family of kernels, the tiles that were seen to win, by
whom, or that are tried without such evidence. Among those that a kernel offers, and that fit the
shared memory, the least estimated time decides:

    waves · (BLOCK_M · BLOCK_N + balance · (BLOCK_M + BLOCK_N)) · depth

A wave is one program on each multiprocessor. A program multiplies a tile and loads its two edges
for each step of depth; ``balance`` is how many multiplications take as long as loading one number.
It was fitted to the winners for int8 that gemlite publishes, and chooses a tile with the same
edges, in either order, as 87% of the 285 on an H100 (from 128 rows on), 82% of 143 on an A100, 81%
of 220 on an A6000, 57% of 222 on a 4090, and 35% of 211 on an L40S, whose winners often are tiles
that no kernel here offers. The best single tile for all shapes would be 46%, 54%, 60%, 37% and 31%.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from autoquant.kernels.gpu.launch import Config, ceil_div, round_up
from autoquant.kernels.gpu.shared_memory import shared_bytes

TOLERANCE = 1.05
"""Estimates this near to the least are equal, and the first listed wins: fewer kernels compile."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the choice depends on; ``shared_memory`` is the most bytes a program can have."""

    capability: int
    processors: int
    shared_memory: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A product [rows, depth] · [depth, columns], ``groups`` times side by side.

    ``bits`` are those of a packed weight, else 0; ``itemsize`` is the bytes of an activation.
    """

    rows: int
    columns: int
    depth: int
    groups: int = 1
    bits: int = 0
    itemsize: int = 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """GPUs of one compute capability, 10 · major + minor."""

    capability: int
    example: str
    processors: int
    shared_memory: int
    balance: float
    source: str

    @property
    def gpu(self) -> Gpu:
        """The full-size GPU."""
        return Gpu(self.capability, self.processors, self.shared_memory, self.example)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a family of kernels on some architectures, the most robust ones first."""

    family: str
    architectures: tuple[int, ...]
    source: str
    configs: tuple[Config, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """All that ships."""

    architectures: tuple[Architecture, ...]
    tiles: tuple[Tiles, ...]
    sources: dict[str, str]

    def architecture(self, capability: int) -> Architecture:
        """Return the newest architecture that is not newer, or the oldest there is."""
        older = [a for a in self.architectures if a.capability <= capability]
        return max(older, key=lambda a: a.capability) if older else self.architectures[0]

    def listed(self, kernel: str, capability: int) -> tuple[Config, ...]:
        """Return the tiles for a kernel, by its family; none where no family is like it."""
        family = family_of(kernel, tuple(t.family for t in self.tiles))
        capability = self.architecture(capability).capability
        found = [t for t in self.tiles if t.family == family and capability in t.architectures]
        return tuple(c for t in found for c in t.configs)


@functools.cache
def table() -> Table:
    """Return what ``configs.json`` holds."""
    file = resources.files("autoquant.kernels.gpu").joinpath("configs.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    architectures = [Architecture(int(k), **v) for k, v in document["architectures"].items()]
    tiles = [
        Tiles(
            t["family"],
            tuple(t["architectures"]),
            t["source"],
            tuple(_config(c) for c in t["configs"]),
        )
        for t in document["tiles"]
    ]
    ordered = sorted(architectures, key=lambda a: a.capability)
    return Table(tuple(ordered), tuple(tiles), document["sources"])


def _config(entry: dict[str, Any]) -> Config:
    blocks = {k: v for k, v in entry.items() if k.isupper()}
    return Config(tuple(blocks.items()), entry["num_warps"], entry["num_stages"])


def family_of(kernel: str, families: Sequence[str]) -> str | None:
    """Return the family that begins with the most words of ``kernel``; None where none does."""

    def alike(family: str) -> int:
        pairs = list(zip(kernel.split(), family.split(), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    best = max(families, key=alike, default="")
    return best if best and alike(best) else None


def problem_of(kernel: str, shape: Sequence[int]) -> Problem:
    """Return the product behind the shape that a kernel is chosen by.

    All begin with rows, columns and depth. Convolutions go on with groups and taps (y, x), packed
    weights with bits, group and bytes of an activation.
    """
    rows, columns, depth = (max(int(n), 1) for n in (*shape, 1, 1, 1)[:3])
    first = kernel.split()[0]
    if first == "packed" and len(shape) >= 6:
        return Problem(rows, columns, depth, bits=int(shape[3]), itemsize=int(shape[5]))
    if first == "depthwise" or "convolution" not in kernel or len(shape) < 6:
        return Problem(rows, columns, depth)
    groups = max(int(shape[3]), 1)
    taps = max(int(shape[4]) * int(shape[5]), 1)
    return Problem(rows, ceil_div(columns, groups), depth * taps, groups)


def estimate(c: Config, problem: Problem, processors: int, balance: float) -> float:
    """Return a number that grows with the time of ``problem`` cut by ``c``."""
    blocks = dict(c.blocks)
    m, n, k = (blocks.get(name, 1) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    programs = ceil_div(problem.rows, m) * ceil_div(problem.columns, n) * problem.groups
    waves = ceil_div(programs, processors)
    return waves * (m * n + balance * (m + n)) * round_up(problem.depth, k)


def preferred(
    kernel: str, shape: Sequence[int], configs: Sequence[Config], gpu: Gpu
) -> list[Config]:
    """Return ``configs`` in the order in which to try them.

    First the listed ones, then others that fit, both by their estimate; last those that should not
    fit, the smallest first.
    """
    problem, known = problem_of(kernel, shape), table()
    balance = known.architecture(gpu.capability).balance
    listed = known.listed(kernel, gpu.capability)

    def needs(c: Config) -> int:
        return shared_bytes(c, problem.bits, problem.itemsize, gpu.capability)

    def time(c: Config) -> float:
        return estimate(c, problem, gpu.processors, balance)

    fitting = [c for c in configs if needs(c) <= gpu.shared_memory]
    first = sorted((c for c in fitting if c in listed), key=time)
    if first:
        near = [c for c in first if time(c) <= TOLERANCE * time(first[0])]
        best = min(near, key=listed.index)
        first = [best, *(c for c in first if c != best)]
    others = sorted((c for c in fitting if c not in listed), key=time)
    return first + others + sorted((c for c in configs if c not in fitting), key=needs)
