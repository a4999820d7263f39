"""Transforms of a layer's input that its weight takes back, so that both are easier to quantize."""

from __future__ import annotations

from torch import Tensor

from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, block_from_text, hadamard
from autoquant.quant.smoothing import Smoothing, from_text
from autoquant.spec.transforms import is_rotation

InputTransform = Smoothing | Rotation
"""``of_input`` and ``of_weight`` go there, ``input_back`` and ``weight_back`` come back."""


def transform_from_text(text: str, layout: Layout, weight: Tensor, where: str) -> InputTransform:
    """Return the transform that a recipe calls ``text``, where ``weight`` is.

    Raises SpecError where it doesn't fit.
    """
    if is_rotation(text):
        block = block_from_text(text, layout.channels, where)
        return Rotation(hadamard(block, weight), layout)
    return Smoothing(from_text(text, layout.channels, where).to(weight.device), layout)
