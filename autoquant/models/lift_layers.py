"""Patterns of convolutions, normalizations and recurrent layers (see ``lift_patterns``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from autoquant.models.lift_patterns import Match, aten, register, shape_of, stored

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_BATCH_NORM: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


@register(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def _conv(node: Node, a: dict[str, Any]) -> Match | None:
    return _convolution(node, a, transposed=False)


@register(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(node: Node, a: dict[str, Any]) -> Match | None:
    return _convolution(node, a, transposed=True)


@register(aten.convolution.default, aten._convolution.default, aten._convolution.deprecated)
def _any_convolution(node: Node, a: dict[str, Any]) -> Match | None:
    return _convolution(node, a, transposed=a["transposed"])


def _convolution(node: Node, a: dict[str, Any], *, transposed: bool) -> Match | None:
    """Return the convolution layer; its sizes are read from the weight's shape."""
    weights = stored(weight=a["weight"], bias=a["bias"])
    size = shape_of(a["weight"])
    layers = _CONV_TRANSPOSE if transposed else _CONV
    if weights is None or size is None or len(size) - 2 not in layers:
        return None
    ends = (size[0], size[1] * a["groups"])
    options = {
        "in_channels": ends[0] if transposed else ends[1],
        "out_channels": ends[1] if transposed else ends[0],
        "kernel_size": size[2:],
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }
    for name in ("stride", "padding", "dilation") + (("output_padding",) if transposed else ()):
        value = a[name]
        if not isinstance(value, str):
            value = tuple(value) * (len(size) - 2 if len(value) == 1 else 1)
            if not all(isinstance(v, int) for v in value):
                return None
        options[name] = value
    return Match(node, layers[len(size) - 2], options, weights, (a["input"],))


@register(aten.batch_norm.default)
def _batch_norm(node: Node, a: dict[str, Any]) -> Match | None:
    return _normalized(node, a, "same")


@register(
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
)
def _native_batch_norm(node: Node, a: dict[str, Any]) -> Match | None:
    return _normalized(node, a, "first")


def _normalized(node: Node, a: dict[str, Any], returns: str) -> Match | None:
    """Return the batch norm of fixed statistics; one that is training computes something else."""
    rank = len(shape_of(a["input"]) or ())
    weights = stored(
        weight=a["weight"],
        bias=a["bias"],
        running_mean=a["running_mean"],
        running_var=a["running_var"],
    )
    # Decompositions of a layer with affine=False leave both out; one alone has no nn layer.
    if weights is None or a.get("training", False) or rank not in _BATCH_NORM:
        return None
    if not {"running_mean", "running_var"} <= weights.keys() or len(weights) == 3:
        return None
    options = {
        "num_features": (shape_of(a["running_mean"]) or (0,))[0],
        "eps": a["eps"],
        "momentum": a["momentum"],
        "affine": "weight" in weights,
    }
    return Match(node, _BATCH_NORM[rank], options, weights, (a["input"],), returns=returns)


@register(aten.layer_norm.default)
def _layer_norm(node: Node, a: dict[str, Any]) -> Match | None:
    return _layer_normalized(node, a, "same")


@register(aten.native_layer_norm.default)
def _native_layer_norm(node: Node, a: dict[str, Any]) -> Match | None:
    return _layer_normalized(node, a, "first")


def _layer_normalized(node: Node, a: dict[str, Any], returns: str) -> Match | None:
    weights = stored(weight=a["weight"], bias=a["bias"])
    if weights is None or "weight" not in weights:
        return None
    options = {
        "normalized_shape": tuple(a["normalized_shape"]),
        "eps": a["eps"],
        "bias": "bias" in weights,
    }
    return Match(node, nn.LayerNorm, options, weights, (a["input"],), returns=returns)


@register(aten.gru.input)
def _gru(node: Node, a: dict[str, Any]) -> Match | None:
    return _recurrent(node, a, nn.GRU, gates=3, state=a["hx"], returns="same")


@register(aten.lstm.input)
def _lstm(node: Node, a: dict[str, Any]) -> Match | None:
    return _recurrent(node, a, nn.LSTM, gates=4, state=tuple(a["hx"]), returns="lstm")


def _recurrent(
    node: Node, a: dict[str, Any], layer: type[nn.Module], *, gates: int, state: Any, returns: str
) -> Match | None:
    """Return the nn.GRU or nn.LSTM; its sizes are read from its weights' shapes."""
    shapes = [shape_of(p) for p in a["params"]]
    drops_out = a["train"] and a["dropout"] > 0 and a["num_layers"] > 1
    if drops_out or not all(shapes):
        return None
    per_cell = len(shapes) // (a["num_layers"] * (2 if a["bidirectional"] else 1))
    projects = per_cell == (5 if a["has_biases"] else 3)
    options = {
        "input_size": shapes[0][1],  # type: ignore[index]
        "hidden_size": shapes[0][0] // gates,  # type: ignore[index]
        "num_layers": a["num_layers"],
        "bias": a["has_biases"],
        "batch_first": a["batch_first"],
        "dropout": a["dropout"] if a["num_layers"] > 1 else 0.0,
        "bidirectional": a["bidirectional"],
    }
    if projects:
        options["proj_size"] = shapes[per_cell - 1][0]
    with torch.device("meta"):
        names = [name for name, _ in layer(**options).named_parameters()]
    weights = stored(**dict(zip(names, a["params"], strict=False)))
    if weights is None or len(names) != len(shapes):
        return None
    return Match(node, layer, options, weights, (a["input"], state), returns=returns)
