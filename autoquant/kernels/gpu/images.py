"""Activations of convolutions as channels-last integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.device.images import quantize_images, sample_qparams
from autoquant.kernels.gpu.integers import IntegerActivation
from autoquant.kernels.gpu.launch import ceil_div, launch, next_power_of_2

PIXELS = 64
"""Pixels that one program quantizes."""


@dataclass(frozen=True, slots=True)
class QuantizedImages:
    """Images as int8 ``q`` [samples, padded height, padded width, channels], contiguous.

    ``scale`` and ``zero`` are float32, [1] or [samples]; ``flag``, int32 [1], is 1 where the
    images held a NaN and 0 where they did not.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    flag: Tensor


def quantize(
    x: Tensor, activation: IntegerActivation, padding: tuple[int, int], channels: int
) -> QuantizedImages:
    """Quantize ``x``, float32 [samples, channels, height, width] of any strides, with padding.

    A pixel takes ``channels`` bytes, at least as many as ``x`` has channels.
    """
    samples, _, height, width = x.shape
    rows, columns = height + 2 * padding[0], width + 2 * padding[1]
    q = torch.empty(samples, rows, columns, channels, dtype=torch.int8, device=x.device)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    numbers = activation.static[:1], activation.static[1:2]
    if activation.dynamic:
        numbers = _qparams(x, activation)
    quantize_into(
        q, x, activation.static, numbers, flag, padding, activation.dynamic, activation.fold
    )
    return QuantizedImages(q, *numbers, flag)


def quantize_into(
    q: Tensor,
    x: Tensor,
    static: Tensor,
    numbers: tuple[Tensor, Tensor],
    flag: Tensor,
    padding: tuple[int, int] = (0, 0),
    per_sample: bool = False,
    fold: bool = False,
) -> None:
    """Quantize ``x`` into ``q``, int8 [samples, padded height, padded width, channels].

    ``numbers`` are scale and zero point, ``static`` has the ends of the grid. Where ``x`` holds a
    NaN, ``flag`` becomes 1.
    """
    (samples, real, height, width), (_, rows, columns, channels) = x.shape, q.shape
    block = min(next_power_of_2(max(channels, 4)), 64)
    launch(
        quantize_images,
        (samples * ceil_div(rows * columns, PIXELS), ceil_div(channels, block)),
        x,
        static,
        *numbers,
        q,
        flag,
        real,
        height,
        width,
        rows,
        columns,
        *padding,
        *x.stride(),
        channels,
        PER_SAMPLE=per_sample,
        LAST=x.stride(1) == 1,
        FOLD=fold,
        BLOCK_P=PIXELS,
        BLOCK_C=block,
    )


def _qparams(x: Tensor, activation: IntegerActivation) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, float32 [samples], from each sample's range."""
    # The order of the numbers does not matter, so one that is dense in memory saves a copy.
    dense = x.permute(0, 2, 3, 1) if x.stride(1) == 1 else x
    lows, highs = torch.aminmax(dense.flatten(1), dim=1)
    samples = x.shape[0]
    scale, zero = torch.empty(2, samples, dtype=torch.float32, device=x.device).unbind()
    launch(
        sample_qparams,
        (ceil_div(samples, 128),),
        lows,
        highs,
        activation.static,
        scale,
        zero,
        samples,
        SYMMETRIC=activation.symmetric,
        BLOCK=128,
    )
    return scale, zero
