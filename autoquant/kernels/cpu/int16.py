"""Integer products on a CPU by the kernels of ``products.c``, which multiply in 16 bits.

Pairs of products are added in 32 bits. So they are exact for every byte without VNNI, where oneDNN
adds pairs in 16 bits, and for weights that need more than 8 bits, as 8-bit ones do less their zero
point.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.kernels.cpu.handing import HandedForm
from autoquant.kernels.cpu.library import call, library
from autoquant.kernels.cpu.native import OFFSET
from autoquant.kernels.cpu.packed_weight import PackedWeight, packed_weight
from autoquant.kernels.cpu.product import IntegerProduct, Rows
from autoquant.kernels.cpu.signatures import LARGEST, PANEL
from autoquant.kernels.layout import is_channels_last
from autoquant.kernels.operation import Clamp, Operation, Product
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

AFTER = {None: 1, "none": 2, "tanh": 3}
"""What ``products.c`` calls making bytes of an output, or of its GELU by each approximation."""
MOST = 2**15
"""Largest kernel, stride, padding or dilation."""
_NOTHING = torch.empty(0, dtype=torch.float32)


def missing() -> str | None:
    """Return why these kernels compute nothing here, in one line; None where they do."""
    if library() is None:
        return "the compiled library is missing (no C compiler when autoquant was installed)"
    if width() == 0:
        return "products of 16-bit integers need AVX2"
    return None


@functools.cache
def width() -> int:
    """Return how many channels are multiplied at a time: 16, 8, or 0 where they can't be.

    What ``ATEN_CPU_CAPABILITY`` keeps torch from is not used here either.
    """
    if library() is None:
        return 0
    allowed = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 0)
    found = torch.zeros(1, dtype=torch.int32)
    call("product_width", found)
    return min(int(found), allowed)


def prepare(
    operation: Operation,
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    transform: InputTransform | None = None,
) -> Product | None:
    """Pack a weight for one activation scheme; None where these kernels are not for it.

    With a ``transform`` the product takes the activation as it is before that.
    """
    if activation is None or missing() is not None or operation.kind == "conv3d":
        return None
    if max((*operation.stride, *operation.padding, *operation.dilation), default=0) > MOST:
        return None
    packed = packed_weight(weight)
    if packed is None or not packed.q.numel() or max(packed.q.shape[2:], default=1) > MOST:
        return None
    if packed.of_groups is not None and operation.kind != "linear":
        return None
    return Int16Product(packed, activation, operation, transform)


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How channels lie: ``groups`` of ``out`` channels each, padded to whole panels.

    ``together`` of the layer's own groups are one, with zeros for what others of it read.
    What a channel reads is ``runs`` that lie without gaps. ``channelwise`` ones are not padded:
    each channel has taps of its own alone.
    """

    groups: int
    together: int
    out: int
    runs: int
    channelwise: bool


