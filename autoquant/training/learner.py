"""What of one site is trained: its weight, scales, bias and activation scale, as a recipe has them.

Training starts at the very numbers of a recipe. The weight is kept as real numbers that round to
its integers, each where the float weight lies in the cell of its integer; where that is another
cell, since layers were fitted to each other, it lies at random on that side. So weights are spread
over their cells, and what pulls at many of them moves them to other integers one by one, and pulls
less after each. From the middles of their cells all would go at once, and much too far. Scales are
kept as logarithms, so that they stay positive and a rate is a share of them, whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoquant.methods.learned import LearnedWeight
from autoquant.nn.held import HeldWeight
from autoquant.nn.runtime import Rows
from autoquant.nn.sites import Site
from autoquant.nn.slots import SiteSlot, StandIn
from autoquant.quant.blocks import from_blocks, from_matrix, to_blocks, to_matrix
from autoquant.quant.gradients.backward import with_quantized_gradient
from autoquant.quant.gradients.format import GradientFormat
from autoquant.quant.trained import fake_quantize_trained, scale_of
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from autoquant.spec.techniques import Estimator

WEIGHT, SCALE, BIAS, ACTIVATION = "weight", "scale", "bias", "activation"
KINDS = (WEIGHT, SCALE, BIAS, ACTIVATION)
"""Kinds of parameters, each of which has a rate of its own."""


EDGE = 0.45
"""How far from the middle of its cell a weight may start: what is at the edge is moved by noise."""


@dataclass(frozen=True)
class Grid:
    """The integers of a quantizer: from ``lo`` to ``hi``, of which ``zero_point`` stands for 0."""

    zero_point: Tensor
    lo: int
    hi: int
    symmetric: bool

    def quantize(
        self,
        x: Tensor,
        log_scale: Tensor,
        estimator: Estimator,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return ``x`` quantized and dequantized, with the gradients of ``estimator``."""
        zero = 0.0 if self.symmetric else self.zero_point  # plain numbers are much faster
        return fake_quantize_trained(x, log_scale, zero, self.lo, self.hi, estimator, generator)


