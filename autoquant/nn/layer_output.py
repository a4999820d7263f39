"""A layer's output of which more is computed already than its numbers: what is expected of it next.

That is its ReLU, or the integers that the one layer that reads it would make of it. To the user's
code it is a float32 tensor like any other. Whoever touches it beside those gets the real numbers,
computed then: nothing depends on a guess about what comes next, only the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from autoquant.kernels.layout import lies_channels_last
from autoquant.kernels.operation import Clamp, Reader

After = Clamp | str | None
"""What is done with an output: a ReLU's least and largest number, a GELU's approximation."""

Compute = Callable[[Tensor, After], Tensor]
"""The bytes that a layer read, and what is done with its output → the real numbers of that."""

_FORM = frozenset(
    {
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "grad_fn"),
        *("is_quantized", "is_sparse", "is_mkldnn", "is_meta", "is_nested", "names"),
        *("_version", "is_leaf", "is_cpu"),
    }
)
_ASKED = frozenset(
    {
        *("dim", "size", "stride", "numel", "is_contiguous", "__len__", "is_floating_point"),
        *("is_complex", "is_conj", "is_neg", "is_inference", "element_size", "get_device"),
    }
)
"""Attributes and methods that read nothing of a tensor but its form."""


class LayerOutput(Tensor):
    """An output of which ``held`` is computed: what ``ahead`` makes of it, None for itself.

    ``also`` are the integers of more readers.

    With ``reader``, ``held`` are the integers that it makes of that; else real numbers.
    ``compute`` gives the output, which lies in memory as ``stride`` says, from ``source``, the
    integers that the layer read. Nobody writes into ``source`` or into integers.
    """

    held: Tensor | None
    source: Tensor
    reader: Reader | None
    compute: Compute
    ahead: After
    done: After
    channels_last: bool
    changes: int
    also: tuple[tuple[Reader, Tensor], ...]
    _real: Tensor | None
    _made: int

    @staticmethod
    def of(
        held: Tensor,
        source: Tensor,
        reader: Reader | None,
        compute: Compute,
        stride: tuple[int, ...],
        ahead: After = None,
        done: After = None,
    ) -> LayerOutput:
        """Return the output; ``done`` is what was done with the layer's own already."""
        y: LayerOutput = Tensor._make_wrapper_subclass(
            LayerOutput, held.shape, strides=stride, dtype=torch.float32, device=held.device
        )
        y.begin(held, source, reader, compute, stride, ahead, done)
        return y

    def begin(
        self,
        held: Tensor | None,
        source: Tensor,
        reader: Reader | None,
        compute: Compute,
        stride: tuple[int, ...],
        ahead: After = None,
        done: After = None,
    ) -> None:
        """Set what ``of`` is given."""
        self.held, self.source, self.reader, self.compute = held, source, reader, compute
        self.ahead, self.done = ahead, done
        self.channels_last = lies_channels_last(self.shape, stride)
        self.changes = 0
        self.also = ()
        self._real, self._made = None, 0

    def finish(
        self, real: Tensor, readers: Sequence[Reader], integers: Sequence[Tensor | None]
    ) -> None:
        """Be these real numbers from here on, of which some readers' integers are known."""
        self._see(real)
        pairs = zip(readers, integers, strict=True)
        self.also = tuple((reader, q) for reader, q in pairs if q is not None)

    @property
    def seen(self) -> bool:
        """Whether anybody has the real numbers."""
        return self._real is not None

    @property
    def written(self) -> bool:
        """Whether the real numbers were written into, or may have been: ``held`` is another's."""
        real = self._real
        return real is not None and (real.is_inference() or real._version != self._made)

    def integers(self, reader: Reader | None) -> Tensor | None:
        """Return what ``reader`` makes of these very numbers, None where that is not known."""
        if reader is None or self.ahead is not None or self.written:
            return None
        if self.reader == reader:
            return self.held
        return next((q for known, q in self.also if known == reader), None)

    def dequantized(self) -> Tensor:
        """Return the real numbers, always the same tensor."""
        if self._real is None:
            self._see(self.compute(self.source, self.done))
        assert self._real is not None
        return self._real

    def activated(self, step: Step) -> Tensor | None:
        """Return the output after ``step``, None where something else was expected."""
        if step.after != self.ahead or self.written or self.held is None:
            return None
        held, reader = self.held, self.reader
        if not step.inplace:
            if reader is None:  # whoever has it may write into it
                self.held = None
                return held
            return LayerOutput.of(
                held, self.source, reader, self.compute, self.stride(), None, self.ahead
            )
        self.changes += 1
        if reader is None:
            self.held = None
            if self._real is not None:
                return self._real.copy_(held)
            self._see(held)
            return held
        if self._real is not None:
            return None
        self.done, self.ahead = self.ahead, None
        return self

    def _see(self, real: Tensor) -> None:
        self._real = real
        self._made = 0 if real.is_inference() else real._version

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what is asked of the form; for all else put the real numbers in its place."""
        if leaves_alone(func, args, kwargs):
            return args[0]
        step = step_of(func, args, kwargs)
        if step is not None and isinstance(args[0], LayerOutput):
            found = args[0].activated(step)
            if found is not None:
                return found
        if looks_only(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(as_real, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Put the real numbers in its place, where code reached it without torch's functions."""
        args, kwargs = pytree.tree_map(as_real, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Step:
    """An activation that a call of torch computes: ``inplace`` writes it into its argument."""

    after: After
    inplace: bool = False


_RELU: Clamp = (0.0, math.inf)
_STEPS: dict[Any, Step] = {
    torch.relu: Step(_RELU),
    torch.relu_: Step(_RELU, True),
    Tensor.relu: Step(_RELU),
    Tensor.relu_: Step(_RELU, True),
}
_WITH_INPLACE: dict[Any, Clamp] = {F.relu: _RELU, F.relu6: (0.0, 6.0)}


def step_of(func: Any, args: tuple[Any, ...], kwargs: Any) -> Step | None:
    """Return the activation that a call of torch makes of its first argument, None for others."""
    if len(args) == 1:
        if func in _WITH_INPLACE:
            return Step(_WITH_INPLACE[func], bool((kwargs or {}).get("inplace", False)))
        if func in _STEPS and not kwargs:
            return _STEPS[func]
        if func is F.gelu:
            return Step(str((kwargs or {}).get("approximate", "none")))
    if func is F.hardtanh:
        given = dict(zip(("min_val", "max_val", "inplace"), args[1:], strict=False))
        given.update(kwargs or {})
        low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
        if low == 0.0 < high:
            return Step((0.0, float(high)), bool(given.get("inplace", False)))
    return None


def looks_only(func: Any) -> bool:
    """Return whether a call of torch reads nothing of a tensor but its form."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _FORM
    return name in _ASKED


def leaves_alone(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Return whether a call of torch gives its first argument as it is: a dropout at rest."""
    return func is F.dropout and len(args) == 1 and not (kwargs or {}).get("training", True)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into, −1 where torch does not count."""
    if isinstance(tensor, LayerOutput):
        return tensor.changes + int(tensor.written)
    return -1 if tensor.is_inference() else tensor._version


def as_real(x: Any) -> Any:
    """Return the real numbers of a LayerOutput, anything else as it is."""
    return x.dequantized() if isinstance(x, LayerOutput) else x
