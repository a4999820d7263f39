"""A linear layer in fp8 (e4m3) on GPUs that multiply it: not a format of recipes yet."""

from __future__ import annotations

import torch
from torch import Tensor

CAPABILITY = (8, 9)
"""Least compute capability with fp8 tensor cores."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def has_fp8(device: torch.device) -> bool:
    """Return whether ``device`` multiplies fp8 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` as float8_e4m3fn and the float32 scale (no axes) that it was divided by."""
    largest = x.detach().abs().amax().to(torch.float32)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    q = (x.to(torch.float32) / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return q, scale


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · (weight · scale)ᵀ + bias, bfloat16 [M, N], by fp8 tensor cores.

    ``x`` is float [M, K] and quantized here with one scale; ``weight`` float8_e4m3fn [N, K] and
    ``scale`` come from ``to_fp8``; ``bias`` is bfloat16 [N]. K and N must be multiples of 16.
    """
    q, x_scale = to_fp8(x)
    return torch._scaled_mm(
        q, weight.T, scale_a=x_scale, scale_b=scale, bias=bias, out_dtype=torch.bfloat16
    )
