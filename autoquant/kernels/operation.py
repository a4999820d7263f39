"""What a kernel is asked to compute, and what a backend is.

A product is one weight, packed once for one activation scheme. It computes what the reference does
(see ``reference``), or says that this call is not for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from autoquant.quant.smoothing import Smoothing
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme


@dataclass(frozen=True, slots=True)
class Operation:
    """How a weight meets its activation.

    ``kind`` is ``linear``, ``conv1d``, ``conv2d`` or ``conv3d``; the tuples have one entry for each
    spatial axis, and convolutions pad with zeros, the same on both sides.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


LINEAR = Operation("linear")


class Reader:
    """What a layer makes bytes of an activation by.

    Equal ones make the same bytes. Products know the readers of their own backend, and hand nothing
    to others.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SchemeReader(Reader):
    """Makes bytes by a static ``scheme``, after its smoothing."""

    scheme: ActivationScheme
    smoothing: Smoothing | None = None


Clamp = tuple[float, float]
"""Least and largest output: (0, ∞) is a ReLU, (0, 6) a ReLU6."""


class Product(Protocol):
    """One weight and one activation scheme, ready to be computed."""

    @property
    def backend(self) -> str:
        """Name of the backend that computes it."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return the layer's output on the activation ``x``, to which nothing was done yet.

        With ``clamp`` it is clamped.

        None says that this call has to be computed by the reference instead: another dtype than
        float32, NaN in the activation, a shape that the kernel can't take.
        """
        ...


class Chainable(Product, Protocol):
    """A product that takes its activation as bytes, and hands its output on as bytes.

    Between two layers it saves writing real numbers and reading them again. Bytes are the integers
    of a static activation scheme: uint8, all moved up by the same offset, or int8 as they are. How
    they lie is a backend's own business.
    """

    @property
    def reads(self) -> Reader | None:
        """What makes the bytes that it takes; None where nobody else can make them.

        That is where its scales follow from each activation, and where it rotates it.
        """
        ...

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the bytes of a real activation; None where this call is not for it."""
        ...

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with bytes of this shape."""
        ...

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return the layer's output on an activation's bytes, in the memory format asked for.

        The bytes may lie as they like; real numbers lie as the float layer's would, for code that
        takes a view of them: channels last where the activation they stand for is, else contiguous.
        """
        ...

    def handed(
        self,
        q: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        reader: Reader,
        gelu: str | None = None,
    ) -> Tensor | None:
        """Return that output, or its GELU of this approximation, as the bytes ``reader`` makes.

        Numbers next to the middle between two integers may go to either, as they may when they
        come from another backend. None where it can't be computed without doubt, and where
        ``reader`` is another backend's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm over the last axis: ``weight`` and ``bias`` [channels], where it has them."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Added:
    """A layer's output plus another tensor, and what comes after that.

    ``total`` is the sum as real numbers, None where that was not asked for; ``real`` what follows
    it, the sum itself where nothing does; ``integers`` are what each reader makes of ``real``, None
    for one that this backend does not serve.
    """

    total: Tensor | None
    real: Tensor
    integers: tuple[Tensor | None, ...]


class Adding(Chainable, Protocol):
    """A product that adds another tensor to its output in the same pass.

    That is a residual connection: what comes out is read by several layers and is real, too.
    """

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """Return the shape of the output on bytes ``q``."""
        ...

    def added(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        clamp: Clamp | None,
        readers: Sequence[Reader],
        channels_last: bool,
    ) -> Added | None:
        """Return the output on bytes ``q`` plus ``other``, clamped, for all ``readers``.

        ``other`` is float32 of the output's shape. None where this can't be computed so: other
        strides than the output would have, another device.
        """
        ...

    def normalized(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        norm: Norm,
        readers: Sequence[Reader],
        keeps: bool,
    ) -> Added | None:
        """Return the norm of the output on bytes ``q`` plus ``other``, for all ``readers``.

        The sum itself is wanted where it ``keeps``. None where this can't be computed so.
        """
        ...


def is_adding(product: Product | None) -> TypeGuard[Adding]:
    """Return whether a product can add another tensor to its output."""
    return hasattr(product, "added")


def is_chainable(product: Product | None) -> TypeGuard[Chainable]:
    """Return whether a product can be handed bytes; a protocol's own check is slow."""
    return hasattr(product, "handed")


class Backend(Protocol):
    """A way to compute products that is faster than the reference and never different."""

    @property
    def name(self) -> str:
        """What the backend is called in options and reports."""
        ...

    def missing(self, device: torch.device) -> str | None:
        """Return why nothing can be computed on ``device``, in one line; None where it can."""
        ...

    def collecting(self, flag: Tensor) -> AbstractContextManager[None]:
        """Let products hand on integers inside without looking at numbers.

        Where one can't be carried, ``flag``, int32 [1] on their device, is set to 1.
        """
        ...

    def prepare(
        self,
        operation: Operation,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        device: torch.device,
        transform: InputTransform | None = None,
    ) -> Product | None:
        """Pack a weight [out, in] or [out, in / groups, *kernel]; None where it is not for it.

        With a ``transform`` the product takes the activation as it is before that.
        """
        ...
