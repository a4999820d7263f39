"""The gates of recurrent layers in one pass, instead of an operator for each sum and function."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.kernels.cpu.library import call, library


def gru_gates(x: Tensor, y: Tensor, h: Tensor) -> Tensor | None:
    """Return a GRU's next state [rows, n] from the projections of its input and of its state.

    ``x`` and ``y`` are [rows, 3 n] with the gates reset, update, new, and ``h`` [rows, n]. None
    where the library is missing or the tensors are not float32 on a CPU, row after row.
    """
    if library() is None or not _takes(x, y, h) or y.shape[1] != 3 * h.shape[1]:
        return None
    out = torch.empty_like(h)
    call("gru_gates", x, y, h, out, *h.shape, x.stride(0))
    return out


def lstm_gates(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return an LSTM's next (state, cell), both [rows, n], before a projection of the state.

    ``x`` and ``y`` are [rows, 4 n] with the gates in, forget, new, out, and ``c`` [rows, n]. None
    where the library is missing or the tensors are not float32 on a CPU, row after row.
    """
    if library() is None or not _takes(x, y, c) or y.shape[1] != 4 * c.shape[1]:
        return None
    h, cell = torch.empty_like(c), torch.empty_like(c)
    call("lstm_gates", x, y, c, h, cell, *c.shape, x.stride(0))
    return h, cell


def _takes(x: Tensor, y: Tensor, state: Tensor) -> bool:
    return (
        all(
            t.dtype == torch.float32 and t.device.type == "cpu" and t.dim() == 2
            for t in (x, y, state)
        )
        and x.shape == y.shape
        and len(x) == len(state)
        and x.stride(1) == 1
        and y.is_contiguous()
        and state.is_contiguous()
        and not torch.is_grad_enabled()
    )
