"""What the layers of a model do in runs of it as the user gave it, before anything is changed.

Which BatchNorm alone reads what a layer gives, in each run: that one can be folded into the layer.
And in which order weights are first used. Nothing is traced: calls are watched.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoquant.nn.fold import is_fixed_norm, is_foldable
from autoquant.nn.layer_output import looks_only, version_of
from autoquant.nn.layouts import layout_of
from autoquant.nn.sites import find_sites

Run = Callable[[nn.Module], Any]
"""Runs the model on some data and returns what it gives."""


@dataclass(frozen=True)
class Seen:
    """``pairs``: path of a BatchNorm → path of the layer whose output it alone reads.

    ``order`` are the names of the sites in the order in which their weights are first used.
    """

    pairs: dict[str, str]
    order: tuple[str, ...]


@dataclass(eq=False)
class _Made:
    """One output of a layer: whether its norm took it, while nothing was written into it."""

    tensor: weakref.ref[Tensor]
    layer: str
    version: int
    taken: bool = False


class _Watch(TorchFunctionMode):
    """Follows what layers give to the one BatchNorm that reads it, and notes whatever else does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, nn.Module] = {}
        self.norms: dict[str, nn.Module] = {}
        hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        for path, module in model.named_modules():
            if is_fixed_norm(module) and not hooked:
                self.norms[path] = module
            elif is_foldable(module) and not hooked:
                self.layers[path] = module
        held = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        self.layers = {p: m for p, m in self.layers.items() if held[id(m.weight)] == 1}
        self.readers: dict[str, set[str | None]] = {}  # of a layer; None is anything but a norm
        self.sources: dict[str, set[str | None]] = {}  # of a norm; None is anything but a layer
        self.order: dict[str, None] = {}
        sites, _ = find_sites(model)
        self._names = {
            id(model.get_submodule(path)._parameters[name]): site.name
            for site in sites
            for path, name in site.users
        }
        self._own = {
            id(p): path
            for path, m in self.layers.items()
            for p in m._parameters.values()
            if p is not None
        }
        self._numbers = {
            id(t): path
            for path, m in self.norms.items()
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        }
        self._made: dict[int, _Made] = {}
        self._all: list[_Made] = []
        self._inside: list[object] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to the calls of layers and norms inside."""
        handles = []
        for path, layer in self.layers.items():
            handles += [
                layer.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path)),
                layer.register_forward_hook(lambda *call, path=path: self.made(path, *call[::2])),
            ]
        for path, norm in self.norms.items():
            handles += [
                norm.register_forward_pre_hook(lambda _, args, path=path: self.taken(path, args)),
                norm.register_forward_hook(lambda *_: self._leave(2)),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, entries: int = 1) -> None:
        del self._inside[-entries:]

    def made(self, path: str, layer: nn.Module, y: Any) -> None:
        """Follow what a layer gave."""
        self._leave()
        weight = layer._parameters["weight"]
        # Without a batch, or from a linear layer on sequences, channels lie elsewhere.
        if not isinstance(y, Tensor) or weight is None or y.dim() != weight.dim():
            self._read(path, None)
            return
        made = _Made(weakref.ref(y), path, version_of(y))
        self._made[id(y)] = made
        self._all.append(made)

    def taken(self, path: str, args: tuple[Any, ...]) -> None:
        """Note what a norm is called with."""
        made = self._find(args[0]) if len(args) == 1 else None
        whole = made is not None and not made.taken and made.version == version_of(args[0])
        if made is not None:
            made.taken = True
            self._read(made.layer, path if whole else None)
        self.sources.setdefault(path, set()).add(made.layer if made and whole else None)
        self._inside += [made, path]

    def end(self) -> None:
        """Look for outputs that were not read, or that somebody keeps, while results are held."""
        # Of one that no norm took it doesn't matter: the model's own output, which is held, say.
        if any(made.taken and made.tensor() is not None for made in self._all):
            gc.collect()
        for made in self._all:
            if not made.taken or made.tensor() is not None:
                self._read(made.layer, None)
        self._made.clear()
        self._all.clear()
        self._inside.clear()

    def pairs(self) -> dict[str, str]:
        """Return path of norm → path of the layer that it alone reads, and that alone it reads."""
        found = {}
        for layer, norms in self.readers.items():
            norm = next(iter(norms))
            if len(norms) == 1 and norm is not None and self.sources[norm] == {layer}:
                found[norm] = layer
        return {n: found[n] for n in self.norms if n in found and self._fits(n, found[n])}

    def _fits(self, norm: str, layer: str) -> bool:
        layout = layout_of(self.layers[layer])
        assert layout is not None
        width = self.layers[layer].get_parameter("weight").shape[layout.channel_axis]
        return bool(self.norms[norm].num_features == width)

    def _read(self, layer: str, norm: str | None) -> None:
        self.readers.setdefault(layer, set()).add(norm)

    def _find(self, x: Any) -> _Made | None:
        made = self._made.get(id(x))
        return made if made is not None and made.tensor() is x else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the uses of what is followed, and of weights."""
        if not looks_only(func):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if not isinstance(leaf, Tensor):
                    continue
                made = self._find(leaf)
                if made is not None and made not in self._inside:
                    self._read(made.layer, None)
                if id(leaf) in self._names:
                    self.order.setdefault(self._names[id(leaf)])
                owner = self._own.get(id(leaf))
                if owner is not None and owner not in self._inside:
                    self._read(owner, None)
                norm = self._numbers.get(id(leaf))
                if norm is not None and norm not in self._inside:
                    self.sources.setdefault(norm, set()).add(None)
        return func(*args, **(kwargs or {}))


