"""Bias correction: what quantizing a weight does to the mean output is taken off the bias.

A rounded weight W + ΔW gives, on an input of mean μ, outputs that are ΔW·μ off on average; a layer
with that taken off its bias is right on average again. Sources: Nagel et al. 2019, arXiv
1906.04721, section 4.2; Banner et al. 2019, arXiv 1810.05723.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.need import Need
from autoquant.spec.techniques import CORRECTIONS, Correction

if TYPE_CHECKING:
    from torch import Tensor


@CORRECTIONS.register("bias")
@dataclass(frozen=True)
class BiasCorrection(Correction):
    """Take the mean error of the output off the bias; a layer without one gets one."""

    method: ClassVar[str] = "bias"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MEANS})
    centers: ClassVar[bool] = True

    def shift(self, delta: Tensor, means: Tensor) -> Tensor:
        """Return what takes the mean error off."""
        return bias_shift(delta, means)


def bias_shift(delta: Tensor, means: Tensor) -> Tensor:
    """Return what the bias of each channel moves by, float32 [channels].

    ``delta`` is the error of the weight [channels, n], ``means`` the mean input [groups, n], both
    as the weight sees it.
    """
    grouped = delta.double().reshape(means.shape[0], -1, delta.shape[1])
    return -(grouped * means.double()[:, None]).sum(2).flatten().float()
