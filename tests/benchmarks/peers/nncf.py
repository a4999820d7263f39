"""Intel's NNCF: post-training quantization at 8 bits, preset MIXED, with its bias correction."""

from __future__ import annotations

import time

from torch import nn

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.score import average_bits, weight_sizes
from tests.benchmarks.peers.tools import Found


def quantized_weights(model: nn.Module) -> dict[str, int]:
    """Return the width of each layer whose weight passes a quantizer.

    Its hook is called after the layer, the function and the argument: features/0/conv2d/0__1.
    """
    widths = {}
    for name, module in model.named_modules():
        if ".pre_hooks." in name and hasattr(module, "num_bits"):
            place, _, argument = name.split(".pre_hooks.", 1)[1].partition("__")
            if argument.startswith("1"):
                widths[".".join(place.split("/")[:-2])] = int(module.num_bits)
    return widths


def quantize(case: Case, bits: float) -> Found:
    """Quantize by nncf.quantize, photo by photo, which is what its statistics are made for."""
    import nncf

    items = [x[i : i + 1] for x in case.calibration for i in range(len(x))]
    began = time.monotonic()
    model = nncf.quantize(
        case.model_copy(),
        nncf.Dataset(items),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(items),
    )
    seconds = time.monotonic() - began
    return Found(model, average_bits(quantized_weights(model), weight_sizes(case.model)), seconds)
