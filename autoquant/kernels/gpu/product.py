"""What products of integers on a GPU share: they read int8, hand int8 on, and add."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoquant.kernels.gpu.adding import added, can_add, is_norm, normalized
from autoquant.kernels.gpu.integers import IntegerActivation, IntegerWeight
from autoquant.kernels.gpu.launch import takes
from autoquant.kernels.gpu.reading import PIXELS, ROWS, DeviceReader, Ending, ending, is_bias
from autoquant.kernels.gpu.reading import stored as stored_by
from autoquant.kernels.operation import Added, Adding, Clamp, Norm, Reader


@dataclass(frozen=True, slots=True)
class IntegerProduct(Adding, ABC):
    """A weight and an activation as integers.

    By a static scheme it takes int8 and hands int8 on, both as ``layout`` says.
    """

    weight: IntegerWeight
    activation: IntegerActivation
    backend: ClassVar[str] = "triton"
    layout: ClassVar[str]

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return the float32 output; None for another dtype or shape, no numbers, a gradient."""
        if not self._is_taken(x) or not takes(x, bias, self.weight.q, len(self.weight.scale)):
            return None
        q = self.stored(x)
        if q is None:
            return self._unchained(x.detach(), bias, Ending(clamp))
        return self._chained(q, bias, Ending(clamp), self._gives_channels_last(x))

    @property
    @abstractmethod
    def _width(self) -> int:
        """Bytes that a row or pixel of int8 takes."""

    @abstractmethod
    def _is_taken(self, x: Tensor) -> bool:
        """Return whether a real activation is one of the dtype and shape that it takes."""

    @abstractmethod
    def _chained(self, q: Tensor, bias: Tensor | None, end: Ending, last: bool) -> Tensor | None:
        """Return the output on int8, ended so, channels ``last`` where it has pixels.

        None where no cut of the kernel runs on this GPU.
        """

    @abstractmethod
    def _unchained(self, x: Tensor, bias: Tensor | None, end: Ending) -> Tensor | None:
        """Return the real output on a real activation, looking at its numbers: NaN stays NaN."""

    def _gives_channels_last(self, x: Tensor) -> bool:
        """Return whether the float layer returns channels last for ``x``."""
        return False

    def _lies_last(self, q: Tensor, channels_last: bool) -> bool:
        return channels_last and self.layout == PIXELS and q.dim() == 4

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the int8 of a real activation; None where nobody collects doubts (``doubt``)."""
        reader = self.reads
        if not isinstance(reader, DeviceReader) or not self._is_taken(x):
            return None
        if not takes(x, None, self.weight.q, 0):
            return None
        return stored_by(x, reader, self._width)

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return the float32 output on an activation's int8."""
        y = self._chained(q, bias, Ending(clamp), self._lies_last(q, channels_last))
        if y is None:
            raise RuntimeError("the GPU runs the product in none of its block sizes")
        return y

    def handed(
        self,
        q: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        reader: Reader,
        gelu: str | None = None,
    ) -> Tensor | None:
        """Return it as the int8 that ``reader`` makes of it, in the same pass."""
        end = ending(clamp, gelu, reader, self.layout, q)
        if end is None or not is_bias(bias, self.weight.scale):
            return None
        return self._chained(q, bias, end, True)

    def added(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        clamp: Clamp | None,
        readers: Sequence[Reader],
        channels_last: bool,
    ) -> Added | None:
        """Return it plus ``other``, clamped, as float32 and as int8, all in the same pass."""
        last = self._lies_last(q, channels_last)
        if not self._can_add(q, bias, other, last):
            return None
        layout = self.layout
        return added(lambda end: self._chained(q, bias, end, last), other, clamp, readers, layout)

    def normalized(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        norm: Norm,
        readers: Sequence[Reader],
        keeps: bool,
    ) -> Added | None:
        """Return the norm of it plus ``other``, as float32 and as int8, in a second pass.

        None where the last axis is not the channels.
        """
        if self.layout != ROWS or not is_norm(norm, self.weight.scale):
            return None
        if not self._can_add(q, bias, other, False):
            return None
        y = self._chained(q, bias, Ending(), False)
        return None if y is None else normalized(y, other, norm, readers, keeps)

    def _can_add(self, q: Tensor, bias: Tensor | None, other: Tensor, last: bool) -> bool:
        return is_bias(bias, self.weight.scale) and can_add(other, self.shape(q), last, q)