def look(model: nn.Module, runs: Iterable[Run]) -> Seen:
    """Return what is seen in ``runs`` of a model."""
    watch = _Watch(model)
    for run in runs:
        with torch.no_grad(), watch.hooked():
            held = run(model)  # what is returned is held by somebody
            watch.end()
            del held
    return Seen(watch.pairs(), tuple(watch.order))


class Confirming:
    """Watches whole passes, more lightly: whether norms still get what their layers give.

    Reading by anything else shows in the outputs, which are compared afterwards.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        self._model = model
        self._pairs = dict(pairs)
        self._lost: set[str] = set()
        self._made: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._kept: list[tuple[str, weakref.ref[Tensor]]] = []

    @property
    def pairs(self) -> dict[str, str]:
        """The pairs that held in every pass."""
        return {n: layer for n, layer in self._pairs.items() if layer not in self._lost}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is run inside; whatever it returns must be held until the end."""
        handles = []
        for norm, layer in self._pairs.items():
            handles += [
                self._model.get_submodule(layer).register_forward_hook(
                    lambda *call, layer=layer: self._give(layer, call[2])
                ),
                self._model.get_submodule(norm).register_forward_pre_hook(
                    lambda _, args, layer=layer: self._take(layer, args)
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._lost.update(self._made)
            if any(tensor() is not None for _, tensor in self._kept):
                gc.collect()
            self._lost.update(layer for layer, tensor in self._kept if tensor() is not None)
            self._made.clear()
            self._kept.clear()

    def _give(self, layer: str, y: Any) -> None:
        if layer in self._made or not isinstance(y, Tensor):
            self._lost.add(layer)
            return
        self._made[layer] = weakref.ref(y), version_of(y)
        self._kept.append((layer, weakref.ref(y)))

    def _take(self, layer: str, args: tuple[Any, ...]) -> None:
        tensor, version = self._made.pop(layer, (None, 0))
        x = args[0] if len(args) == 1 else None
        if tensor is None or tensor() is not x or version != version_of(x):  # type: ignore[arg-type]
            self._lost.add(layer)
