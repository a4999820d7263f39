"""Quantized layers: the original layer with its weight and its input taken from a site.

A layer is converted by giving it one of these classes: it keeps its identity, attributes, hooks
and parameters, so code that holds on to it, or reads ``layer.weight``, goes on working.
"""

# The property ``weight`` stands before the parameter of that name, which mypy takes for a mistake.
# mypy: disable-error-code="misc, override, no-any-return"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoquant.kernels.operation import Clamp, Operation
from autoquant.nn.attention import QuantizedMultiheadAttention
from autoquant.nn.quantized_output import QuantizedOutput
from autoquant.nn.recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)
from autoquant.nn.runtime import Reader, SiteRuntime
from autoquant.spec.recipe import ActivationScheme


class _SiteWeight:
    """Takes ``weight`` from the site, wherever it is read."""

    sites: dict[str, SiteRuntime]

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return self.sites["weight"].weight


class _QuantizedCall(_SiteWeight):
    """Computes as the original layer does, on a quantized input.

    ``operation`` says what that is, None where no kernel can stand in for it; ``clamp`` is a ReLU
    that follows, ``gelu`` the approximation of a GELU that does, and ``reader`` the layer that
    alone reads what comes out then.
    """

    operation: Operation | None = None
    clamp: Clamp | None = None
    reader: Reader | None = None
    gelu: str | None = None

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer computes with."""
        return self.sites["weight"].bias(self._parameters["bias"])

    if TYPE_CHECKING:
        _parameters: dict[str, Tensor | None]

        def __call__(self, *args: Any) -> Any: ...

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output on its quantized input."""
        compute = super().forward
        return self.sites["weight"].layer(
            self.operation,
            input,
            self.bias,
            lambda x: compute(x, *args, **kwargs),
            self.clamp,
            self.reader,
            self.gelu,
        )

    def reads(self) -> ActivationScheme | None:
        """Return the scheme whose integers the layer takes as its input, None for real numbers."""
        return self.sites["weight"].reads(self.operation)


class QuantizedLinear(_QuantizedCall, nn.Linear):
    """A linear layer with a quantized weight and input."""


class QuantizedTransposedLinear(_QuantizedCall):
    """A linear layer whose weight is [in, out], with a quantized weight and input.

    It is mixed with the layer's own class (see ``layouts.transposed_linear``).
    """


class QuantizedConv1d(_QuantizedCall, nn.Conv1d):
    """A 1-d convolution with a quantized weight and input."""


class QuantizedConv2d(_QuantizedCall, nn.Conv2d):
    """A 2-d convolution with a quantized weight and input.

    ``channels_last`` makes it compute in that memory format, which is faster on most devices.
    """

    channels_last = False

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        weight = self.sites["weight"].weight
        if self.channels_last:
            return weight.contiguous(memory_format=torch.channels_last)
        return weight

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output on its quantized input."""
        if self.channels_last and input.dim() == 4 and not isinstance(input, QuantizedOutput):
            input = _to_channels_last(input)
        return super().forward(input, *args, **kwargs)


def _to_channels_last(x: Tensor) -> Tensor:
    """Return ``x`` [batch, channels, height, width] in that memory format.

    One channel lies the same in both formats; only the strides tell torch which one is meant, and
    so in which one a convolution gives its output.
    """
    if x.shape[1] == 1 and x.numel():
        batch, _, height, width = x.shape
        return x.reshape(batch, height, width, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


class QuantizedConv3d(_QuantizedCall, nn.Conv3d):
    """A 3-d convolution with a quantized weight and input."""


class QuantizedConvTranspose1d(_QuantizedCall, nn.ConvTranspose1d):
    """A transposed 1-d convolution with a quantized weight and input."""


class QuantizedConvTranspose2d(_QuantizedCall, nn.ConvTranspose2d):
    """A transposed 2-d convolution with a quantized weight and input."""


class QuantizedConvTranspose3d(_QuantizedCall, nn.ConvTranspose3d):
    """A transposed 3-d convolution with a quantized weight and input."""


class QuantizedEmbedding(_SiteWeight, nn.Embedding):
    """An embedding with a quantized table; only the rows that are looked up are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the quantized table at the indices ``input``."""
        site = self.sites["weight"]
        rows = getattr(site, "rows", None)
        if rows is not None:
            return rows(input)
        compute = super().forward
        y = compute(input)
        listen = getattr(site, "listen", None)
        return y if listen is None else listen(input, y, compute, None)


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}
"""The quantized class of every supported layer type."""


def quantized_class(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return the quantized class of ``kind``, a supported layer type ``base`` or a subclass of it.

    A subclass keeps its own methods, and stays an instance of itself.
    """
    quantized: type = QUANTIZED.get(base, QuantizedTransposedLinear)
    if kind in QUANTIZED:
        return quantized
    return type(f"Quantized{kind.__name__}", (quantized, kind), {"__module__": kind.__module__})
