"""Recording calls as CUDA graphs: all of their kernels at the cost of one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.kernels.recording import CannotRecord, Recorded, Work


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """A captured call, and the memory that its results are written to."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()


class CudaRecorder:
    """Captures calls on one GPU.

    All graphs share one pool of memory: they run one after the other, and what one returned must be
    copied before the next is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def record(self, work: Work) -> Recorded:
        """Capture ``work``, which was called before, so that its kernels are compiled.

        Raises CannotRecord where it synchronizes with the host, or does anything else that a graph
        can't hold.
        """
        try:
            with torch.cuda.device(self.device):
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    outputs = work()
            return CapturedGraph(graph, outputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            # What fails of itself fails again, and visibly, when it is called.
            raise CannotRecord(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    """Return what went wrong first: the end of a broken capture says only that it is broken."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__
