"""The engine: which backend computes what, the fastest exact one first, and where the time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.errors import UserError
from autoquant.kernels.operation import Backend, Operation, Product
from autoquant.kernels.recording import Recorder
from autoquant.quant.activation import fake_quantize_activation, wants_gradient
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

NAMES = ("auto", "eager", "reference")
"""What a user can ask for: the fastest exact backends, these without recording what they compute,
or the reference alone."""
FLOAT = "float"
"""What layers are computed by that no backend takes: float32 on quantized, dequantized values."""


@dataclass(frozen=True)
class Share:
    """What one backend did: calls of layers, and the seconds that they took."""

    calls: int
    seconds: float


def recorded() -> bool:
    """Return whether torch follows what is computed: then nothing but its own operators may be.

    So it does while it traces or compiles, and in the transforms of torch.func (vmap, jacrev).
    """
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
    )


class Engine:
    """Backends in order, the fastest first; what none of them takes is computed in float.

    Without backends it is the reference. ``recorder`` records what they compute, where that is
    worth it: None where it is not, or can't be.
    """

    def __init__(
        self,
        backends: Sequence[Backend] = (),
        notes: Sequence[str] = (),
        recorder: Recorder | None = None,
    ) -> None:
        self.backends = tuple(backends)
        self.notes = tuple(notes)
        self.recorder = recorder
        self.fast = bool(self.backends)
        self._ran: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Compute as the reference does within the context: for numbers that will be reported."""
        before, self.fast = self.fast, False
        try:
            yield
        finally:
            self.fast = before

    def prepare(
        self,
        operation: Operation,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        device: torch.device,
        transform: InputTransform | None = None,
    ) -> Product | None:
        """Return the product of the first backend that takes it, None where float has to.

        With a ``transform`` the product takes the activation as it is before that.
        """
        for backend in self.backends:
            product = backend.prepare(operation, weight, activation, device, transform)
            if product is not None:
                return product
        return None

    def fake_quantize(self, x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
        """Return ``x`` quantized and dequantized: in one pass or several, the same numbers."""
        if x.device.type == "cpu" and not (recorded() or wants_gradient(x)):
            from autoquant.kernels.cpu.native import fake_quantize

            return fake_quantize(x, scheme, kind)
        return fake_quantize_activation(x, scheme, kind)

    def gru_gates(self, x: Tensor, y: Tensor, h: Tensor) -> Tensor | None:
        """Return a GRU's next state, None where the reference has to compute it."""
        if not self.fast or x.device.type != "cpu" or recorded() or wants_gradient(x, y, h):
            return None
        from autoquant.kernels.cpu.gates import gru_gates

        return gru_gates(x, y, h)

    def lstm_gates(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return an LSTM's next state and cell, None where the reference has to compute them."""
        if not self.fast or x.device.type != "cpu" or recorded() or wants_gradient(x, y, c):
            return None
        from autoquant.kernels.cpu.gates import lstm_gates

        return lstm_gates(x, y, c)

    @contextlib.contextmanager
    def collecting(self, flag: Tensor) -> Iterator[None]:
        """Let layers hand integers on that nobody can look at; ``flag``, int32 [1], becomes 1 where
        a number came up that they can't carry.
        """
        with contextlib.ExitStack() as stack:
            for backend in self.backends:
                stack.enter_context(backend.collecting(flag))
            yield

    def note(self, backend: str, seconds: float) -> None:
        """Count one call of a layer."""
        ran = self._ran.get(backend)
        if ran is None:
            ran = self._ran[backend] = [0, 0.0]
        ran[0] += 1
        ran[1] += seconds

    def shares(self) -> Mapping[str, Share]:
        """Return what each backend did since ``reset``, the busiest first."""
        rows = sorted(self._ran.items(), key=lambda row: -row[1][1])
        return {name: Share(int(calls), seconds) for name, (calls, seconds) in rows}

    def reset(self) -> None:
        """Forget what was counted."""
        self._ran.clear()


def make_engine(device: torch.device, name: str = "auto") -> Engine:
    """Return the engine for ``device``: every backend that runs there, the fastest first.

    Its notes say, a line each, what a user should know about it. Raises UserError on another name.
    """
    if name not in NAMES:
        raise UserError(f"--backend {name}: give one of {', '.join(NAMES)}")
    if name == "reference":
        return Engine()
    if device.type == "cpu":
        from autoquant.kernels.cpu.backend import CpuBackend

        backend = CpuBackend()
        missing = backend.missing(device)
        if missing is not None:
            return Engine(notes=(f"{missing}: candidates are computed in float, which is slower",))
        return Engine((backend,), backend.notes())
    from autoquant.kernels.gpu.backend import BACKEND

    missing = BACKEND.missing(device)
    if missing is not None:
        return Engine(notes=(f"{missing}: candidates are computed in float, which is slower",))
    if name == "eager":
        return Engine((BACKEND,))
    from autoquant.kernels.gpu.graphs import CudaRecorder

    return Engine((BACKEND,), recorder=CudaRecorder(device))
