"""Quantized neural gradients: what goes into the two products of a layer's backward pass.

With δ the gradient of the loss by a layer's output, the gradients by its weight and by its input
are linear in δ: where E[δ̂] = δ, both are without bias, and so is a step of SGD. The forward pass is
not linear, so rounding its numbers stochastically adds noise and takes no bias away.
Sources: Chmiel et al. 2023, arXiv 2112.10769, section 3; Chen et al. 2020, arXiv 2010.14298.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.errors import SpecError
from autoquant.quant.gradients.magnitudes import check_granularity, largest_magnitudes
from autoquant.quant.gradients.rounding import neighbours, round_nearest, round_stochastic
from autoquant.registry import unknown
from autoquant.spec.gradients import (
    GRADIENT_GRIDS,
    ROUND_NEAREST,
    ROUND_STOCHASTIC,
    ROUNDINGS,
    MagnitudeGrid,
)
from autoquant.spec.granularity import PER_CHANNEL, PER_TENSOR


@dataclass(frozen=True, slots=True)
class GradientFormat:
    """A format by its name in GRADIENT_GRIDS, how numbers come to it, and what shares a scale.

    ``granularity`` is per_tensor, per_channel (one scale for each index along ``axis``: 0 is the
    sample, −1 the output channel of a linear layer, 1 that of a convolution) or per_group_N (N
    neighbours along the last axis). A scale of its own for each index along an axis over which a
    product sums can't be taken out of that product: a sample's out of the weight's gradient, a
    channel's out of the input's. Raises UserError for a format that there isn't, and its kind
    SpecError for any other field.
    """

    name: str
    rounding: str = ROUND_STOCHASTIC
    granularity: str = PER_TENSOR
    axis: int = 0

    def __post_init__(self) -> None:
        GRADIENT_GRIDS.get(self.name)
        if self.rounding not in ROUNDINGS:
            raise SpecError(unknown("rounding of a gradient", self.rounding, ROUNDINGS))
        check_granularity(self.granularity)

    @property
    def grid(self) -> MagnitudeGrid:
        """The magnitudes of the format."""
        return GRADIENT_GRIDS.get(self.name)

    @property
    def bits(self) -> int:
        """What a number takes, in bits, without its share of a scale."""
        return self.grid.bits

    @property
    def is_random(self) -> bool:
        """Whether numbers are drawn."""
        return self.rounding == ROUND_STOCHASTIC

    def __str__(self) -> str:
        along = f" along axis {self.axis}" if self.granularity == PER_CHANNEL else ""
        return f"{self.name} {self.rounding} {self.granularity}{along}"

    def quantize(self, g: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``g`` on the grids of its blocks: the numbers themselves, its shape and dtype.

        A block's grid is ± the format's magnitudes times max|g| of the block over the largest of
        them, each rounded to the dtype of ``g``. Rounding is between points as they are after
        that, so it is without bias in half precision and among denormal numbers too. What is
        ±inf or NaN passes as it is, for a guard to see, and other numbers of its block are
        quantized as if it were not there. A block of zeros stays so; blocks whose numbers
        all have one magnitude stay exactly as they are.

        ``generator``, on the device of ``g``, is needed where rounding is stochastic: as many
        numbers are drawn as ``g`` has, in its order. ValueError without it; TypeError for what is
        not real floating point.
        """
        if not g.is_floating_point():
            raise TypeError(f"a gradient of dtype {g.dtype} can not be quantized")
        if self.is_random and generator is None:
            raise ValueError(f"{self} draws numbers and needs a generator")
        g = g.detach()
        if not g.numel():
            return g.clone()
        finite = g.isfinite()
        # Grids of half-precision gradients are made in float32.
        work = torch.promote_types(g.dtype, torch.float32)
        x = torch.where(finite, g, 0.0).abs().to(work)
        largest = largest_magnitudes(x, self.granularity, self.axis)
        lower, upper, odd = neighbours(x, largest, self.grid)
        if work != g.dtype:
            lower, upper = lower.to(g.dtype).to(work), upper.to(g.dtype).to(work)
        if self.rounding == ROUND_NEAREST:
            rounded = round_nearest(x, lower, upper, odd)
        else:
            assert generator is not None
            rounded = round_stochastic(x, lower, upper, generator)
        return torch.where(finite, rounded.to(g.dtype).copysign(g), g)
