"""A recorder for the CPU: what a CUDA graph does, and all that it does not allow.

Every operator that runs while a call is recorded is written down with the very tensors that it read
and wrote, as a CUDA graph holds their addresses; a replay runs the same operators on the same
memory, and no Python of the model. So numbers of Python are what they were when it was recorded. It
fails where the memory of a tensor moved since, and refuses to record what waits for the host: a
tensor made a number, and results whose size depends on numbers. Launches of Triton's interpreter
are written down like operators.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.kernels.engine import Engine
from autoquant.kernels.gpu.launch import observing
from autoquant.kernels.operation import Added, Norm, Operation, Reader
from autoquant.kernels.recording import CannotRecord, Work
from autoquant.quant.activation import fake_quantize_activation
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

READS = {"item", "tolist", "numpy", "__array__", "cpu", "__bool__", "__int__", "__float__"}
READS |= {"__index__", "__contains__", "nonzero", "is_nonzero", "equal", "allclose"}
"""Functions of Python by which the host reads numbers."""
HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Moved(AssertionError):
    """A recorded tensor is not where it was."""


@dataclass
class Tape:
    """What was recorded: steps in their order, and where all tensors lay."""

    steps: list[Callable[[], None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: list[tuple[Tensor, int]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def replay(self) -> None:
        for tensor, address in self.places:
            if tensor.data_ptr() != address:
                raise Moved(f"a tensor {tuple(tensor.shape)} moved")
        with torch.inference_mode():
            for step in self.steps:
                step()


class StandIn:
    """Records on the CPU. ``tapes`` are all that it made."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.tapes: list[Tape] = []

    def record(self, work: Work) -> Tape:
        tape = Tape()
        writer = _Writer(tape)

        def launched(name: str, run: Callable[[], None]) -> None:
            tape.steps.append(run)
            tape.names.append(name)

        with observing(launched), _Reads(), writer:
            tape.outputs = work()
        self.tapes.append(tape)
        return tape


class _Reads(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in READS:
            raise CannotRecord(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def _interpreting() -> bool:
    """Return whether Triton's interpreter is at work: its launch is recorded as one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "triton.runtime.interpreter":
            return True
        frame = frame.f_back
    return False


class _Writer(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _interpreting():
            return func(*args, **kwargs)
        if any(tag in func.tags for tag in HOST):
            raise CannotRecord(f"{func} waits for the host")
        made = func(*args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
        self.tape.places += [(x, x.data_ptr()) for x in (*given, *results)]
        owned = {x.untyped_storage().data_ptr() for x in given if x.numel()}
        fresh = [x for x in results if x.untyped_storage().data_ptr() not in owned]
        written = func._schema.is_mutable
        if not fresh and not written:  # a view: its memory is another's
            return made

        def step() -> None:
            again = func(*args, **kwargs)
            if written:
                return
            found = [x for x in pytree.tree_leaves(again) if isinstance(x, Tensor)]
            for to, of in zip(results, found, strict=True):
                to.copy_(of)

        self.tape.steps.append(step)
        self.tape.names.append(str(func))
        return made


@dataclass(frozen=True)
class EagerProduct:
    """A linear layer or convolution of a static scheme, by torch's operators on its own tensors."""

    operation: Operation
    weight: Tensor
    scale: Tensor
    zero: Tensor
    ends: tuple[Tensor, Tensor]
    backend: str = "eager"

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Any = None) -> Tensor:
        q = (x / self.scale).round().add(self.zero).clamp(*self.ends)
        return self.multiplied((q - self.zero) * self.scale, bias)

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.operation.kind == "linear":
            return torch.nn.functional.linear(x, self.weight, bias)
        o = self.operation
        convolve = getattr(torch.nn.functional, o.kind)
        return convolve(x, self.weight, bias, o.stride, o.padding, o.dilation, o.groups)


@dataclass(frozen=True, eq=False)
class EagerReader(Reader):
    """Makes the integers of one product's activation; equal where it is the very same."""

    product: EagerChain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EagerReader) and self.product.scale is other.product.scale

    def __hash__(self) -> int:
        return id(self.product.scale)

    def integers(self, x: Tensor) -> Tensor:
        p = self.product
        return (x / p.scale).round().add(p.zero).clamp(*p.ends).to(torch.int8)


@dataclass(frozen=True)
class EagerChain(EagerProduct):
    """The same, handing integers on, and adding residual connections."""

    @property
    def reads(self) -> EagerReader:
        return EagerReader(self)

    def stored(self, x: Tensor) -> Tensor:
        return self.reads.integers(x)

    def takes(self, q: Tensor) -> bool:
        return True

    def shape(self, q: Tensor) -> tuple[int, ...]:
        return tuple(self.multiplied(q.float(), None).shape)

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Any = None, channels_last: bool = False
    ) -> Tensor:
        y = self.multiplied((q.float() - self.zero) * self.scale, bias)
        y = y if clamp is None else y.clamp(*clamp)
        return y.contiguous(memory_format=torch.channels_last) if channels_last else y.contiguous()

    def handed(
        self, q: Tensor, bias: Tensor | None, clamp: Any, reader: Any, gelu: str | None = None
    ) -> Tensor:
        y = self.real(q, bias, clamp, q.dim() == 4)
        y = y if gelu is None else torch.nn.functional.gelu(y, approximate=gelu)
        return reader.integers(y)

    def added(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        clamp: Any,
        readers: Any,
        channels_last: bool,
    ) -> Added:
        ADDED.append("added")
        y = self.real(q, bias, None, channels_last) + other
        y = y if clamp is None else y.clamp(*clamp)
        return Added(None, y, tuple(r.integers(y) for r in readers))

    def normalized(
        self,
        q: Tensor,
        bias: Tensor | None,
        other: Tensor,
        norm: Norm,
        readers: Any,
        keeps: bool,
    ) -> Added:
        ADDED.append("normalized")
        total = self.real(q, bias) + other
        shape = total.shape[-1:]
        y = torch.nn.functional.layer_norm(total, shape, norm.weight, norm.bias, norm.eps)
        return Added(total if keeps else None, y, tuple(r.integers(y) for r in readers))


ADDED: list[str] = []
"""What products did beside handing on, in order."""


class EagerEngine(Engine):
    """Computes by EagerBackend and torch's operators alone: C code leaves nothing to record."""

    def __init__(self, product: type[EagerProduct] = EagerProduct) -> None:
        super().__init__((EagerBackend(product),))

    def fake_quantize(self, x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
        return fake_quantize_activation(x, scheme, kind)

    def gru_gates(self, x: Tensor, y: Tensor, h: Tensor) -> None:
        return None

    def lstm_gates(self, x: Tensor, y: Tensor, c: Tensor) -> None:
        return None


class EagerBackend:
    """Computes static schemes by EagerProduct: a backend whose products are data."""

    name = "eager"

    def __init__(self, product: type[EagerProduct]) -> None:
        self.product = product

    def missing(self, device: torch.device) -> str | None:
        return None

    def collecting(self, flag: Tensor) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, operation, weight, activation, device, transform=None):  # type: ignore[no-untyped-def]
        if activation is None or activation.scale is None or transform is not None:
            return None
        grid = FORMATS[activation.bits]
        return self.product(
            operation,
            weight.dequantize(torch.float32),
            torch.tensor(activation.scale),
            torch.tensor(float(activation.zero_point or 0)),
            (torch.tensor(float(grid.qmin)), torch.tensor(float(grid.qmax))),
        )
