"""Fake quantization whose scale is trained, with the gradients of an estimator.

Scales are trained as their logarithms: they stay positive, and a step changes each by a share of
itself, whatever it measures (Jain et al. 2020, arXiv 1903.08066). Zero points stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoquant.quant.affine import TINY
from autoquant.spec.techniques import Estimator

FAR = 2.0**24
"""Where positions end for estimators, far beyond any grid: products with them stay finite."""


def scale_of(log_scale: Tensor) -> Tensor:
    """Return the scales of ``log_scale``, none smaller than the smallest that quantizes."""
    return log_scale.exp().clamp_(min=TINY)


def fake_quantize_trained(
    x: Tensor,
    log_scale: Tensor,
    zero_point: Tensor | float,
    lo_int: int,
    hi_int: int,
    estimator: Estimator,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``x`` quantized to ``lo_int`` … ``hi_int`` and dequantized, in its own dtype.

    ``log_scale`` is float32 and broadcasts against ``x``: () for a tensor, [channels, 1] for a
    matrix, [blocks, 1] for blocks. ``zero_point`` is integer-valued, of the same shape or one for
    all; a plain number, as 0 where the scheme is symmetric, is faster. Where ``estimator`` rounds
    to nearest these are the numbers of ``fake_quantize`` with the scales ``scale_of(log_scale)``,
    bit for bit. It draws from ``generator``, of the device of ``x``; None outside training.

    Gradients of ``x`` and ``log_scale`` are the estimator's. They can be differentiated once more
    by the gradient that comes in; positions and scales count as constants then. Of ``x`` only
    itself is kept until backward, and the integers (int16) where they were drawn.

    Raises ValueError where ``log_scale`` is not float32, or where shapes don't fit.
    """
    if log_scale.dtype != torch.float32:
        raise ValueError(f"log_scale is {log_scale.dtype}, not torch.float32")
    if not _broadcasts(log_scale.shape, x.shape):
        raise ValueError(f"scales of {[*log_scale.shape]} do not broadcast to {[*x.shape]}")
    if isinstance(zero_point, Tensor) and zero_point.shape not in (log_scale.shape, ()):
        raise ValueError(f"zero points of {[*zero_point.shape]}, scales of {[*log_scale.shape]}")
    result: Tensor = _Trained.apply(x, log_scale, zero_point, lo_int, hi_int, estimator, generator)
    return result


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Return whether a tensor of the shape ``small`` broadcasts to ``large`` as that is."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        zero_point: Tensor | float,
        lo_int: int,
        hi_int: int,
        estimator: Estimator,
        generator: torch.Generator | None,
    ) -> Tensor:
        scale = scale_of(log_scale)
        lo, hi = lo_int - zero_point, hi_int - zero_point
        r = (x.to(torch.float32) / scale).clamp_(lo, hi)  # type: ignore[arg-type]
        q = estimator.round(r, generator)
        drawn = q.to(torch.int16) if estimator.draws and generator is not None else None
        fixed = zero_point if isinstance(zero_point, Tensor) else None
        ctx.save_for_backward(x, scale, fixed, drawn)
        ctx.zero_point = zero_point if fixed is None else None
        ctx.grid, ctx.estimator = (lo_int, hi_int), estimator
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, drawn = ctx.saved_tensors
        if zero_point is None:
            zero_point = ctx.zero_point
        lo, hi = (end - zero_point for end in ctx.grid)
        estimator: Estimator = ctx.estimator
        with torch.no_grad():  # which holds where a graph of the gradient itself is made
            r = (x.to(torch.float32) / scale).clamp_(-FAR, FAR)
            q = estimator.round(r.clamp(lo, hi), None) if drawn is None else drawn.to(torch.float32)
        g = grads[0].to(torch.float32)
        passed = estimator.position(g, r, q, lo, hi)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            steps = estimator.step(g, r, q, lo, hi, passed).sum_to_size(scale.shape)
            factor = estimator.factor(x.numel() // max(scale.numel(), 1), lo, hi)
            # g was the gradient of scale · q, not of q.
            grad_scale = steps * (scale * factor)
        grad_x = passed.to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_scale, None, None, None, None, None
