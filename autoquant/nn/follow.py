"""What follows a layer: a ReLU that can be computed with it, and the layer that alone reads it.

The layer clamps its output and marks it; the ReLU lets a marked tensor pass. A clamp does nothing
the second time, so a mark that is lost costs time and changes no number. What a single layer reads
can be handed to it as integers (``quantized_output``); who that is was seen in one run, and where
another run differs that costs time too.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoquant.kernels.operation import Clamp
from autoquant.nn.converted import Converted, converted_of
from autoquant.nn.quantized_output import gelu_of, leaves_alone

_MARK = "_autoquant_clamp"


def mark(y: Tensor, clamp: Clamp) -> Tensor:
    """Return ``y``, which lies within ``clamp``, marked as such."""
    setattr(y, _MARK, clamp)
    return y


class FollowingReLU(nn.ReLU):
    """A ReLU that lets pass what its layer has clamped."""

    float_type: type[nn.Module] = nn.ReLU
    clamp = (0.0, math.inf)

    def forward(self, input: Tensor) -> Tensor:
        """Return max(x, 0)."""
        return input if getattr(input, _MARK, None) == self.clamp else super().forward(input)


class FollowingReLU6(nn.ReLU6):
    """A ReLU6 that lets pass what its layer has clamped."""

    float_type: type[nn.Module] = nn.ReLU6
    clamp = (0.0, 6.0)

    def forward(self, input: Tensor) -> Tensor:
        """Return min(max(x, 0), 6)."""
        return input if getattr(input, _MARK, None) == self.clamp else super().forward(input)


_FOLLOWING: dict[type[nn.Module], type[FollowingReLU] | type[FollowingReLU6]] = {
    nn.ReLU: FollowingReLU,
    nn.ReLU6: FollowingReLU6,
}


_LOOKS = frozenset({"__get__", "dim", "size", "stride", "is_contiguous", "numel"})
"""Functions that read nothing of a tensor but its form."""


@dataclass
class _Output:
    """One output of a layer: the ReLU that took it, and how many other things did."""

    tensor: weakref.ref[Tensor]
    layer: nn.Module
    relu: nn.Module | None = None
    own: int = 0
    others: int = 0


@dataclass
class _Value:
    """What a layer gave, before and after its activation: layers that read it, and other uses."""

    layer: nn.Module
    relu: nn.Module | None = None
    gelu: str | None = None
    readers: list[nn.Module] = field(default_factory=list)
    own: int = 0
    others: int = 0


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers: which ReLU takes them, and whether anything else does."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, _Output] = {}
        self.followers: dict[nn.Module, set[nn.Module | None]] = {}
        self.values: list[_Value] = []
        self._held: dict[int, tuple[weakref.ref[Tensor], _Value]] = {}
        self._reading: list[_Value | None] = []
        self._passing: dict[nn.Module, _Value] = {}

    def made(self, layer: nn.Module, _: Any, y: Any) -> None:
        """Follow the output ``y`` of ``layer``."""
        if self._reading:
            self._reading.pop()
        if isinstance(y, Tensor):
            self.settle(id(y))
            self.pending[id(y)] = _Output(weakref.ref(y), layer)
            value = _Value(layer)
            self.values.append(value)
            self._held[id(y)] = weakref.ref(y), value

    def read(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that ``layer`` is called: what it does with its input is its own use."""
        value = self._value(args[0]) if args else None
        if value is not None:
            value.readers.append(layer)
        self._reading.append(value)

    def passed(self, relu: nn.Module, _: Any, y: Any) -> None:
        """Follow what ``relu`` made of a layer's output."""
        value = self._passing.pop(relu, None)
        if value is not None and isinstance(y, Tensor):
            self._held[id(y)] = weakref.ref(y), value

    def taken(self, relu: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that ``relu`` is called: its own use of the input is not another's."""
        value = self._value(args[0]) if args else None
        if value is not None:
            value.others += value.relu is not None or bool(value.readers)
            value.relu, value.own = relu, 1
            self._passing[relu] = value
        output = self._find(args[0]) if args else None
        if output is None:
            return
        if output.relu is not None:
            output.others += 1
            return
        output.relu, output.own = relu, 1
        if getattr(relu, "inplace", False):  # from here on it is the clamped tensor
            self.settle(id(args[0]))

    def settle(self, key: int) -> None:
        """Stop following one output."""
        output = self.pending.pop(key, None)
        if output is not None:
            found = self.followers.setdefault(output.layer, set())
            found.add(None if output.others else output.relu)

    def readers(self) -> dict[nn.Module, _Value]:
        """Return the layers of whose outputs one other layer is the only reader, each time."""
        found: dict[nn.Module, _Value] = {}
        shared: set[nn.Module] = set()
        for value in self.values:
            known = found.setdefault(value.layer, value)
            alone = len(value.readers) == 1 and not value.others
            like = (value.readers, value.relu, value.gelu) == (
                known.readers,
                known.relu,
                known.gelu,
            )
            if not alone or not like:
                shared.add(value.layer)
        return {layer: value for layer, value in found.items() if layer not in shared}

    def _value(self, x: Any) -> _Value | None:
        tensor, value = self._held.get(id(x), (None, None))
        return value if tensor is not None and tensor() is x else None

    def _find(self, x: Any) -> _Output | None:
        output = self.pending.get(id(x))
        return output if output is not None and output.tensor() is x else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the uses of what is followed."""
        if leaves_alone(func, args, kwargs):
            return args[0]
        value = self._value(args[0]) if args else None
        gelu = gelu_of(func, args, kwargs)
        if gelu is not None and value is not None and value not in self._reading:
            y = func(*args, **(kwargs or {}))
            value.others += bool(value.readers) or (value.relu or value.gelu) is not None
            value.gelu = gelu
            self._held[id(y)] = weakref.ref(y), value
            return y
        if getattr(func, "__name__", "") not in _LOOKS:
            for leaf in pytree.tree_leaves((args, kwargs)):
                output = self._find(leaf)
                if output is not None:
                    output.others += 1 - output.own
                    output.own = 0
                value = self._value(leaf)
                if value is not None and value not in self._reading:
                    value.others += 1 - value.own
                    value.own = 0
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(layers: Iterable[nn.Module], model: nn.Module) -> Iterator[Callable[[], None]]:
    """Watch a run of ``model``; what is given makes ReLUs and readers follow their layers then."""
    watch = _Watch()
    relus = [m for m in model.modules() if type(m) in _FOLLOWING and not _hooked(m)]
    handles = [layer.register_forward_hook(watch.made) for layer in layers]
    handles += [layer.register_forward_pre_hook(watch.read) for layer in layers]
    handles += [relu.register_forward_pre_hook(watch.taken) for relu in relus]
    handles += [relu.register_forward_hook(watch.passed) for relu in relus]

    def follow() -> None:
        for key in list(watch.pending):
            watch.settle(key)
        leaders: dict[nn.Module, list[nn.Module]] = {}
        for layer, found in watch.followers.items():
            if len(found) == 1 and None not in found:
                leaders.setdefault(next(iter(found)), []).append(layer)  # type: ignore[arg-type]
        for relu, led in leaders.items():
            relu.__class__ = _FOLLOWING[type(relu)]
            for layer in led:
                _converted(layer).clamp = _FOLLOWING[relu.float_type].clamp  # type: ignore
        for layer, value in watch.readers().items():
            if value.relu is None or layer in leaders.get(value.relu, ()):
                _converted(layer).reader = _converted(value.readers[0])
                _converted(layer).gelu = value.gelu

    try:
        with watch:
            yield follow
    finally:
        for handle in handles:
            handle.remove()


def _converted(layer: nn.Module) -> Converted:
    found = converted_of(layer)
    assert found is not None
    return found


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def unfollow(model: nn.Module) -> None:
    """Make every ReLU of ``model`` the original module again, and every layer read by anybody."""
    for module in model.modules():
        if isinstance(module, FollowingReLU | FollowingReLU6):
            module.__class__ = module.float_type  # type: ignore[assignment]
        converted = converted_of(module)
        if converted is not None:
            converted.clamp = converted.reader = converted.gelu = None


def clamp_(y: Tensor, clamp: Clamp) -> Tensor:
    """Return ``y`` clamped in place."""
    low, high = clamp
    return torch.relu_(y) if math.isinf(high) else y.clamp_(low, high)
