"""What is timed: the modules that own the sites, with the inputs that one batch gives them.

A unit is the outermost converted module around a site: a layer by itself, or a recurrent layer, a
cell or an attention with all its sites. Its calls are told apart by the shapes of their inputs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from autoquant.nn.convert import Prepared
from autoquant.nn.converted import converted_of
from autoquant.nn.sites import Site

SIGNATURES = 4
"""Most different inputs on which one unit is timed: generation gives each step another length."""

Run = Callable[[nn.Module], Any]
"""Runs the model on one batch."""


@dataclass(frozen=True)
class Unit:
    """A module to time; ``sites`` are those inside it, with their parameters' paths in it."""

    name: str
    module: nn.Module
    sites: tuple[tuple[str, Site], ...]

    @property
    def shares(self) -> Mapping[str, float]:
        """Return the share of each site in the unit's time: that of its weights."""
        total = sum(site.numel for _, site in self.sites)
        return {site.name: site.numel / total for _, site in self.sites}


def find_units(prepared: Prepared) -> list[Unit]:
    """Return the units of a prepared model, in the order of its sites."""
    held: dict[int, list[tuple[str, Site]]] = {}
    found: dict[int, tuple[str, nn.Module]] = {}
    for site in prepared.sites:
        for path, name in site.users:
            top = _outermost(prepared.model, path)
            module = prepared.model.get_submodule(top)
            found.setdefault(id(module), (top, module))
            inside = f"{path[len(top) :]}.{name}".lstrip(".")
            held.setdefault(id(module), []).append((inside, site))
    return [Unit(name, module, tuple(held[key])) for key, (name, module) in found.items()]


def _outermost(model: nn.Module, path: str) -> str:
    """Return the path of the outermost converted module around ``path``."""
    parts = path.split(".") if path else []
    for n in range(len(parts) + 1):
        top = ".".join(parts[:n])
        if converted_of(model.get_submodule(top)) is not None:
            return top
    return path


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return what of a call's arguments decides its speed: shapes, strides, types."""
    leaves, _ = pytree.tree_flatten((args, dict(kwargs)))
    return json.dumps([_leaf(leaf) for leaf in leaves])


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        strides = list(leaf.stride()) if leaf.layout == torch.strided else str(leaf.layout)
        return [list(leaf.shape), strides, str(leaf.dtype)]
    if isinstance(leaf, PackedSequence):
        return [list(leaf.data.shape), leaf.batch_sizes.tolist(), str(leaf.data.dtype)]
    return leaf if isinstance(leaf, bool | int | float | None) else type(leaf).__name__


def _elements(text: str) -> int:
    """Return how many numbers go in with a signature."""
    total = 0
    for leaf in json.loads(text):
        if isinstance(leaf, list):
            size = 1
            for n in leaf[0]:
                size *= n
            total += size
    return total


def choose(counts: Mapping[str, int], most: int = SIGNATURES) -> dict[str, int]:
    """Return at most ``most`` signatures, spread over the sizes, with the calls they stand for.

    A signature that is left out is counted with the one of the nearest size.
    """
    order = sorted(counts, key=lambda text: (_elements(text), text))
    if len(order) <= most:
        return dict(counts)
    kept = [order[(2 * i + 1) * len(order) // (2 * most)] for i in range(most)]
    found = Counter(dict.fromkeys(kept, 0))
    for text, count in counts.items():
        nearest = min(kept, key=lambda k: (abs(_elements(k) - _elements(text)), k))
        found[nearest] += count
    return dict(found)


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def run_hooked(model: nn.Module, run: Run, hooks: Mapping[nn.Module, Hook]) -> None:
    """Run one batch; each hook sees every call of its module before it is made."""
    with ExitStack() as stack, torch.no_grad():
        for module, hook in hooks.items():
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        run(model)


def count_calls(model: nn.Module, units: list[Unit], run: Run) -> list[dict[str, int]]:
    """Return for each unit how often one batch calls it with which inputs."""
    counts: list[Counter[str]] = [Counter() for _ in units]

    def counter(found: Counter[str]) -> Hook:
        return lambda module, args, kwargs: found.update([signature(args, kwargs)])

    hooks = {u.module: counter(c) for u, c in zip(units, counts, strict=True)}
    run_hooked(model, run, hooks)
    return [dict(c) for c in counts]
