"""Replaying a call by a CUDA graph: all of its kernels at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARMUP = 3
"""Calls before the capture: kernels are compiled and chosen, and libraries allocate."""

Call = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Captured:
    """One captured call: the graph, the inputs it reads and the output it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output on other inputs of the same shapes, as a tensor of its own."""
        for static, new in zip(self.inputs, inputs, strict=True):
            static.copy_(new)
        self.graph.replay()
        return self.output.clone()


class Replayed:
    """Calls a function of tensors, by a CUDA graph from the second call of a shape on.

    ``function`` must compute the same kernels on every call of one shape, depend on nothing but its
    inputs and tensors that stay where they are, and return one tensor. Whatever cannot be captured
    (a CPU tensor, a synchronization, a copy to the host) is simply called. At most ``most`` shapes
    are captured, since each keeps its memory. Gradients are not recorded.
    """

    def __init__(self, function: Call, most: int = 8) -> None:
        self.function = function
        self.most = most
        self._captured: dict[tuple[object, ...], Captured | None] = {}
        self._seen: set[tuple[object, ...]] = set()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's output."""
        if not inputs or any(x.device.type != "cuda" for x in inputs):
            return self.function(*inputs)
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        if key not in self._seen:
            self._seen.add(key)
            return self.function(*inputs)
        if key not in self._captured:
            if len(self._captured) >= self.most:
                return self.function(*inputs)
            self._captured[key] = capture(self.function, inputs)
        captured = self._captured[key]
        return self.function(*inputs) if captured is None else captured.replay(inputs)


def capture(function: Call, inputs: tuple[Tensor, ...]) -> Captured | None:
    """Return ``function`` captured on inputs like these, on CUDA; None where it cannot be."""
    try:
        with torch.no_grad(), torch.cuda.device(inputs[0].device):
            static = tuple(_same_layout(x) for x in inputs)
            # Warming up on a stream of its own is what torch asks for before a capture.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    function(*static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = function(*static)
        return Captured(graph, static, output) if isinstance(output, Tensor) else None
    except (RuntimeError, AssertionError):
        # A function that fails of itself fails again, and visibly, when it is called.
        return None


def _same_layout(x: Tensor) -> Tensor:
    """Return a copy of ``x`` with its strides; where they overlap, with dense ones."""
    return x.detach().clone(memory_format=torch.preserve_format)
