"""GPTQ: weights are rounded one input after another, and those not yet rounded make up for it.

With H the second moments of the layer's input, rounding one column by e changes the output least
if the columns after it move by −e·U[i, i:] / U[i, i], where U is the upper Cholesky factor of H⁻¹.
Sources: Frantar et al. 2022, arXiv 2210.17323, section 3 (the order, the factor, the damping);
Frantar & Alistarh 2022, arXiv 2208.11580, and Hassibi & Stork 1993 for the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.need import Need
from autoquant.spec.techniques import ROUNDINGS, Rounding, option

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.methods.problem import SiteProblem
    from autoquant.quant.weight import QuantizedWeight

COLUMNS = 32
"""Columns whose errors are handed on together to those behind them."""
DEAD = 1e-9
"""Power of an input, as a share of the mean of all, up to which it is none but rounding errors."""
HARDER = 10.0
"""By how much the damping grows where the moments are singular all the same."""
ATTEMPTS = 6
"""How often it may grow."""


@ROUNDINGS.register("gptq")
@dataclass(frozen=True)
class GPTQ(Rounding):
    """Round inputs one by one, the strongest first, and make up for each in those that follow.

    ``damping`` is added to the diagonal of the moments, as a share of its mean. ``act_order`` takes
    inputs in order of their power, strongest first; without it, as they come.
    """

    method: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MOMENTS})
    damping: float = option(0.01, 1e-6, 10.0)
    act_order: bool = True

    def fit(self, problem: SiteProblem) -> QuantizedWeight:
        """Return the weight on its own grid; the nearest where inputs are not correlated."""
        moments = problem.moments
        if moments is None or moments.dim() == 2 or moments.shape[-1] == 1:
            return problem.nearest  # nothing of one input can be made up for by another
        order, factor = problem.once(
            self, lambda: _ordered_factor(moments.double(), self.damping, self.act_order)
        )
        return problem.rounded(_sweep(problem, order, factor))


def _ordered_factor(moments: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """Return the order of the inputs [groups, n] and U [groups, n, n], float32, in that order."""
    import torch

    groups, n = moments.shape[0], moments.shape[1]
    order = torch.arange(n, device=moments.device).expand(groups, n)
    if act_order:
        power = torch.diagonal(moments, dim1=1, dim2=2)
        order = power.argsort(dim=1, descending=True, stable=True)
    rows = moments.gather(1, order[:, :, None].expand_as(moments))
    return order, _factor(rows.gather(2, order[:, None].expand_as(rows)), damping).float()


def _sweep(problem: SiteProblem, order: Tensor, factor: Tensor) -> Tensor:
    """Return the integers [channels, n]: one input after another, in ``order``."""
    import torch

    p = problem.nearest.qparams
    groups, n = order.shape

    def grouped(x: Tensor) -> Tensor:
        """Return [channels, n] as [groups, n, channels of one], inputs in order."""
        parts = x.reshape(groups, -1, n).mT
        return parts.gather(1, order[:, :, None].expand_as(parts)).contiguous()

    weight = grouped(problem.matrix)
    scale, zero = grouped(problem.each(p.scale)), grouped(problem.each(p.zero_point))
    q = torch.empty_like(weight)
    for start in range(0, n, COLUMNS):
        stop = min(start + COLUMNS, n)
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            position = (weight[:, i] / scale[:, i]).round_().add_(zero[:, i])
            q[:, i] = position.clamp_(p.qmin, p.qmax)
            real = (q[:, i] - zero[:, i]) * scale[:, i]
            errors[:, i - start] = error = (weight[:, i] - real) / factor[:, i, i, None]
            weight[:, i + 1 : stop] -= factor[:, i, i + 1 : stop, None] * error[:, None]
        weight[:, stop:] -= factor[:, start:stop, stop:].mT @ errors
    found = torch.empty_like(q).scatter_(1, order[:, :, None].expand_as(q), q)
    return found.mT.reshape(problem.matrix.shape).to(torch.int8)


def _factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped ``moments`` [groups, n, n].

    Inputs that (almost) never differ stand alone. Where rounding errors leave the moments with
    negative eigenvalues, they are damped more.
    """
    import torch

    power = torch.diagonal(moments, dim1=1, dim2=2)
    mean = power.mean(1, keepdim=True)
    dead = (power <= DEAD * mean) | (mean <= 0)
    least = mean.clamp(min=torch.finfo(torch.float64).tiny)
    for attempt in range(ATTEMPTS):
        added = least * damping * HARDER**attempt
        added = torch.where(dead, least.clamp(min=1.0), added)
        root, failed = torch.linalg.cholesky_ex(moments + torch.diag_embed(added))
        if not bool(failed.any()):
            break
    else:
        raise torch.linalg.LinAlgError("the second moments of the input are not positive")
    inverse = torch.cholesky_inverse(root)
    return torch.linalg.cholesky(inverse, upper=True)
