"""Quantized layers as torch operators that stand for QuantizeLinear and DequantizeLinear.

A deployed model turns packed integers back by shifts that no other runtime knows. For an export its
sites (``nn.packed``) are asked for the same numbers by two operators of their own, which compute
them in torch and become ONNX's:

- an activation: DequantizeLinear(Clip(QuantizeLinear(x))), the Clip on integers where the width is
  below the container's 8 bits, so that the layer before still ends in a QuantizeLinear;
- a weight: DequantizeLinear of int8 integers, with a scale for the tensor, each channel, or each
  block of a channel's inputs.

Source: the ONNX operators' specification, opset 21 (``block_size``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.nn.converted import NAME
from autoquant.nn.intake import copied
from autoquant.nn.packed import PackedSite
from autoquant.quant.activation import ActivationQuantizer
from autoquant.quant.blocks import from_matrix
from autoquant.quant.packing import unpack
from autoquant.spec.formats import FORMATS

CONTAINER = 8
OFFSET = 1 << (CONTAINER - 1)
"""What is added to signed integers that lie in unsigned containers, as runtimes like them."""


@torch.library.custom_op("autoquant::quantized_dequantized", mutates_args=())
def quantized_dequantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """Return an activation quantized and dequantized; integers are of ``zero_point``'s dtype."""
    zero = zero_point.to(torch.float32)
    q = ((x / scale).round() + zero).clamp(qmin, qmax)
    return (q - zero) * scale


@quantized_dequantized.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("autoquant::dequantized", mutates_args=())
def dequantized(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    """Return the real numbers of a weight's integers.

    ``scale`` and ``zero_point`` are [] for the tensor, [n] along ``axis``, or with a ``block`` of
    the rank of ``q``, ``axis`` divided by it.
    """
    if block:
        scale, zero_point = (p.repeat_interleave(block, axis) for p in (scale, zero_point))
    elif scale.dim():
        shape = [-1 if i == axis else 1 for i in range(q.dim())]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return (q.to(torch.float32) - zero_point.to(torch.float32)) * scale


@dequantized.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


class _Activation(nn.Module):
    """Quantizes an activation by a static scale."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scheme = quantizer.scheme
        grid, zero = FORMATS[scheme.bits], scheme.zero_point or 0
        # Its own tensors on the CPU, where a program is exported.
        self.register_buffer("scale", torch.tensor(scheme.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero + OFFSET, dtype=torch.uint8))
        self.ends = (grid.qmin + OFFSET, grid.qmax + OFFSET)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_dequantized(x, self.scale, self.zero_point, *self.ends)


class _QdqSite(PackedSite):
    """A site that gives its weight by the operator."""

    integers: Tensor
    scales: Tensor
    zero_points: Tensor
    axis: int
    block: int

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in its own shape."""
        found = dequantized(self.integers, self.scales, self.zero_points, self.axis, self.block)
        if (transform := self.transform) is not None:
            found = transform.weight_back(found)
        return found

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the dequantized weight, dequantizing only those: an embedding."""
        flat = indices.reshape(-1)
        rows = self._dequantize(self.integers.index_select(0, flat), flat)
        return rows.reshape(*indices.shape, self.columns)


def unfit(module: nn.Module) -> list[str]:
    """Return what of a deployed model can't be expressed, a line each."""
    found: dict[str, str] = {}
    for name, site in module.named_modules():
        if not isinstance(site, PackedSite):
            continue
        path = name.partition(f".{NAME}.")[0]
        if isinstance(module.get_submodule(path), nn.RNNBase | nn.RNNCellBase):
            found[path] = "a recurrent layer runs as many steps as its input has"
        elif site.rest is not None:
            found[path] = "the layers around it are of a lower format"
        elif site.quantized and _groups(site) and len(site.shape) != 2:
            what = f"groups of a convolution's weight {list(site.shape)}"
            found[path] = f"{what}, and blocks lie along one axis"
    return [f"{path}: {reason}" for path, reason in found.items()]


def _groups(site: PackedSite) -> int:
    """Return how many groups a channel's weight has, 0 where it has one scale or shares one."""
    channels = site.packed.shape[0]
    return site.scale.shape[0] // channels if site.scale.shape[0] > channels else 0


def with_operators(module: nn.Module) -> nn.Module:
    """Return a copy of a deployed model whose sites compute by the operators of this module."""
    model = copied(module)
    for site in [m for m in model.modules() if isinstance(m, PackedSite)]:
        if site.quantized:
            _convert(site)
        quantizer = site.activation
        if quantizer is not None and quantizer.scheme.scale is not None:
            del site.activation
            site.activation = _Activation(quantizer)  # type: ignore[assignment]
    return model


def _convert(site: PackedSite) -> None:
    scheme, channels = site.scheme, site.packed.shape[0]
    q = unpack(site.packed, scheme.bits, site.columns)
    zero = site.scale.new_zeros(site.scale.shape).to(torch.int8)
    zero = zero if scheme.symmetric else site.zero_point
    groups, scale = _groups(site), site.scale
    axis, block = site.channel_axis, 0
    if groups:
        axis, block = 1 - site.channel_axis, site.columns // groups
    own: Mapping[str, Tensor] = {
        "integers": from_matrix(q, site.shape, site.channel_axis).contiguous(),
        "scales": _laid_out(scale, channels, groups, site),
        "zero_points": _laid_out(zero, channels, groups, site),
    }
    site.__class__ = _QdqSite
    for name, tensor in own.items():
        site.register_buffer(name, tensor)
    vars(site).update(axis=axis, block=block)


def _laid_out(numbers: Tensor, channels: int, groups: int, site: PackedSite) -> Tensor:
    """Return parameters [blocks, 1] as the operator takes them."""
    if groups:
        matrix = numbers.reshape(channels, groups)
        return (matrix if site.channel_axis == 0 else matrix.t()).contiguous()
    return numbers.reshape(channels) if len(numbers) == channels else numbers.reshape(())


def translations() -> dict[Any, Any]:
    """Return what torch.onnx makes of the operators, by operator."""
    from onnxscript import opset21 as onnx

    def activation(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        q = onnx.QuantizeLinear(x, scale, zero_point)
        if (qmin, qmax) != (0, 2**CONTAINER - 1):
            # The ends as the container's own numbers, as Clip wants them.
            ends: list[Any] = [onnx.Constant(value_int=end) for end in (qmin, qmax)]
            q = onnx.Clip(q, *(onnx.CastLike(end, zero_point) for end in ends))
        return onnx.DequantizeLinear(q, scale, zero_point)

    def weight(q: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
        return onnx.DequantizeLinear(q, scale, zero_point, axis=axis, block_size=block)

    ops = torch.ops.autoquant
    return {ops.quantized_dequantized.default: activation, ops.dequantized.default: weight}
