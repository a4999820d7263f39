"""Learned rounding: each weight goes up or down so that the layer's output changes least.

With X the inputs that calibration saw and G = E[x·xᵀ], the output error of a rounded weight is
tr(ΔW·G·ΔWᵀ): exact for the layer, and free of the data once G is known. Rounding offsets in
[−½, ½] and the logarithm of each scale are learned by Adam through a straight-through estimator.
Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568) for the objective; Cheng et al. 2023
(SignRound, arXiv 2309.05516) for offsets learned directly; Frantar et al. 2022 (GPTQ,
arXiv 2210.17323) for the second-moment form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autoquant.nn.sites import Site
from autoquant.nn.weights import quantize_weight
from autoquant.observers.output_error import OutputError
from autoquant.quant.affine import TINY, QParams
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import WeightScheme

STEPS = 120
"""Gradient steps for each layer."""


def output_error(delta: Tensor, moments: Tensor | None) -> Tensor:
    """Return the mean squared output error, summed over channels, of a weight error.

    ``delta`` is [channels, n]; ``moments`` E[x·xᵀ] [groups, n, n], its diagonal [groups, n], or
    None where rows are read one by one.
    """
    if moments is None:
        return delta.square().sum()
    grouped = delta.reshape(len(moments), -1, delta.shape[1])
    if moments.dim() == 2:
        return (grouped.square() * moments[:, None]).sum()
    return ((grouped @ moments) * grouped).sum()


def learn_rounding(
    weight: Tensor,
    site: Site,
    scheme: WeightScheme,
    moments: Tensor | None,
    learning_rate: float,
    steps: int = STEPS,
    error: OutputError | None = None,
) -> QuantizedWeight:
    """Return ``weight`` quantized with learned rounding and scales; never worse than nearest.

    ``learning_rate`` is Adam's, in grid steps for the offsets and in units of ln(scale) ÷ 10 for
    the scales; ``error`` serves to find the first scales. Deterministic: the data are in
    ``moments``, and nothing is drawn at random.
    """
    nearest = quantize_weight(weight, site, scheme, error)
    matrix = to_matrix(weight.detach().to(torch.float32), site.channel_axis)
    signal = output_error(matrix, moments).clamp(min=TINY)
    start = nearest.qparams
    with torch.enable_grad():
        offset = torch.zeros_like(to_blocks(matrix, scheme.granularity), requires_grad=True)
        log_scale = torch.zeros_like(start.scale, requires_grad=True)
        parameters = [
            {"params": [offset], "lr": learning_rate},
            {"params": [log_scale], "lr": learning_rate / 10},
        ]
        optimizer = torch.optim.Adam(parameters)
        best_error = output_error(nearest.matrix() - matrix, moments) / signal
        best = nearest
        for step in range(steps):
            rate = 1.0 - step / steps
            for group, full in zip(optimizer.param_groups, (1.0, 0.1), strict=True):
                group["lr"] = learning_rate * full * rate
            q, real = _round(matrix, scheme, start, offset, log_scale)
            found = output_error(real - matrix, moments) / signal
            if found.item() < best_error.item():
                scale = (start.scale * log_scale.detach().exp()).clone()
                qparams = QParams(scale, start.zero_point, start.bits, start.symmetric)
                best = replace(nearest, q=q, qparams=qparams)
                best_error = found.detach()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            with torch.no_grad():
                offset.clamp_(-0.5, 0.5)
    return best


def _round(
    matrix: Tensor, scheme: WeightScheme, start: QParams, offset: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the integers (int8, detached) and the real numbers that gradients flow through."""
    blocks = to_blocks(matrix, scheme.granularity)
    scale = start.scale * log_scale.exp()
    position = blocks / scale + offset
    rounded = position + (position.round() - position).detach()
    low, high = start.qmin - start.zero_point, start.qmax - start.zero_point
    clipped = torch.maximum(torch.minimum(rounded, high), low)
    shape = (matrix.shape[0], matrix.shape[1])
    integers = (clipped.detach().round() + start.zero_point).to(torch.int8)
    return from_blocks(integers, shape), from_blocks(clipped * scale, shape)
