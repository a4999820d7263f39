"""Linear layers with packed weights of 2 to 8 bits on float activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.packed import packed_matmul, packed_vector
from autoquant.kernels.gpu.launch import (
    MAX_ROWS,
    Config,
    ceil_div,
    clamped,
    config,
    launch,
    takes,
)
from autoquant.kernels.gpu.planes import SPANS, pack
from autoquant.kernels.gpu.tuning import bucket, tuned
from autoquant.kernels.operation import Clamp
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.granularity import group_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW_ROWS = 4
"""Up to so many rows every row reads the weight for itself, from the L2 cache after the first."""
VECTOR = (
    config(BLOCK_N=8, warps=2, stages=3),
    config(BLOCK_N=4, warps=1, stages=3),
    config(BLOCK_N=4, warps=4, stages=3),
    config(BLOCK_N=8, warps=4, stages=2),
    config(BLOCK_N=16, warps=4, stages=3),
    config(BLOCK_N=32, warps=4, stages=2),
)
MATRIX = (
    config(BLOCK_M=16, BLOCK_N=32, warps=4, stages=3),
    config(BLOCK_M=16, BLOCK_N=64, warps=4, stages=3),
    config(BLOCK_M=32, BLOCK_N=64, warps=4, stages=2),
    config(BLOCK_M=64, BLOCK_N=64, warps=4, stages=2),
    config(BLOCK_M=64, BLOCK_N=128, warps=8, stages=2),
    config(BLOCK_M=128, BLOCK_N=128, warps=8, stages=2),
    config(BLOCK_M=16, BLOCK_N=32, warps=4, stages=1),
    config(BLOCK_M=32, BLOCK_N=32, warps=4, stages=1),
)
"""The last ones fit into the shared memory of a small GPU, whatever the dtype."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """x [..., K] · weight [N, K]; the weight is packed, the activation is float.

    ``packed`` is uint8 [N, chunks, bits · span] (see ``planes``); ``scale`` and ``zero`` are
    float32 [N, groups], one for every ``group`` inputs.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    span: int
    group: int
    columns: int
    backend: str = "triton"

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return [..., N] in the dtype of ``x``, accumulated in float32.

        None for dtypes other than float32, float16, bfloat16, an empty activation, a gradient.
        """
        outputs = self.packed.shape[0]
        if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] != self.columns:
            return None
        if not takes(x, bias, self.packed, outputs) or x.numel() // self.columns > MAX_ROWS:
            return None
        rows = x.detach().reshape(-1, self.columns).contiguous()
        m = rows.shape[0]
        out = torch.empty(m, outputs, dtype=x.dtype, device=x.device)
        few = m <= FEW_ROWS
        if not few and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            return None  # Triton's interpreter multiplies the bits of bfloat16 matrices
        shift = rows if bias is None else bias.detach().contiguous()
        chunks, groups = self.packed.shape[1], self.scale.shape[1]

        def run(c: Config) -> None:
            tiles = ceil_div(outputs, c.block("BLOCK_N"))
            launch(
                packed_vector if few else packed_matmul,
                (tiles, m) if few else (ceil_div(m, c.block("BLOCK_M")), tiles),
                rows,
                self.packed,
                self.scale,
                self.zero,
                shift,
                out,
                m,
                outputs,
                self.columns,
                chunks,
                groups,
                HAS_BIAS=bias is not None,
                BITS=self.bits,
                SPAN=self.span,
                GROUP_SPANS=0 if groups == 1 else self.group // self.span,
                **c.arguments(),
            )

        name = "packed vector" if few else "packed matmul"
        shape = (bucket(m), outputs, self.columns, self.bits, self.group, x.dtype.itemsize)
        if tuned(name, shape, VECTOR if few else MATRIX, run, x.device) is None:
            return None
        return clamped(out, clamp).view(*x.shape[:-1], outputs)


def weight_only_product(weight: QuantizedWeight, device: torch.device) -> PackedLinear | None:
    """Return the product of a linear layer whose activation stays in float.

    None where a group is no multiple of 16, which is what one load unpacks.
    """
    channels, columns = weight.q.shape
    group = group_size(weight.scheme.granularity) or columns
    span = _span(columns, group)
    if span is None:
        return None
    scale = weight.qparams.scale.to(device, torch.float32)
    zero = weight.qparams.zero_point.to(device, torch.float32)
    groups = max(scale.numel() // channels, 1)
    return PackedLinear(
        pack(weight.q.to(device), weight.qparams.bits, span),
        scale.view(-1, groups).expand(channels, groups).contiguous(),
        zero.view(-1, groups).expand(channels, groups).contiguous(),
        weight.qparams.bits,
        span,
        group,
        columns,
    )


def _span(columns: int, group: int) -> int | None:
    """Return how many neighbouring inputs are unpacked together: the most that fits K best.

    They share one scale, so they divide a group, unless there is one for the whole channel.
    """
    fitting = [s for s in (64, 32, 16) if group == columns or group % s == 0]
    return min(fitting, key=lambda s: (-columns % (SPANS * s), -s)) if fitting else None
