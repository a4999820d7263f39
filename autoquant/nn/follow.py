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
from autoquant.nn.sums import NORM, Plan, Sum, norm_of, sum_of


@dataclass(eq=False)
class _Value:
    """What a layer gave: its activation, the layers that read it after that, and other uses.

    ``before`` counts what read it as the layer gave it, but for the activation. ``total`` is what
    comes of it where something is added to it: followed like an output, from call ``number`` on.
    ``late`` says that other calls came between the sum and what follows it.
    """

    layer: Converted
    after: After = None
    before: int = 0
    readers: list[Converted] = field(default_factory=list)
    others: int = 0
    total: _Value | None = None
    number: int = 0
    late: bool = False

    @property
    def fresh(self) -> bool:
        """Whether nobody has used it."""
        return self.after is None and not self.readers and not self.before + self.others

    def plan(self) -> Plan | None:
        """Return what follows where something is added to it; None where it does not fit."""
        total = self.total
        if total is None or self.before or self.others or self.readers or total.late:
            return None
        if isinstance(total.after, tuple) and total.before:
            return None
        if isinstance(total.after, str) and total.after != NORM:
            return None
        keeps = total.after == NORM and bool(total.before)
        return Plan(total.after, tuple(total.readers), keeps)


class Followers(TorchFunctionMode):
    """Follows the outputs of layers through runs of the float model."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[_Value] = []
        self._held: dict[int, tuple[weakref.ref[Tensor], _Value, bool]] = {}
        self._reading: list[_Value | None] = []
        self._count = 0

    def settle(self) -> None:
        """Tell every layer what is expected to follow it: what did each time."""
        found: dict[int, list[_Value]] = {}
        for value in self.values:
            found.setdefault(id(value.layer), []).append(value)
        for values in found.values():
            first = values[0]
            plans = [v.plan() for v in values]
            if all(plan == plans[0] for plan in plans):
                first.layer.plan = plans[0]
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
        self._count += not looks_only(func)
        added = sum_of(func, args, kwargs)
        if added is not None and (found := self._added(added, func)) is not None:
            return found
        if (found := self._normed(func, args, kwargs)) is not None:
            return found
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
                value.late = value.number > 0 and self._count > value.number + 1
                self._held[id(y)] = weakref.ref(y), value, True
            return y
        if not looks_only(func):
            for leaf in pytree.tree_leaves((args, kwargs)):
                self._use(leaf)
        return func(*args, **(kwargs or {}))

    def _added(self, added: Sum, func: Any) -> Tensor | None:
        """Follow a sum in the place of an output that nobody used before; None for other sums."""
        operands = (added.first,) if added.inplace else (added.first, added.second)
        for x in operands:
            value, activated = self._find(x)
            if value is None or activated or value in self._reading or not value.fresh:
                continue
            if value.total is not None or value.number:
                continue
            self._use(added.second if x is added.first else added.first)
            y: Tensor = func(added.first, added.second)
            value.total = total = _Value(value.layer, number=self._count)
            self._held[id(y)] = weakref.ref(y), total, False
            return y
        return None

    def _normed(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Follow the layer norm of a sum; None for any other call."""
        if norm_of(func, args, kwargs) is None:
            return None
        value, activated = self._find(args[0])
        if value is None or activated or not value.number or not value.fresh:
            return None
        y: Tensor = func(*args, **(kwargs or {}))
        value.after, value.late = NORM, self._count > value.number + 1
        self._held[id(y)] = weakref.ref(y), value, True
        return y

    def _use(self, x: Any) -> None:
        """Count a use of ``x``, where it is followed."""
        value, activated = self._find(x)
        if value is not None and value not in self._reading:
            if activated or value.after is None:
                value.others += 1
            if not activated:
                value.before += 1


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
