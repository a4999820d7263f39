"""Sequential reconstruction: each layer is fitted to what the quantized layers before it give.

Layers are taken in the order in which they run. X̂ is what a layer sees with all before it
quantized, its own activation too, X what it sees in the float model, in the same places. The weight
that makes the float model's output of X̂ is a regression, W*ᵀ = (G + λ)⁻¹·(c + λ)·Wᵀ with G the
covariance of X̂ and c that of X̂ with X; the ridge λ draws it to W where there are few rows for many
inputs. W* is then rounded under G, and the bias takes the rest of the mean error off. No gradient
is taken. Where ranges cut off a few large numbers that the outputs don't depend on, the rows that
hold them are far off, and would rule the fit: each row counts no more than a few ordinary ones do.
Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568, section 3.3) and Li et al. 2025
(GPTAQ, arXiv 2504.02692) for the asymmetric objective; Hubara et al. 2020 (arXiv 2006.10518) for
fitting weights to the quantized inputs; Huber 1964 (Annals of Mathematical Statistics 35) for
bounding what one observation does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from autoquant.methods.rounding.coordinate_descent import CoordinateDescent
from autoquant.spec.techniques import RECONSTRUCTIONS, UNCORRECTED, Reconstruction, option

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.methods.learned import LearnedWeight
    from autoquant.nn.sites import Site
    from autoquant.spec.recipe import WeightScheme


EVERY_ROW = 1e9
"""``far`` with which all rows count the same."""


@RECONSTRUCTIONS.register("sequential")
@dataclass(frozen=True)
class Sequential(Reconstruction):
    """Fit each layer in turn to the float model's output, on what the quantized ones before give.

    ``ridge`` is how strongly weights are drawn to the float ones: by so many rows more than there
    are, for each input; ``damping`` and ``passes`` are those of the rounding, coordinate descent. A
    row whose squared error is more than ``far`` times the median of all counts less, by as much.
    """

    method: ClassVar[str] = "sequential"
    ridge: float = option(200.0, 0.0, 1e9)
    damping: float = option(0.05, 1e-6, 10.0)
    passes: int = option(2, 1, 100)
    far: float = option(4.0, 1.0, EVERY_ROW)

    def fit(
        self,
        site: Site,
        scheme: WeightScheme,
        weight: Tensor,
        quantized: Tensor,
        clean: Tensor,
        rows: int,
    ) -> LearnedWeight:
        """Return the weight of one site.

        ``weight`` is float32 [channels, n]; ``quantized`` and ``clean`` are X̂ and X, float32
        [groups, rows, n], some of the ``rows`` that there were.
        """
        import torch

        from autoquant.methods.learned import LearnedWeight
        from autoquant.methods.problem import Bench
        from autoquant.nn.calibrate import SiteStatistics
        from autoquant.quant.blocks import from_matrix

        shares = shares_of(quantized, clean, self.far)
        wanted, moments = regress(
            weight, quantized, clean, shares, self.ridge / rows, centered=site.corrects
        )
        own = from_matrix(wanted, site.shape, site.channel_axis)
        # The grid is calibrated on W* under the same moments that it is rounded by.
        rounding = CoordinateDescent(self.damping, self.passes)
        grid = replace(scheme, calibration="output_mse", rounding=rounding)
        made = Bench(own, site, SiteStatistics(None, moments), UNCORRECTED).round(grid)
        shift = torch.zeros(0, dtype=torch.float32)
        if site.corrects:
            means = [_mean(x, shares)[:, 0] for x in (clean, quantized)]
            shift = _outputs(weight, means[0]) - _outputs(made.matrix(), means[1])
        p = made.qparams
        parts = (made.q, p.scale, p.zero_point, shift)
        return LearnedWeight(*(part.cpu().contiguous() for part in parts))


def shares_of(quantized: Tensor, clean: Tensor, far: float) -> Tensor:
    """Return what each row counts, float64 [groups, rows, 1], in sum 1 for each group.

    As much as any other, or less: w = min(1, ``far`` · median / e), with e the row's ‖x̂ − x‖².
    """
    errors = (quantized - clean).double().square().sum(2, keepdim=True)
    middle = errors.median(1, keepdim=True).values
    # Where most rows have no error at all, none can be told to be far off.
    weights = (far * middle / errors).clamp(max=1.0).where((middle > 0) & (errors > 0), 1.0)
    return weights / weights.sum(1, keepdim=True)


def _mean(x: Tensor, shares: Tensor) -> Tensor:
    """Return the mean row of ``x`` [groups, rows, n], float64 [groups, 1, n].

    That of a constant is the constant itself, not something next to it.
    """
    first = x[:, :1].double()
    return first + shares.mT @ (x.double() - first)


def regress(
    weight: Tensor,
    quantized: Tensor,
    clean: Tensor,
    shares: Tensor,
    ridge: float,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """Return W* [channels, n] and the moments of X̂ [groups, n, n], both float32.

    Rows count by their ``shares``. λ is ``ridge`` · n times the mean power of an input.
    ``centered`` takes means off: where the layer has a bias to make up for them.
    """
    import torch

    n = quantized.shape[2]
    hat, x = quantized.double(), clean.double()
    if centered:
        hat, x = hat - _mean(quantized, shares), x - _mean(clean, shares)
    weighted = (hat * shares).mT
    moments, mixed = weighted @ hat, weighted @ x
    power = torch.diagonal(moments, dim1=1, dim2=2).mean(1)[:, None, None]
    # Of a singular G rounding errors drown in a millionth of its mean power.
    drawn = (ridge * n + 1e-6) * power * torch.eye(n, dtype=torch.float64, device=weight.device)
    own = weight.double().reshape(len(moments), -1, n)
    found = own.clone()
    alive = power.flatten() > 0
    if bool(alive.any()):
        target = (mixed + drawn)[alive] @ own[alive].mT
        found[alive] = torch.linalg.solve((moments + drawn)[alive], target).mT
    return found.reshape(weight.shape).float().contiguous(), moments.float()


def _outputs(weight: Tensor, mean: Tensor) -> Tensor:
    """Return the mean output [channels] of ``weight`` on a mean input [groups, n]."""
    grouped = weight.double().reshape(mean.shape[0], -1, weight.shape[1])
    return (grouped * mean.double()[:, None]).sum(2).flatten().float()
