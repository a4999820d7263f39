"""Coordinate descent: from GPTQ on, weights and scales are improved in turn, one at a time.

With G the second moments of the layer's input, the output error of a channel is δ·G·δᵀ, a quadratic
in each of its weights: its best integer, all others given, is the rounded minimum of a parabola;
and its best scale, integers given, is a regression on one number. Each step lowers the error or
leaves it. Sources: Nair & Suggala 2024 (CDQuant, arXiv 2406.17542) for the descent, Frantar et al.
2022 (GPTQ, arXiv 2210.17323) for the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.methods.rounding.gptq import GPTQ
from autoquant.spec.need import Need
from autoquant.spec.techniques import ROUNDINGS, Rounding, option

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.methods.problem import SiteProblem
    from autoquant.quant.affine import QParams
    from autoquant.quant.weight import QuantizedWeight


COLUMNS = 64
"""Inputs whose weights are taken in turn before the rest hears of it."""


@ROUNDINGS.register("coordinate_descent")
@dataclass(frozen=True)
class CoordinateDescent(Rounding):
    """Begin with GPTQ, then improve scales and single weights in turn, ``passes`` times.

    ``damping`` is GPTQ's, added to the moments for the descent too: less is fitted to samples.
    """

    method: ClassVar[str] = "coordinate_descent"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MOMENTS})
    damping: float = option(0.01, 1e-6, 10.0)
    passes: int = option(2, 1, 100)

    def fit(self, problem: SiteProblem) -> QuantizedWeight:
        """Return the weight after all passes; GPTQ's where inputs are not correlated."""
        start = GPTQ(self.damping).fit(problem)
        moments = problem.moments
        if moments is None or moments.dim() == 2:
            return start
        return descend(problem, start, moments, self.damping, self.passes)


def descend(
    problem: SiteProblem, start: QuantizedWeight, moments: Tensor, damping: float, passes: int
) -> QuantizedWeight:
    """Return ``start`` improved under damped ``moments`` [groups, n, n].

    Scales are changed where each channel has one of its own, and its zero point is 0.
    """
    import torch

    p = start.qparams
    groups, n = moments.shape[0], moments.shape[1]
    tiny = torch.finfo(moments.dtype).tiny
    power = torch.diagonal(moments, dim1=1, dim2=2)
    curve = power + damping * power.mean(1, keepdim=True)
    g = moments + torch.diag_embed(curve - power)

    def grouped(x: Tensor) -> Tensor:
        """Return [channels, n] as [groups, n, channels of one]: an input's weights lie together."""
        return x.reshape(groups, -1, n).mT.contiguous()

    weight, zero = grouped(problem.matrix), grouped(problem.each(p.zero_point))
    q, scale = grouped(start.q.float()) - zero, grouped(problem.each(p.scale))
    low, high = p.qmin - zero, p.qmax - zero
    rescales = p.symmetric and p.scale.shape[0] == problem.matrix.shape[0]
    inverse = 1.0 / curve.clamp(min=tiny)[:, :, None]
    inverse[curve <= 0] = 0.0  # an input that is always 0 says nothing
    for _ in range(passes):
        if rescales:
            scale = _rescaled(weight, q, g, scale).expand_as(q)
        pull = g @ (weight - q * scale)  # what the error asks of each weight
        for first in range(0, n, COLUMNS):
            block = slice(first, min(first + COLUMNS, n))
            near, before = pull[:, block].clone(), q[:, block].clone()
            for i in range(first, block.stop):
                wanted = near[:, i - first] * inverse[:, i] / scale[:, i]
                wanted = wanted.add_(q[:, i]).round_()
                wanted = torch.maximum(torch.minimum(wanted, high[:, i]), low[:, i])
                moved = (wanted - q[:, i]) * scale[:, i]
                near.baddbmm_(g[:, block, i, None], moved[:, None], alpha=-1.0)
                q[:, i] = wanted
            # What those of the block did to all others is one product of matrices.
            pull -= g[:, :, block] @ ((q[:, block] - before) * scale[:, block])
    integers = (q + zero).mT.reshape(problem.matrix.shape)
    return problem.rounded(integers, _qparams(p, scale) if rescales else p)


def _rescaled(weight: Tensor, q: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """Return for each channel the scale with the least error, the old one where there is none."""
    import torch

    from autoquant.quant.affine import TINY

    turned = g @ q
    above, below = (turned * weight).sum(1, keepdim=True), (turned * q).sum(1, keepdim=True)
    best = above / below.clamp(min=torch.finfo(g.dtype).tiny)
    return torch.where((best >= TINY) & (below > 0) & best.isfinite(), best, scale[:, :1])


def _qparams(p: QParams, scale: Tensor) -> QParams:
    from autoquant.quant.affine import QParams

    return QParams(scale[:, 0].reshape(-1, 1).contiguous(), p.zero_point, p.bits, p.symmetric)
