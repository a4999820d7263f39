"""What a rounding is given to solve, and how its answer is judged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoquant.nn.calibrate import SiteStatistics
from autoquant.nn.sites import Site
from autoquant.nn.weights import quantize_weight
from autoquant.observers.output_error import OutputError, exact_output_error
from autoquant.quant.affine import TINY, QParams
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.need import Need
from autoquant.spec.needs import WEIGHT_NEEDS
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.techniques import NEAREST, Correction

MOST_SHARED = 4
"""What problems of one site have in common, most of it: a factor may take 100 MB."""

Once = Callable[[object, Callable[[], Any]], Any]


def _alone(key: object, make: Callable[[], Any]) -> Any:
    """Share nothing: a problem by itself."""
    return make()


@dataclass(frozen=True)
class SiteProblem:
    """One weight with its calibrated grid, rounded to the nearest, and what is known of its input.

    ``moments`` is E[x·xᵀ], about the mean where the layer's correction takes the mean error off:
    float32 [groups, n, n] or its diagonal [groups, n]; None where rows are read one by one, as an
    embedding's are. ``once(key, make)`` returns what ``make`` gave for the first of several
    problems of one site that asked.
    """

    site: Site
    matrix: Tensor
    """The weight, float32 [channels, n]."""
    nearest: QuantizedWeight
    moments: Tensor | None
    once: Once = _alone

    @property
    def scheme(self) -> WeightScheme:
        """The scheme, whose rounding is the technique itself."""
        return self.nearest.scheme

    @property
    def signal(self) -> float:
        """The power of the layer's output, above 0: what errors are relative to."""
        return max(float(exact_output_error(self.matrix, self.moments)), TINY)

    def error(self, weight: QuantizedWeight) -> float:
        """Return the mean squared output error of ``weight``, summed over channels."""
        return float(exact_output_error(weight.matrix() - self.matrix, self.moments))

    def blocks(self) -> Tensor:
        """Return the weight as blocks of its granularity."""
        return to_blocks(self.matrix, self.scheme.granularity)

    def rounded(self, q: Tensor, qparams: QParams | None = None) -> QuantizedWeight:
        """Return the weight of integers ``q`` [channels, n], on another grid if one is given."""
        own = self.nearest.qparams if qparams is None else qparams
        return replace(self.nearest, q=q.to(torch.int8), qparams=own)

    def each(self, parameters: Tensor) -> Tensor:
        """Return what is one number a block [blocks, 1] for each weight, [channels, n]."""
        shape = (self.matrix.shape[0], self.matrix.shape[1])
        return from_blocks(parameters.expand_as(self.blocks()), shape)


class Bench:
    """One weight that is to be rounded in several ways, with all that they have in common.

    ``known`` may be None where no scheme needs anything of it.
    """

    def __init__(
        self, weight: Tensor, site: Site, known: SiteStatistics | None, correction: Correction
    ) -> None:
        self.weight = weight
        self.site = site
        self.known = known
        self.correction = correction
        self._shared: OrderedDict[object, Any] = OrderedDict()

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave the first time that ``key`` was asked for."""
        if key in self._shared:
            self._shared.move_to_end(key)
        else:
            self._shared[key] = make()
            if len(self._shared) > MOST_SHARED:
                self._shared.popitem(last=False)
        return self._shared[key]

    def round(self, scheme: WeightScheme) -> QuantizedWeight:
        """Return the weight on the grid of ``scheme``, brought there by its rounding.

        Never worse on the calibration data than nearest rounding. Raises MissingStatistics where
        calibration did not keep what the scheme needs, SpecError where a group does not divide,
        TrialError where the weight is NaN. A technique that has no solution, because moments are
        singular, is no better than nearest rounding either.
        """
        nearest = quantize_weight(self.weight, self.site, scheme, self._error(scheme))
        rounding = scheme.rounding
        if rounding == NEAREST or not nearest.q.numel():
            return nearest
        moments = None
        if self.known is not None and Need.MOMENTS in rounding.needs:
            moments = self.once("moments", self._moments)
        problem = SiteProblem(
            self.site, self.once("matrix", self._matrix), nearest, moments, self.once
        )
        try:
            found = rounding.fit(problem)
        except torch.linalg.LinAlgError:
            return nearest
        return found if problem.error(found) < problem.error(nearest) else nearest

    def _error(self, scheme: WeightScheme) -> OutputError | None:
        if scheme.calibration not in WEIGHT_NEEDS or self.known is None:
            return None
        return self.known.output_error(corrected=self.correction.centers)

    def _moments(self) -> Tensor | None:
        assert self.known is not None
        return self.known.second_moments(centered=self.correction.centers)

    def _matrix(self) -> Tensor:
        return to_matrix(self.weight.detach().to(torch.float32), self.site.channel_axis)
