"""Brevitas: its quantized layers with scales that are learned, calibrated, and then trained.

``layerwise_quantize`` puts its layers in place of torch's. Weights have a scale for each channel
that begins at the least squared error and is learned; activations one that begins at a percentile
of what calibration saw and is learned, unsigned after a ReLU and with a learned zero point at the
first layer. Biases stay in float, as everywhere here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.benchmarks.training_peers.distil import Trainee


def prepare(
    model: nn.Module, calibration: tuple[Any, ...], weights: int, activations: int, first: str
) -> Trainee:
    """Return the module to train; ``first`` is the layer whose input has both signs."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE, Uint8ActPerTensorFloat
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat

    def layers(act: Any) -> dict[Any, Any]:
        options = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": weights,
            "input_quant": act,
            "input_bit_width": activations,
            "bias_quant": None,
            "return_quant_tensor": False,
        }
        return {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    others = [name for name in names if name != first]
    module = layerwise_quantize(model, layers(ShiftedUint8ActPerTensorFloat), others)
    module = layerwise_quantize(module, layers(Uint8ActPerTensorFloat), [first])
    module.eval()
    with torch.no_grad(), calibration_mode(module):
        for inputs in calibration:
            module(inputs)
    return Trainee(module, module.train)
