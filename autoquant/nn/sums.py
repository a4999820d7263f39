"""Residual connections: a layer's output, something added to it, and what comes after that.

A layer that was seen to have its output added to another tensor does not compute it when it is
called, where its product can add: the sum is computed with it, then what follows at once, a ReLU or
a layer norm, and the bytes of all layers that read the result. To the user's code each step is a
float32 tensor (``layer_output``), which is computed as soon as anybody else looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.kernels.layout import contiguous_stride
from autoquant.kernels.operation import Added, Adding, Clamp, Norm, Reader
from autoquant.nn.layer_output import After, LayerOutput, as_real, step_of, version_of

NORM = "layer_norm"
"""What follows a sum, beside a ReLU and nothing."""

_SUMS: dict[Any, bool] = {
    torch.add: False,
    Tensor.add: False,
    Tensor.__add__: False,
    Tensor.__radd__: False,
    Tensor.add_: True,
    Tensor.__iadd__: True,
}
"""Functions that add, and whether in place."""


@dataclass(frozen=True)
class Sum:
    """A call of torch that adds two tensors of one shape: ``first`` is written to in place."""

    first: Tensor
    second: Tensor
    inplace: bool


def sum_of(func: Any, args: tuple[Any, ...], kwargs: Any) -> Sum | None:
    """Return what a call of torch adds; None for other calls."""
    if func not in _SUMS or len(args) != 2 or kwargs:
        return None
    first, second = args
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return None
    if first.shape != second.shape or not first.dtype == second.dtype == torch.float32:
        return None
    return Sum(first, second, _SUMS[func])


def norm_of(func: Any, args: tuple[Any, ...], kwargs: Any) -> Norm | None:
    """Return the layer norm over the last axis that a call of torch makes of its first argument."""
    if func is not F.layer_norm or not args:
        return None
    names = ("normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, args[1:], strict=False)) | dict(kwargs or {})
    if tuple(given.get("normalized_shape", ())) != (args[0].shape[-1],):
        return None
    return Norm(given.get("weight"), given.get("bias"), float(given.get("eps", 1e-5)))


@dataclass(frozen=True)
class Plan:
    """What was seen to follow a layer whose output is added to another tensor.

    ``after`` the sum comes a ReLU, a layer norm (NORM) or nothing; the result is what ``readers``
    read first. ``keeps`` says that the sum itself is used, too, where a norm comes after it.
    """

    after: After
    readers: tuple[Any, ...]
    keeps: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a layer that is put off: its product, on bytes ``q``."""

    product: Adding
    q: Tensor
    bias: Tensor | None
    channels_last: bool
    after: After
    readers: Sequence[Reader]
    keeps: bool
    compute: Callable[[Tensor, After], Tensor] = field(compare=False)

    @property
    def form(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of the output."""
        shape = self.product.shape(self.q)
        if not self.channels_last:
            return shape, contiguous_stride(shape)
        batch, channels, *spatial = shape
        stride = contiguous_stride((batch, *spatial, channels))
        return shape, (stride[0], stride[-1], *stride[1:-1])

    def output(self) -> Tensor:
        """Return the layer's own output."""
        return self.compute(self.q, None)

    def total(self, other: Tensor, clamp: Clamp | None, readers: Sequence[Reader]) -> Added:
        """Return the output plus ``other``, in one pass where the product can."""
        found = self.product.added(self.q, self.bias, other, clamp, readers, self.channels_last)
        if found is not None:
            return found
        y = self.output() + other
        return Added(None, y if clamp is None else y.clamp_(*clamp), (None,) * len(readers))

    def normalized(self, other: Tensor, norm: Norm) -> Added | None:
        """Return the layer norm of the output plus ``other``."""
        return self.product.normalized(self.q, self.bias, other, norm, self.readers, self.keeps)


class Summand(LayerOutput):
    """The output of a layer whose call is put off until something is added, or looks at it.

    ``other`` is what was added. With a plan that something follows, the sum is put off, too.
    """

    call: Call
    other: Tensor | None
    _seen_other: int

    @staticmethod
    def put_off(call: Call) -> Summand:
        """Return the output of ``call``."""
        shape, stride = call.form
        y: Summand = Tensor._make_wrapper_subclass(
            Summand, shape, strides=stride, dtype=torch.float32, device=call.q.device
        )
        y.begin(None, call.q, None, call.compute, stride)
        y.call, y.other, y._seen_other = call, None, 0
        return y

    def dequantized(self) -> Tensor:
        """Return the real numbers: of the output, or of the sum."""
        if self._real is None and self.other is not None:
            self._see(self.call.total(self._whole(self.other), None, ()).real)
        return super().dequantized()

    def plus(self, other: Tensor, *, inplace: bool) -> LayerOutput | None:
        """Return the sum with ``other``; None where the output was looked at, or changed."""
        if self.seen or self.changes or self.other is not None:
            return None
        other = as_real(other)
        if other.requires_grad and torch.is_grad_enabled():
            return None
        waits = self.call.after is not None
        if not waits:
            found = self.call.total(other, None, self.call.readers)
            if inplace:
                self.changes += 1
                self.finish(found.real, self.call.readers, found.integers)
                return self
            return finished(found.real, self.call.readers, found.integers)
        y = self
        if inplace:
            self.changes += 1
        else:
            y = Summand.put_off(self.call)
        y.other, y._seen_other = other, version_of(other)
        return y

    def then(self, clamp: Clamp, *, inplace: bool) -> LayerOutput | None:
        """Return the sum after its ReLU; None where that is not what was expected."""
        if self.other is None or self.seen or clamp != self.call.after:
            return None
        found = self.call.total(self._whole(self.other), clamp, self.call.readers)
        if inplace:
            self.changes += 1
            self.finish(found.real, self.call.readers, found.integers)
            return self
        return finished(found.real, self.call.readers, found.integers)

    def normed(self, norm: Norm) -> LayerOutput | None:
        """Return the layer norm of the sum; None where that is not what was expected."""
        if self.other is None or self.seen or self.call.after != NORM:
            return None
        found = self.call.normalized(self._whole(self.other), norm)
        if found is None:
            return None
        if found.total is not None:
            self._see(found.total)
        return finished(found.real, self.call.readers, found.integers)

    def _whole(self, other: Tensor) -> Tensor:
        """Return what was added, which nobody may have written into since."""
        if version_of(other) != self._seen_other:
            raise RuntimeError(
                "a tensor was written into after it was added to a layer's output, before the sum "
                "was used: give --backend eager"
            )
        return other

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what was expected; for all else put the real numbers in its place."""
        found = _expected(func, args, kwargs)
        if found is not None:
            return found
        return super().__torch_function__(func, types, args, kwargs)


def finished(
    real: Tensor, readers: Sequence[Reader], integers: Sequence[Tensor | None]
) -> LayerOutput:
    """Return real numbers of which the integers of some readers are known."""
    y: LayerOutput = Tensor._make_wrapper_subclass(
        LayerOutput, real.shape, strides=real.stride(), dtype=torch.float32, device=real.device
    )
    y.begin(None, real, None, lambda x, _: x, real.stride())
    y.finish(real, readers, integers)
    return y


def _expected(func: Any, args: tuple[Any, ...], kwargs: Any) -> LayerOutput | None:
    added = sum_of(func, args, kwargs)
    if added is not None:
        if isinstance(added.first, Summand):
            found = added.first.plus(added.second, inplace=added.inplace)
            if found is not None:
                return found
        if isinstance(added.second, Summand) and not added.inplace:
            return added.second.plus(added.first, inplace=False)
        return None
    if not args or not isinstance(args[0], Summand):
        return None
    norm = norm_of(func, args, kwargs)
    if norm is not None:
        return args[0].normed(norm)
    step = step_of(func, args, kwargs)
    if step is not None and isinstance(step.after, tuple):
        return args[0].then(step.after, inplace=step.inplace)
    return None
