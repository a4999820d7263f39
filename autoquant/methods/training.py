"""What all training through quantizers has: rates, an estimator, what is done where it goes wrong.

Weights, scales, biases and activation scales learn at once, each kind at a rate of its own.
Sources: Esser et al. 2020 (LSQ, arXiv 1902.08153) for training scales; Nagel et al. 2022 (arXiv
2203.11086) for freezing what oscillates; Polyak & Juditsky 1992 (SIAM J. Control Optim. 30) for the
mean of the way; Wu et al. 2020 (arXiv 2004.09602, section 5) for low rates and the cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.spec.gradients import GRADIENT_GRIDS, ROUND_STOCHASTIC, ROUNDINGS
from autoquant.spec.recipe import FLOAT32
from autoquant.spec.techniques import ESTIMATORS, Reconstruction, choice, option


@dataclass(frozen=True)
class Training(Reconstruction):
    """How quantized layers are trained.

    - ``steps`` of ``batch`` samples; rates rise in a line for ``warmup`` of all steps, and fall by
      half a cosine.
    - ``weight_rate`` is in units of a weight's scale, ``scale_rate`` and ``activation_rate`` are
      shares of a scale, ``bias_rate`` is in units of a channel's output, a step: about what a step
      of Adam moves a number by.
    - ``freezing``: a weight whose integer goes back and forth in more than this share of the steps,
      as a running mean, is frozen at the one it has most; 1 freezes none.
    - ``clip``: a gradient of a layer longer than this many times its usual length is cut to that.
    - ``estimator`` is how gradients pass quantizers (``quant.estimators``).
    - ``gradients`` is the format that the gradient by each layer's output is brought to, by
      ``gradient_rounding``, before it goes into the layer's two products (``quant.gradients``).
    """

    steps: int = option(400, 1, 10**7)
    batch: int = option(16, 1, 2**16)
    warmup: float = option(0.05, 0.0, 1.0)
    weight_rate: float = option(3e-3, 0.0, 1.0)
    scale_rate: float = option(6e-4, 0.0, 1.0)
    bias_rate: float = option(1.5e-3, 0.0, 1.0)
    activation_rate: float = option(6e-4, 0.0, 1.0)
    freezing: float = option(0.02, 0.0, 1.0)
    clip: float = option(3.0, 0.0, 1e9, above=True)
    estimator: str = choice("lsq", ESTIMATORS)
    gradients: str = choice(FLOAT32, (FLOAT32, *GRADIENT_GRIDS))
    gradient_rounding: str = choice(ROUND_STOCHASTIC, ROUNDINGS)
