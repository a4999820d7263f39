"""Learned rounding: each weight goes up or down so that the layer's output changes least.

With X the inputs that calibration saw and G = E[x·xᵀ], the output error of a rounded weight is
tr(ΔW·G·ΔWᵀ): exact for the layer, and free of the data once G is known. Rounding offsets in
[−½, ½] and the logarithm of each scale are learned by Adam through a straight-through estimator.
Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568) for the objective; Cheng et al. 2023
(SignRound, arXiv 2309.05516) for offsets learned directly; Frantar et al. 2022 (GPTQ,
arXiv 2210.17323) for the second-moment form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.need import Need
from autoquant.spec.techniques import ROUNDINGS, Rounding, option

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.methods.problem import SiteProblem
    from autoquant.quant.affine import QParams
    from autoquant.quant.weight import QuantizedWeight

STEPS = 120
"""Gradient steps for each layer."""


@ROUNDINGS.register("learned_rounding")
@dataclass(frozen=True)
class LearnedRounding(Rounding):
    """Learn offsets of the rounding, and the scales, by gradients of the layer's output error.

    ``learning_rate`` is Adam's, in grid steps for the offsets and in units of ln(scale) ÷ 10 for
    the scales.
    """

    method: ClassVar[str] = "learned_rounding"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MOMENTS})
    learning_rate: float = option(0.01, 0.0, above=True)

    def fit(self, problem: SiteProblem) -> QuantizedWeight:
        """Return the best weight of ``STEPS`` steps."""
        return learn(problem, self.learning_rate)


def learn(problem: SiteProblem, learning_rate: float, steps: int = STEPS) -> QuantizedWeight:
    """Return the weight with the least output error of all ``steps``, the nearest among them.

    Deterministic: the data are in the moments, and nothing is drawn at random.
    """
    import torch

    from autoquant.observers.output_error import exact_output_error
    from autoquant.quant.affine import QParams

    matrix, moments, signal = problem.matrix, problem.moments, problem.signal
    start = problem.nearest.qparams
    best, least = problem.nearest, problem.error(problem.nearest) / signal
    with torch.enable_grad():
        offset = torch.zeros_like(problem.blocks(), requires_grad=True)
        log_scale = torch.zeros_like(start.scale, requires_grad=True)
        parameters = [
            {"params": [offset], "lr": learning_rate},
            {"params": [log_scale], "lr": learning_rate / 10},
        ]
        optimizer = torch.optim.Adam(parameters)
        for step in range(steps):
            rate = 1.0 - step / steps
            for group, full in zip(optimizer.param_groups, (1.0, 0.1), strict=True):
                group["lr"] = learning_rate * full * rate
            q, real = _round(problem, start, offset, log_scale)
            found = exact_output_error(real - matrix, moments) / signal
            if found.item() < least:
                scale = (start.scale * log_scale.detach().exp()).clone()
                own = QParams(scale, start.zero_point, start.bits, start.symmetric)
                best, least = problem.rounded(q, own), found.item()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            with torch.no_grad():
                offset.clamp_(-0.5, 0.5)
    return best


def _round(
    problem: SiteProblem, start: QParams, offset: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the integers (int8, detached) and the real numbers that gradients flow through."""
    import torch

    from autoquant.quant.blocks import from_blocks

    scale = start.scale * log_scale.exp()
    position = problem.blocks() / scale + offset
    rounded = position + (position.round() - position).detach()
    low, high = start.qmin - start.zero_point, start.qmax - start.zero_point
    clipped = torch.maximum(torch.minimum(rounded, high), low)
    shape = (problem.matrix.shape[0], problem.matrix.shape[1])
    integers = (clipped.detach().round() + start.zero_point).to(torch.int8)
    return from_blocks(integers, shape), from_blocks(clipped * scale, shape)
