"""Distillation: all layers of a recipe are trained together, to give what the float model gives.

The quantized model runs as it is, and gradients pass its quantizers by an estimator. No labels are
needed; they are used where the task says how. It starts at the recipe's own numbers, best at layers
that were fitted to each other before.
Source: Hinton et al. 2015 (arXiv 1503.02531) for the teacher; for the rest ``methods.training``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autoquant.methods.training import Training
from autoquant.spec.techniques import RECONSTRUCTIONS, option


@RECONSTRUCTIONS.register("distillation")
@dataclass(frozen=True)
class Distillation(Training):
    """Train all layers together, by options that all training has (``Training``), and these.

    - ``features`` is how much outputs of layers count beside those of the model.
    - ``labels`` is the share that the task's ``training_loss`` has of what is made small, where
      there is one; the rest is how far outputs are from the float model's.
    - ``rivals``: so many sets of rates are tried for a short while, the usual ones first, and those
      that do best on held-back data are gone on with (``training.race``); 1 tries none.
    - ``curvature_power`` is how much slower layers learn whose loss is the more curved: 1 has noise
      in the weights of each cost the same, 0 has all learn alike; ``mismatch_power`` how much
      slower those whose gradient is mismatched (``training.layer_rates``).
    """

    method: ClassVar[str] = "distillation"
    features: float = option(0.0, 0.0, 1e6)
    labels: float = option(0.2, 0.0, 1.0)
    rivals: int = option(1, 1, 1000)
    curvature_power: float = option(0.0, -2.0, 2.0)
    mismatch_power: float = option(0.0, 0.0, 2.0)
