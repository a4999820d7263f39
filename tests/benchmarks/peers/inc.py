"""Intel's Neural Compressor 3: ``autotune`` over its static 8-bit configurations (PT2E)."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.score import average_bits, divergences, logits, weight_sizes
from tests.benchmarks.peers.tools import Found

CHOICES = tuple(
    {"w_sym": True, "act_sym": symmetric, "act_algo": method}
    for method in ("minmax", "kl")
    for symmetric in (False, True)
)
"""Weights a channel and activations a tensor, as the others have them."""


def quantized_weights(graph: torch.fx.GraphModule, model: nn.Module) -> dict[str, int]:
    """Return 8 for each layer whose weight goes through a quantizer in the graph."""
    sizes = weight_sizes(model)
    left = sorted(sizes)
    found: dict[str, int] = {}
    quantizers = [n for n in graph.graph.nodes if "quantize_per_channel" in str(n.target)]
    for node in quantizers:
        if ".dequantize" in str(node.target):
            continue
        weight = node.args[0]
        size = _numel(graph, weight)
        # Names are lost in the export; as many weights of a size as there are quantizers of it.
        name = next((n for n in left if sizes[n] == size and n not in found), None)
        if name is not None:
            found[name] = 8
    return found


def _numel(graph: torch.fx.GraphModule, node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
    return 0 if value is None else int(value.numel())


def autotune(case: Case, bits: float) -> Found:
    """Return the best of its configurations by the divergence on the selection data."""
    os.environ.setdefault("INC_TARGET_DEVICE", "cpu")
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, TuningConfig
    from neural_compressor.torch.quantization import autotune as tune

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for inputs in case.calibration:
                case.run(model, inputs)

    count = 0

    def evaluate(model: nn.Module) -> float:
        nonlocal count
        count += 1
        found = logits(lambda x: case.run(model, x), case.selection)
        # 1 for the float model: the tolerance is relative.
        return 1.0 - float(divergences(reference, found).mean())

    began = time.monotonic()
    reference = logits(lambda x: case.run(case.model, x), case.selection)
    example = (case.calibration[0],)
    shapes = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = export(case.model_copy(), example_inputs=example, dynamic_shapes=shapes)
    configs = [StaticQuantConfig(**choice) for choice in CHOICES]
    # All are tried: with a tolerance it would stop at the first that is good enough.
    tuning = TuningConfig(config_set=configs, tolerable_loss=-1.0, max_trials=len(configs))
    model = tune(exported, tuning, evaluate, run_fn=calibrate, example_inputs=example)
    seconds = time.monotonic() - began
    if model is None:
        raise RuntimeError("autotune returned no model")
    widths = quantized_weights(model, case.model)
    return Found(model, average_bits(widths, weight_sizes(case.model)), seconds, count)
