"""What follows a layer: a ReLU or GELU, and the layer that alone reads it after that.

What is seen in runs of the float model is computed together from then on (``layer_output``); a run
that goes another way costs time and changes no number.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoquant.nn.converted import Converted
from autoquant.nn.layer_output import After, leaves_alone, looks_only, step_of


@dataclass(eq=False)
class _Value:
    """What a layer gave: its activation, the layers that read it after that, and other uses.

    ``before`` counts what read it as the layer gave it, but for the activation.
    """

    layer: Converted
    after: After = None
    before: int = 0
    readers: list[Converted] = field(default_factory=list)
    others: int = 0


class Followers(TorchFunctionMode):
    """Follows the outputs of layers through runs of the float model."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[_Value] = []
        self._held: dict[int, tuple[weakref.ref[Tensor], _Value, bool]] = {}
        self._reading: list[_Value | None] = []

    def settle(self) -> None:
        """Tell every layer what is expected to follow it: what did each time."""
        found: dict[int, list[_Value]] = {}
        for value in self.values:
            found.setdefault(id(value.layer), []).append(value)
        for values in found.values():
            first = values[0]
            if all(v.after == first.after and not v.before for v in values):
                first.layer.after = first.after
            elif any(v.after is not None for v in values):
                continue
            alone = all(v.readers == first.readers and not v.others + v.before for v in values)
            if alone and len(first.readers) == 1:
                first.layer.reader = first.readers[0]

    def made(self, layer: Converted, y: Any) -> None:
        """Follow the output ``y`` of ``layer``."""
        if self._reading:
            self._reading.pop()
        # Where a hook of the user's sees the output, it is computed as it is.
        if isinstance(y, Tensor) and len(layer.module._forward_hooks) == 1:
            value = _Value(layer)
            self.values.append(value)
            self._held[id(y)] = weakref.ref(y), value, False

    def read(self, layer: Converted, args: tuple[Any, ...]) -> None:
        """Note that ``layer`` is called: what it does with its input is its own use."""
        value, activated = self._find(args[0]) if args else (None, False)
        if value is not None and activated == (value.after is not None):
            value.readers.append(layer)
        elif value is not None:
            value.before += 1
        self._reading.append(value)

    def _find(self, x: Any) -> tuple[_Value | None, bool]:
        """Return the output that a tensor is, and whether with its activation."""
        tensor, value, activated = self._held.get(id(x), (None, None, False))
        found = tensor is not None and tensor() is x
        return (value, activated) if found else (None, False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the uses of what is followed."""
        if leaves_alone(func, args, kwargs):
            return args[0]
        step = step_of(func, args, kwargs)
        value, activated = self._find(args[0]) if step is not None else (None, False)
        if step is not None and value is not None and value not in self._reading:
            y = func(*args, **(kwargs or {}))
            if activated:
                value.others += 1
            elif value.after is not None or value.readers:
                value.before += 1
            else:
                value.after = step.after
                self._held[id(y)] = weakref.ref(y), value, True
            return y
        if not looks_only(func):
            for leaf in pytree.tree_leaves((args, kwargs)):
                value, activated = self._find(leaf)
                if value is not None and value not in self._reading:
                    if activated or value.after is None:
                        value.others += 1
                    if not activated:
                        value.before += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(layers: Iterable[Converted]) -> Iterator[Followers]:
    """Follow what ``layers`` give inside; ``settle`` of what is given makes use of it."""
    watch = Followers()
    handles = []
    for layer in layers:
        module: nn.Module = layer.module
        handles += [
            module.register_forward_hook(lambda _, __, y, layer=layer: watch.made(layer, y)),
            module.register_forward_pre_hook(lambda _, args, layer=layer: watch.read(layer, args)),
        ]
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()
