"""torchao: its QAT of exported programs (``prepare_qat_pt2e``), and ``QATConfig`` of modules.

An exported program is quantized as a quantizer says, which torchao has the user write for other
hardware than it knows: here each convolution and linear layer, first and last too. torchao fuses
convolutions with the normalization behind them and trains both. Ranges follow what is seen while it
trains, which is what its guide has, or are learned (``LearnableFakeQuantize``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.benchmarks.training_peers.distil import Trainee


def specs(weights: int, activations: int, learned: bool) -> tuple[Any, Any]:
    """Return how activations and weights are quantized."""
    from torchao.quantization.pt2e import (
        FusedMovingAvgObsFakeQuantize,
        HistogramObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    def maker(observer: Any, moving: Any) -> Any:
        if learned:
            return LearnableFakeQuantize.with_args(observer=observer, use_grad_scaling=True)
        return FusedMovingAvgObsFakeQuantize.with_args(observer=moving)

    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-(2 ** (weights - 1)),
        quant_max=2 ** (weights - 1) - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=maker(
            PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver
        ),
    )
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=2**activations - 1,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=maker(HistogramObserver, MovingAverageMinMaxObserver),
    )
    return activation, weight


def exported(
    model: nn.Module, calibration: tuple[Any, ...], weights: int, activations: int, learned: bool
) -> Trainee:
    """Return the module to train, of an exported program."""
    from torchao.quantization.pt2e import (
        disable_observer,
        move_exported_model_to_eval,
        move_exported_model_to_train,
    )
    from torchao.quantization.pt2e.learnable_fake_quantize import enable_range_learning
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    activation, weight = specs(weights, activations, learned)

    class EachLayer(Quantizer):  # type: ignore[misc]
        """Quantizes input and weight of each convolution and linear layer."""

        def annotate(self, program: Any) -> Any:
            kinds = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
            for node in program.graph.nodes:
                if node.op == "call_function" and node.target in kinds:
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={node.args[0]: activation, node.args[1]: weight},
                        _annotated=True,
                    )
            return program

        def validate(self, program: Any) -> None:
            """Nothing can be amiss that ``annotate`` has said."""

    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (calibration[0],), dynamic_shapes=sizes).module()
    module = prepare_qat_pt2e(program, EachLayer())
    move_exported_model_to_eval(module)
    with torch.no_grad():
        for inputs in calibration:
            module(inputs)
    if learned:
        module.apply(enable_range_learning)

    def switch(training: bool) -> None:
        (move_exported_model_to_train if training else move_exported_model_to_eval)(module)
        if not learned and not training:
            module.apply(disable_observer)  # what is held back is only looked at
        elif not learned:
            module.apply(_observe)

    return Trainee(module, switch)


def _observe(module: nn.Module) -> None:
    from torchao.quantization.pt2e import enable_observer

    enable_observer(module)


def moving(
    model: nn.Module, calibration: tuple[Any, ...], weights: int, activations: int, first: str
) -> Trainee:
    """Return the module to train, whose ranges follow what is seen."""
    return exported(model, calibration, weights, activations, learned=False)


def learned(
    model: nn.Module, calibration: tuple[Any, ...], weights: int, activations: int, first: str
) -> Trainee:
    """Return the module to train, whose ranges are learned."""
    return exported(model, calibration, weights, activations, learned=True)


def modules(
    model: nn.Module, calibration: tuple[Any, ...], weights: int, activations: int, first: str
) -> Trainee:
    """Return the module to train, as ``QATConfig`` makes it: it takes linear layers alone."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    integers = {n: getattr(torch, f"int{n}") for n in (weights, activations)}
    quantize_(
        model,
        QATConfig(
            activation_config=IntxFakeQuantizeConfig(
                integers[activations], "per_token", is_symmetric=False
            ),
            weight_config=IntxFakeQuantizeConfig(integers[weights], "per_channel"),
            step="prepare",
        ),
    )
    return Trainee(model, model.train)