class Int16Product(IntegerProduct):
    """x [..., in] by a weight [out, in], or [batch, in, *spatial] by [out, in/groups, *kernel]."""

    backend = "int16"

    def __init__(
        self,
        weight: PackedWeight,
        activation: ActivationScheme,
        operation: Operation,
        transform: InputTransform | None = None,
    ) -> None:
        super().__init__(weight, activation, len(operation.stride), transform)
        self.operation = operation
        self.channels = weight.q.shape[1] * operation.groups
        self.arrangement = _arrangement(weight, operation)
        key = ("int16", self.arrangement)
        if key not in weight.packs:
            weight.packs[key] = _arranged(weight.q, self.arrangement)
        self.pack, self.of_groups = weight.packs[key], None
        if weight.of_groups is not None:
            self.of_groups = _by_panels(weight.of_groups)
        self.sums: Tensor | None = None
        if self.arrangement.channelwise:
            self.sums = weight.q.flatten(1).sum(1, dtype=torch.int32)
        self.scale = self._padded(weight.scale)
        self.no_bias = torch.zeros_like(self.scale)
        self.wide = int(width() == 16)

    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with bytes of this shape."""
        if not self.axes:
            return q.dim() >= 1 and q.shape[-1] == self.channels
        if q.dim() != self.axes + 2 or q.shape[1] != self.channels:
            return False
        return min(self._outputs(q.shape[2:])) > 0

    def real(
        self, q: Tensor, bias: Tensor | None, clamp: Clamp | None, channels_last: bool
    ) -> Tensor:
        """Return the layer's output on an activation's bytes."""
        y = self._run(q, *self._numbers(q), self.scale, bias, clamp, None)
        return y if channels_last or not self.axes else y.contiguous()

    def _of_rows(self, x: Tensor, rows: Rows, bias: Tensor | None, clamp: Clamp | None) -> Tensor:
        q, scale, zero_points = rows
        zero = zero_points.to(torch.int32) + OFFSET
        y = self._run(q, scale, zero, self.scale, bias, clamp, None)
        return y if not self.axes or is_channels_last(x) else y.contiguous()

    def _bytes(self, q: Tensor, form: HandedForm, gelu: str | None) -> Tensor:
        scale = self.scale if form.weight_scale is None else self._padded(form.weight_scale)
        stored = AFTER[gelu], 1.0 / form.scale, form.zero_point
        return self._run(q, *self._numbers(q), scale, form.bias, form.clamp, stored)

    def _numbers(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each sample, by a static scheme."""
        assert self.activation.scale is not None
        samples = q.shape[0] if self.axes else 1
        scale = torch.full((samples,), self.activation.scale, dtype=torch.float32)
        return scale, torch.full((samples,), self.zero_point, dtype=torch.int32)

    def _run(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        stored: tuple[int, float, int] | None,
    ) -> Tensor:
        """Return the product: real numbers, or bytes by ``stored`` (AFTER, inverse scale, zero)."""
        o, arranged = self.operation, self.arrangement
        dtype = torch.float32 if stored is None else torch.uint8
        if self.axes:
            x = (q.unsqueeze(-2) if self.axes == 1 else q).contiguous(
                memory_format=torch.channels_last
            )
            batch, channels, height, across = x.shape
            sides = self._outputs(x.shape[2:])
            y = torch.empty(
                (batch, len(self.weight.scale), *sides),
                dtype=dtype,
                memory_format=torch.channels_last,
            )
            kernel = self.weight.q.shape[2:]
            steps = (kernel, o.stride, o.padding, o.dilation)
            form = [
                n
                for pair, filler in zip(steps, (1, 1, 0, 1), strict=True)
                for n in ((filler, *pair) if self.axes == 1 else pair)
            ]
        else:
            x = q.contiguous()
            y = torch.empty((*x.shape[:-1], len(self.weight.scale)), dtype=dtype)
            batch, channels = len(scale), self.channels
            height, across = 1, x.numel() // (channels * batch)
            form = [1, 1, 1, 1, 0, 0, 1, 1]
        ends = [_finite(end) for end in ((-math.inf, math.inf) if clamp is None else clamp)]
        padded = self.no_bias if bias is None else self._padded(bias)
        if self.sums is not None:
            name, own, cut = "multiply_channels", self.sums, []
        else:
            name, own = "multiply_panels", _NOTHING if self.of_groups is None else self.of_groups
            runs = 1 if self.of_groups is None else arranged.runs
            cut = [arranged.out, arranged.groups, runs, self.wide]
        failed = call(
            name, x, zero, scale, self.pack, own, weight_scale, padded, y,
            batch, height, across, channels, *form, *cut, *ends, *(stored or (0, 1.0, 0)),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"native.{name}: no memory for {self.operation}")
        return y.squeeze(-2) if self.axes == 1 else y

    def _outputs(self, spatial: torch.Size) -> list[int]:
        """Return how many outputs there are on each axis; 0 or less where there are none."""
        o, kernel = self.operation, self.weight.q.shape[2:]
        if len(spatial) > self.axes:  # a line as a plane
            return [1, *self._outputs(spatial[1:])]
        return [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                spatial, o.padding, o.dilation, kernel, o.stride, strict=True
            )
        ]

    def _padded(self, numbers: Tensor) -> Tensor:
        """Return float32 numbers of channels as the kernels take them, float32."""
        out, groups = self.arrangement.out, self.arrangement.groups
        if self.arrangement.channelwise or out % PANEL == 0:
            return numbers.detach().contiguous()
        y = numbers.new_zeros(groups, -(-out // PANEL) * PANEL)
        y[:, :out] = numbers.detach().view(groups, out)
        return y


def _finite(end: float) -> float:
    return math.copysign(LARGEST, end) if math.isinf(end) else end


def _arrangement(weight: PackedWeight, operation: Operation) -> _Arrangement:
    """Return how the channels of a weight [out, in / groups, *kernel] lie."""
    shape, groups = weight.q.shape, operation.groups
    if weight.of_groups is not None:
        return _Arrangement(1, 1, shape[0], weight.of_groups.shape[1], False)
    if shape[1] == 1 and groups == shape[0] >= PANEL:
        return _Arrangement(groups, 1, 1, 1, True)
    out = shape[0] // groups
    shared = [n for n in range(1, groups + 1) if groups % n == 0 and n * out <= PANEL]
    together = max(shared, default=1)
    # Taps of a row lie side by side where they are not dilated.
    rows = shape[2:-1] if operation.dilation[-1:] == (1,) else shape[2:]
    return _Arrangement(groups // together, together, together * out, math.prod(rows), False)


def _arranged(q: Tensor, a: _Arrangement) -> Tensor:
    """Return a weight [out, in / groups, *kernel] as the kernels take it, int16.

    That is [groups, panels, runs, pairs, PANEL, 2], or [pairs of taps, channels, 2] where
    channelwise.
    """
    channels = q.shape[1]
    w = q.reshape(len(q), channels, -1).to(torch.int16)
    taps = w.shape[2]
    if a.channelwise:
        pairs = F.pad(w[:, 0], (0, taps % 2)).view(len(q), -1, 2)
        return pairs.transpose(0, 1).contiguous()
    out = a.out // a.together
    w = w.view(a.groups, a.together, out, channels, taps)
    dense = w.new_zeros(a.groups, a.together, out, taps, a.together, channels)
    for n in range(a.together):
        dense[:, n, :, :, n] = w[:, n].transpose(-1, -2)
    runs = dense.view(a.groups, a.out, a.runs, -1)
    runs = F.pad(runs, (0, runs.shape[3] % 2, 0, 0, 0, -a.out % PANEL))
    panels = runs.view(a.groups, -1, PANEL, a.runs, runs.shape[3] // 2, 2)
    return panels.permute(0, 1, 3, 4, 2, 5).contiguous()


def _by_panels(scale: Tensor) -> Tensor:
    """Return scales [channels, groups] as [panels, groups, PANEL]."""
    padded = F.pad(scale, (0, 0, 0, -len(scale) % PANEL))
    return padded.view(-1, PANEL, scale.shape[1]).transpose(1, 2).contiguous()
