"""NVIDIA ModelOpt: ``mtq.quantize``, then training through its quantizers (QAT).

Ranges come from calibration and stay: ModelOpt learns those of NVFP4 alone. Of the algorithms for
weights ``mse`` is the one that suits few bits. Activations get a percentile of the histogram:
``mse`` of it gives ranges of about a twentieth of the largest value at any width, and ``entropy``
takes a minute and is far worse than that at 4 bits. The guide has the model's own training loop, so
normalization layers train as they always do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.benchmarks.training_peers.distil import Trainee

FEW_LEVELS, MORE_LEVELS = 99.0, 99.9
"""Percentiles that did best on the search split after some 100 steps: at 2 bits of 99 and 99.99, at
3 of 99 and 99.9."""


def scheme(weights: int, activations: int, signed: str, percentile: float) -> dict[str, Any]:
    """Return the configuration; inputs of the layer ``signed`` are not all positive."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    class Percentile(HistogramCalibrator):  # type: ignore[misc]
        """The calibration of ``mtq.quantize`` names no method, which histograms ask for."""

        def compute_amax(self, method: str = "percentile", **options: Any) -> Any:
            return super().compute_amax(method, percentile=percentile, **options)

    def of(unsigned: bool) -> dict[str, Any]:
        calibrator = (Percentile, (activations, None, unsigned))
        return {
            "num_bits": activations,
            "axis": None,
            "unsigned": unsigned,
            "calibrator": calibrator,
        }

    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": of(True)},
            {"quantizer_name": f"{signed}.input_quantizer", "cfg": of(False)},
            # ModelOpt has quantizers of these too, which its own configurations switch off.
            {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
        ],
        "algorithm": "mse",
    }


def prepare(
    model: nn.Module,
    calibration: tuple[Any, ...],
    weights: int,
    activations: int,
    first: str,
    percentile: float | None = None,
) -> Trainee:
    """Return the module to train; ``first`` is the layer whose input has both signs.

    Without a ``percentile`` it is the one that suits the bits.
    """
    import modelopt.torch.quantization as mtq

    def calibrate(module: nn.Module) -> None:
        with torch.no_grad():
            for inputs in calibration:
                module(inputs)

    if percentile is None:
        percentile = FEW_LEVELS if activations <= 2 else MORE_LEVELS
    chosen = scheme(weights, activations, first, percentile)
    module = mtq.quantize(model, chosen, calibrate)
    return Trainee(module, module.train)