class Learner:
    """The parameters of one site while they are trained.

    ``parameters`` maps each kind that the site has to its tensor: the weight float32 [blocks, n] in
    units of the scales that it started with, in blocks of its granularity; the logarithm of its
    scales [blocks, 1]; what the bias moves by [channels]; the logarithm of a static activation
    scale []. A rate of Adam so is a share of a step of the grid, in channels of large weights and
    of small ones alike. A site whose bias can't move has none
    of that kind, one whose activation is dynamic or stays in float none of the last.
    """

    def __init__(
        self,
        slot: SiteSlot,
        held: HeldWeight,
        activation: ActivationScheme | None,
        estimator: Estimator,
        gradients: GradientFormat | None = None,
    ) -> None:
        self.slot = slot
        self.estimator = estimator
        self.gradients = gradients
        self.activation = activation
        self._start = held.quantized
        p = self._start.qparams
        self._grid = Grid(p.zero_point, p.qmin, p.qmax, p.symmetric)
        self._unit = p.scale
        q = to_blocks(self._start.q, self.scheme.granularity).to(torch.float32) - p.zero_point
        self.parameters: dict[str, Tensor] = {
            WEIGHT: spread(q, self.blocks_of(slot.target) / p.scale),
            SCALE: p.scale.log(),
        }
        if self.site.corrects:
            shift = held.shift
            device = self._start.q.device
            zeros = torch.zeros(self.site.matrix[0], dtype=torch.float32, device=device)
            self.parameters[BIAS] = zeros if shift is None else shift.clone()
        self._generator: torch.Generator | None = None
        self._activation_grid: Grid | None = None
        if activation is not None and activation.scale is not None:
            grid, device = FORMATS[activation.bits], self._start.q.device
            zero = torch.tensor(
                float(activation.zero_point or 0), dtype=torch.float32, device=device
            )
            self._activation_grid = Grid(zero, grid.qmin, grid.qmax, activation.symmetric)
            self.parameters[ACTIVATION] = torch.tensor(
                activation.scale, dtype=torch.float32, device=device
            ).log()
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    @property
    def site(self) -> Site:
        """The site."""
        return self.slot.site

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._unit.device

    @property
    def scheme(self) -> WeightScheme:
        """How its weight is quantized."""
        return self._start.scheme

    def scales(self) -> Tensor:
        """Return the scales of its weight, [blocks, 1]; those that did not move are as given."""
        own = self.parameters[SCALE].detach()
        return torch.where(own == self._unit.log(), self._unit, scale_of(own))

    def positions(self) -> Tensor:
        """Return the weight in units of its scale, zero point taken off, [blocks, n]."""
        return self.parameters[WEIGHT].detach() * self._unit / self.scales()

    def integers(self, positions: Tensor | None = None) -> Tensor:
        """Return what positions round to, zero point taken off, float32 [blocks, n]."""
        r = self.positions() if positions is None else positions
        zero = self._grid.zero_point
        return torch.maximum(torch.minimum(r.round(), self._grid.hi - zero), self._grid.lo - zero)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """Return a weight of the site's shape as blocks [blocks, n]."""
        matrix = to_matrix(weight.detach().to(torch.float32), self.site.channel_axis)
        return to_blocks(matrix, self.scheme.granularity)

    def hold(self, where: Tensor, integers: Tensor) -> None:
        """Put the weight, ``where`` that is true, in the middle of the cells of ``integers``."""
        with torch.no_grad():
            middle = integers * self.scales() / self._unit
            own = self.parameters[WEIGHT]
            own.copy_(torch.where(where, middle, own))

    def stand_in(self, generator: torch.Generator | None) -> None:
        """Have the slot compute with the parameters as they are now, and gradients reach them."""
        slot, own = self.slot, self.parameters
        self._generator = generator
        real = self._grid.quantize(own[WEIGHT] * self._unit, own[SCALE], self.estimator, generator)
        rows, columns = self.site.matrix
        weight = from_matrix(
            from_blocks(real, (rows, columns)), self.site.shape, self.site.channel_axis
        )
        if slot.transform is not None:
            weight = slot.transform.weight_back(weight)
        slot.stand_in = StandIn(weight.to(slot.parameter.dtype), self._bias)
        if self.gradients is not None:
            slot.listen = self._with_quantized_gradient
        if self._activation_grid is None:
            slot.switch(None, self.activation)
        else:
            slot.switch(None, None)
            slot.probe = self._quantized_input

    def _bias(self, own: Tensor | None) -> Tensor | None:
        """Return the bias to compute with where the layer's ``own`` one is."""
        moved = self.parameters.get(BIAS)
        if moved is None:
            return own
        if own is None:
            return moved
        return (own.detach().to(torch.float32) + moved).to(own.dtype)

    def _with_quantized_gradient(
        self, x: Tensor, y: Tensor, compute: Callable[[Tensor], Tensor], rows: Rows
    ) -> Tensor:
        assert self.gradients is not None
        return with_quantized_gradient(y, self.gradients, self._generator)

    def _quantized_input(self, x: Tensor) -> Tensor:
        grid = self._activation_grid
        assert grid is not None
        return grid.quantize(x, self.parameters[ACTIVATION], self.estimator, self._generator)

    def solution(self) -> tuple[LearnedWeight, ActivationScheme | None]:
        """Return what a recipe keeps of the parameters as they are now."""
        zero = self._grid.zero_point
        shape = self.site.matrix
        q = from_blocks((self.integers() + zero).to(torch.int8), (shape[0], shape[1]))
        shift = self.parameters.get(BIAS)
        moved = torch.zeros(0, dtype=torch.float32) if shift is None else shift.detach()
        parts = (q, self.scales(), zero, moved.to(torch.float32))
        activation = self.activation
        if activation is not None and ACTIVATION in self.parameters:
            own = self.parameters[ACTIVATION].detach()
            start = torch.full_like(own, float(activation.scale or 0.0))
            if not torch.equal(own, start.log()):
                activation = replace(activation, scale=float(scale_of(own)))
        learned = LearnedWeight(*(part.detach().cpu().clone().contiguous() for part in parts))
        return learned, activation

    def rest(self) -> None:
        """Have the slot forget the parameters."""
        self.slot.stand_in = self.slot.probe = self.slot.listen = None


def spread(integers: Tensor, wanted: Tensor, seed: int = 0) -> Tensor:
    """Return positions [blocks, n] that round to ``integers``, as near to ``wanted`` as may be.

    Where ``wanted`` is not in the inner part of the cell, they are at random on that side of it.
    """
    off = wanted - integers
    drawn = torch.rand(
        off.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    ).to(off.device)
    return integers + torch.where(off.abs() < EDGE, off, off.sign() * EDGE * drawn)


def load(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters of a learner, kind by kind, in place."""
    with torch.no_grad():
        for kind, parameter in learner.parameters.items():
            parameter.copy_(tensors[kind])
