"""Integer products on a CPU, through the oneDNN operators that ship with torch.

An activation of unsigned bytes meets a weight of signed ones; sums are exact 32-bit integers, and
scales and bias are applied to them in float32. A symmetric activation is stored 128 higher, with
that as its zero point: products of two signed operands run in a reference loop, a thousand times
slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant.kernels.cpu import instructions
from autoquant.kernels.cpu.geometry import Geometry
from autoquant.kernels.cpu.handing import HandedForm
from autoquant.kernels.cpu.native import OFFSET, finish_rows
from autoquant.kernels.cpu.packed_weight import PackedWeight, packed_weight
from autoquant.kernels.cpu.product import IntegerProduct, Rows
from autoquant.kernels.cpu.verification import is_right
from autoquant.kernels.layout import is_channels_last
from autoquant.kernels.operation import Clamp, Operation, Product
from autoquant.kernels.reference import multiply
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

Post = tuple[str, list[float], str]
"""What oneDNN does with an output in the same pass: a name, numbers and an algorithm."""
PAIR_LIMIT = 2**15 - 1
"""Largest sum of two products that is exact without VNNI: they are added in 16 bits."""


def missing(device: torch.device) -> str | None:
    """Return why nothing can be computed here, in one line; None where it can."""
    if device.type != "cpu":
        return f"oneDNN's products of integers are for a CPU, not {device.type}"
    return instructions.missing()


def prepare(
    operation: Operation,
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    transform: InputTransform | None = None,
) -> Product | None:
    """Pack a weight for one activation scheme; None where integers can't give the same numbers.

    With a ``transform`` the product takes the activation as it is before that.
    """
    if activation is None:
        return None
    packed = packed_weight(weight)
    if packed is None or packed.q.dtype != torch.int8 or packed.of_groups is not None:
        return None
    if not instructions.has_vnni() and 2 * _largest(activation) * packed.largest > PAIR_LIMIT:
        return None
    if operation.kind == "linear":
        return LinearProduct(packed, activation, transform)
    return ConvProduct(packed, activation, operation, transform)


def _largest(activation: ActivationScheme) -> int:
    """Return the largest byte that an activation is stored as."""
    return FORMATS[activation.bits].qmax + OFFSET


class LinearProduct(IntegerProduct):
    """x [..., in] by a weight [out, in]."""

    backend = "int8"

    def __init__(
        self,
        weight: PackedWeight,
        activation: ActivationScheme,
        transform: InputTransform | None = None,
    ) -> None:
        super().__init__(weight, activation, 0, transform)
        if "linear" not in weight.packs:
            weight.packs["linear"] = torch.ops.onednn.qlinear_prepack(weight.q, None)
        self.pack = weight.packs["linear"]
        self.zero = _zeros(weight)

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with bytes of this shape."""
        return q.dim() >= 1 and q.shape[-1] == self.weight.q.shape[1]

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return [..., out] of an activation's bytes."""
        return self._run(q, self.activation.scale, self.zero_point, bias, _post(clamp))

    def _of_rows(self, x: Tensor, rows: Rows, bias: Tensor | None, clamp: Clamp | None) -> Tensor:
        q, scale, zero_points = rows
        y = self._run(q, 1.0, OFFSET, None, _post(None))
        finish_rows(
            y.view(-1, y.shape[-1]), scale, zero_points, self.weight.sums, _or_zeros(bias, y)
        )
        return y if clamp is None else y.clamp_(*clamp)

    def _bytes(self, q: Tensor, form: HandedForm, gelu: str | None) -> Tensor:
        post = _post(form.clamp) if gelu is None else ("gelu", [], gelu)
        stored = form.scale, form.zero_point
        return self._run(
            q, self.activation.scale, self.zero_point, form.bias, post, stored, form.weight_scale
        )

    def _run(
        self,
        q: Tensor,
        scale: float | None,
        zero_point: int,
        bias: Tensor | None,
        post: Post,
        stored: tuple[float, int] | None = None,
        weight_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the product, as bytes where ``stored``, their scale and zero point, is given.

        With ``weight_scale`` [channels] in the place of the weight's own.
        """
        form = (1.0, 0, torch.float32) if stored is None else (*stored, torch.uint8)
        scales = self.weight.scale if weight_scale is None else weight_scale
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            q.contiguous(), scale, zero_point, self.pack, scales, self.zero,
            _dense(bias), *form, *post,
        )  # fmt: skip
        return y


class ConvProduct(IntegerProduct):
    """x [batch, in, *spatial] by a weight [out, in / groups, *kernel], padded with zeros."""

    backend = "int8"
    hands_gelu = False

    def __init__(
        self,
        weight: PackedWeight,
        activation: ActivationScheme,
        operation: Operation,
        transform: InputTransform | None = None,
    ) -> None:
        super().__init__(weight, activation, len(operation.stride), transform)
        self.operation = operation
        self.zero = _zeros(weight)
        self._edges: tuple[torch.Size, Tensor] | None = None
        self._taken: dict[tuple[torch.Size, int], bool] = {}

    @property
    def pack(self) -> Tensor:
        """The weight as oneDNN takes it, packed when a geometry was found right."""
        # What oneDNN adds to packed weights depends on whether the activation has a zero point.
        key = (self.operation, self.zero_point != 0)
        if key not in self.weight.packs:
            o = self.operation
            self.weight.packs[key] = torch.ops.onednn.qconv_prepack(
                _planar(self.weight.q), self.weight.scale, 1.0, self.zero_point,
                _pair(o.stride, 1), _pair(o.padding, 0), _pair(o.dilation, 1), o.groups, None,
            )  # fmt: skip
        return self.weight.packs[key]

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with bytes of this shape."""
        return q.dim() == self.axes + 2 and self._fits(q)

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return [batch, out, *spatial] of an activation's bytes."""
        y = self.run(q, self.activation.scale, bias, clamp)
        return y if channels_last else y.contiguous()

    def _of_rows(self, x: Tensor, rows: Rows, bias: Tensor | None, clamp: Clamp | None) -> Tensor:
        q, scale, zero_points = rows
        y = self.run(q, 1.0, None, None)
        shape = (-1, *[1] * (y.dim() - 1))
        channels = (1, -1, *[1] * (y.dim() - 2))
        if not self.activation.symmetric:
            sums = self._edge_sums(x.shape[2:]) if any(self.operation.padding) else None
            sums = self.weight.sums.view(channels) if sums is None else sums
            y.sub_(zero_points.view(shape) * sums)
        y.mul_(scale.view(shape))
        if bias is not None:
            y.add_(bias.view(channels))
        y = y if clamp is None else y.clamp_(*clamp)
        return y if is_channels_last(x) else y.contiguous()

    def _bytes(self, q: Tensor, form: HandedForm, gelu: str | None) -> Tensor | None:
        if self.axes == 3:  # oneDNN's operator for volumes gives none
            return None
        stored = form.scale, form.zero_point
        return self.run(q, self.activation.scale, form.bias, form.clamp, stored, form.weight_scale)

    def _edge_sums(self, spatial: torch.Size) -> Tensor:
        """Return what each output sums of its weights, scaled: less where the input is padded.

        A sample's zero point is taken off inside the sample; what pads it is 0 already.
        """
        if self._edges is None or self._edges[0] != spatial:
            channels = self.weight.q.shape[1] * self.operation.groups
            ones = torch.ones(1, channels, *spatial, dtype=torch.float32)
            whole = multiply(self.operation, ones, self.weight.q.to(torch.float32), None)
            scale = self.weight.scale.view(1, -1, *[1] * len(spatial))
            self._edges = spatial, whole * scale
        return self._edges[1]

    def _fits(self, x: Tensor) -> bool:
        """Return whether oneDNN is right for this shape; the reference takes the others."""
        key = x.shape, torch.get_num_threads()
        if key not in self._taken:
            self._taken[key] = is_right(self.geometry(*key))
        return self._taken[key]

    def geometry(self, shape: Sequence[int], threads: int) -> Geometry:
        """Return the form of this convolution of an activation of this shape."""
        return Geometry(
            self.operation,
            tuple(self.weight.q.shape),
            tuple(shape),
            self.zero_point != 0,
            threads,
            instructions.has_amx(),
        )

    def run(
        self,
        q: Tensor,
        scale: float | None,
        bias: Tensor | None,
        clamp: Clamp | None,
        stored: tuple[float, int] | None = None,
        weight_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the product, as bytes where ``stored``, their scale and zero point, is given.

        Whatever the shape: whoever calls this knows that oneDNN is right for it. With
        ``weight_scale`` [channels] in the place of the weight's own.
        """
        o = self.operation
        scales = self.weight.scale if weight_scale is None else weight_scale
        form = (1.0, 0, torch.float32) if stored is None else (*stored, torch.uint8)
        y: Tensor = torch.ops.onednn.qconv_pointwise(
            _planar(q), scale, self.zero_point, self.pack, scales, self.zero,
            _dense(bias), _pair(o.stride, 1), _pair(o.padding, 0), _pair(o.dilation, 1), o.groups,
            *form, *_post(clamp if self.axes < 3 else None),
        )  # fmt: skip
        if self.axes == 3 and clamp is not None:  # oneDNN's operator for volumes takes none
            return y.clamp_(*clamp)
        return y.squeeze(-2) if self.axes == 1 else y


def _post(clamp: Clamp | None) -> Post:
    """Return what oneDNN does with the output in the same pass."""
    if clamp is None:
        return "none", [], ""
    return ("relu", [], "") if clamp == (0.0, math.inf) else ("hardtanh", list(clamp), "")


def _dense(bias: Tensor | None) -> Tensor | None:
    """Return a bias without gaps: oneDNN's operators take for granted that there are none."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def _zeros(weight: PackedWeight) -> Tensor:
    return torch.zeros(len(weight.scale), dtype=torch.int32)


def _or_zeros(bias: Tensor | None, y: Tensor) -> Tensor:
    return y.new_zeros(y.shape[-1]) if bias is None else bias.contiguous()


def _pair(numbers: Sequence[int], filler: int) -> list[int]:
    """Return the numbers of a convolution's axes; one on a line is one on a plane of height 1."""
    return [filler, *numbers] if len(numbers) == 1 else list(numbers)


def _planar(x: Tensor) -> Tensor:
    return x.unsqueeze(-2) if x.dim() == 3 else x
