"""Where a layer's input channels lie: transforms of inputs act on them, and on what meets them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the input channels of a layer lie, in its activation and in its weight of ``shape``."""

    kind: str
    shape: tuple[int, ...]
    groups: int
    channel_axis: int

    @property
    def channels(self) -> int:
        """How many input channels the weight meets."""
        if self.kind.startswith("conv"):
            return self.shape[1] * self.groups
        return self.shape[1 - self.channel_axis]

    @property
    def activation_axis(self) -> int:
        """The axis of an activation that its channels are on, from the end."""
        return 1 - len(self.shape) if self.kind.startswith("conv") else -1

    def over_channels(self, x: Tensor) -> Tensor:
        """Return the largest number of each input channel of an activation: [channels]."""
        return x.movedim(self.activation_axis, -1).reshape(-1, self.channels).amax(0)

    def beside(self, factors: Tensor, x: Tensor) -> Tensor:
        """Return ``factors`` [channels] in the shape and dtype that an activation goes with."""
        own = factors.to(x.dtype)
        if not self.kind.startswith("conv"):
            return own
        return own.reshape(-1, *[1] * (len(self.shape) - 2))

    @property
    def axis(self) -> int:
        """The axis of the weight, as it lies, that its input channels are on: in one group."""
        return 1 if self.kind.startswith("conv") else 1 - self.channel_axis

    def of_weight(self, factors: Tensor, weight: Tensor) -> Tensor:
        """Return ``factors`` [channels] in the shape and dtype that the weight goes with."""
        own = factors.to(weight.dtype)
        if not self.kind.startswith("conv"):
            return own if self.channel_axis == 0 else own[:, None]
        rows = self.shape[0] // self.groups
        grouped = own.reshape(self.groups, -1).repeat_interleave(rows, 0)
        return grouped.reshape(self.shape[0], -1, *[1] * (len(self.shape) - 2))
