"""NVIDIA ModelOpt: AutoQuantize with either of its scores, and its INT8 default."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.score import average_bits, weight_sizes
from tests.benchmarks.peers.tools import Found

WIDTHS = (4, 6, 8)


def scheme(bits: int) -> dict[str, Any]:
    """Return weights of ``bits`` a channel and activations of 8 bits a tensor."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            # ModelOpt has quantizers of these too, which its own configurations switch off.
            {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
        ],
        "algorithm": "max",
    }


def bits_of(model: nn.Module) -> float:
    """Return the average weight bits of a model that ModelOpt quantized."""
    widths = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            widths[name] = int(quantizer.num_bits)
    return average_bits(widths, weight_sizes(model))


def int8(case: Case, bits: float) -> Found:
    """Quantize by ModelOpt's INT8_DEFAULT_CFG."""
    import modelopt.torch.quantization as mtq

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for inputs in case.calibration:
                case.run(model, inputs)

    began = time.monotonic()
    model = mtq.quantize(case.model_copy(), mtq.INT8_DEFAULT_CFG, calibrate)
    return Found(model, bits_of(model), time.monotonic() - began)


def auto_quantize(case: Case, bits: float, method: str) -> Found:
    """Search by AutoQuantize; its scores are of the calibration data.

    Labels are the float model's own. What it can quantize and leaves in float counts as 16 bits
    there too; embeddings do not count there.
    """
    import modelopt.torch.quantization as mtq

    data = case.with_labels()
    began = time.monotonic()
    model, _ = mtq.auto_quantize(
        case.model_copy(),
        constraints={"effective_bits": bits},
        quantization_formats=[scheme(width) for width in WIDTHS],
        data_loader=data,
        forward_step=lambda m, batch: case.run(m, batch[0]),
        loss_func=lambda output, batch: case.loss(output, batch[1]),
        num_calib_steps=len(data),
        num_score_steps=len(data),
        method=method,
    )
    return Found(model, bits_of(model), time.monotonic() - began)


def gradient(case: Case, bits: float) -> Found:
    """Search by gradient scores."""
    return auto_quantize(case, bits, "gradient")


def kl_div(case: Case, bits: float) -> Found:
    """Search by divergence scores."""
    return auto_quantize(case, bits, "kl_div")
