"""What converted modules compute: as the original layer does, with weight and input from a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.nn.attention import QuantizedMultiheadAttention
from autoquant.nn.converted import Converted
from autoquant.nn.layer_output import LayerOutput
from autoquant.nn.recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)


class QuantizedLayer:
    """One call of a linear layer or a convolution with a quantized weight and input."""

    def __init__(self, converted: Converted) -> None:
        self.converted = converted

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output on its quantized input."""
        own, bias = self.converted.own, self.converted.module.bias
        if "weight" not in self.converted.sites:
            return own(input, *args, **kwargs)
        return self.converted.sites["weight"].layer(
            self.converted,
            input,
            bias,  # type: ignore[arg-type]
            lambda x: own(x, *args, **kwargs),
        )


class QuantizedConv2d(QuantizedLayer):
    """One call of a 2-d convolution, in channels-last memory format where that is wanted."""

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output on its quantized input."""
        last = self.converted.channels_last
        if last and input.dim() == 4 and not isinstance(input, LayerOutput):
            input = _to_channels_last(input)
        return super().__call__(input, *args, **kwargs)


def _to_channels_last(x: Tensor) -> Tensor:
    """Return ``x`` [batch, channels, height, width] in that memory format.

    One channel lies the same in both formats; only the strides tell torch which one is meant, and
    so in which one a convolution gives its output.
    """
    if x.shape[1] == 1 and x.numel():
        batch, _, height, width = x.shape
        return x.reshape(batch, height, width, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


class QuantizedEmbedding:
    """One look-up in a quantized table; only the rows that are looked up are dequantized."""

    def __init__(self, converted: Converted) -> None:
        self.converted = converted

    def __call__(self, input: Tensor) -> Tensor:
        """Return the rows of the quantized table at the indices ``input``."""
        site = self.converted.sites["weight"]
        rows: Callable[[Tensor], Tensor] | None = getattr(site, "rows", None)
        if rows is not None:
            return rows(input)
        compute = self.converted.own
        y: Tensor = compute(input)
        listen = getattr(site, "listen", None)
        return y if listen is None else listen(input, y, compute, None)


QUANTIZED: dict[type[nn.Module], Callable[[Converted], Callable[..., Any]]] = {
    nn.Linear: QuantizedLayer,
    nn.Conv1d: QuantizedLayer,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedLayer,
    nn.ConvTranspose1d: QuantizedLayer,
    nn.ConvTranspose2d: QuantizedLayer,
    nn.ConvTranspose3d: QuantizedLayer,
    nn.Embedding: QuantizedEmbedding,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}
"""What one call of every supported layer type is computed by."""


def computing(base: type[nn.Module]) -> Callable[[Converted], Callable[..., Any]]:
    """Return what one call of a layer of the type ``base`` is computed by.

    A type of another library is a linear layer whose weight is [in, out] (``layouts``).
    """
    return QUANTIZED.get(base, QuantizedLayer)
