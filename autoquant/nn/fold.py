"""Folding a BatchNorm into the convolution or linear layer before it.

Which BatchNorm follows which layer is seen in one forward pass, by the identity of the tensor that
goes from one to the other; nothing is traced. Whether the layer's output is used elsewhere too
can't be seen that way, so a fold is kept only if the model's outputs stay what they were.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import SpecError
from autoquant.nn.layouts import layout_of
from autoquant.nn.leaves import difference

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3
"""Largest change of an output, relative to the largest output, that rounding may explain."""


def find_folds(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, str]:
    """Return BatchNorm path → path of the layer whose output is its input, seen in one ``run``."""
    produced: dict[int, tuple[weakref.ref[Tensor], str, int]] = {}
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}
    hooks = []

    def after_layer(path: str) -> Callable[..., None]:
        def hook(layer: Any, _: Any, output: Tensor) -> None:
            calls[path] += 1
            # Without a batch, or from a linear layer on sequences, channels lie elsewhere.
            if output.dim() == layer.weight.dim():
                produced[id(output)] = (weakref.ref(output), path, _version(output))

        return hook

    def before_norm(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[path] += 1
            x = args[0] if args else None
            known = produced.get(id(x))
            # The version tells a tensor that an in-place operator changed in between.
            if known and isinstance(x, Tensor) and known[0]() is x and known[2] == _version(x):
                pairs[path] = known[1]

        return hook

    for path, module in model.named_modules():
        if _is_fixed_norm(module) and not module.training:
            hooks.append(module.register_forward_pre_hook(before_norm(path)))
        elif _foldable(module):
            hooks.append(module.register_forward_hook(after_layer(path)))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    taken = Counter(pairs.values())
    return {
        norm: layer
        for norm, layer in pairs.items()
        if calls[norm] == calls[layer] == taken[layer] == 1
        and shared[id(model.get_submodule(layer).weight)] == 1
    }


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version  # an inference tensor has none


def _is_fixed_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a BatchNorm with statistics, and nothing more."""
    return (
        isinstance(module, NORMS)
        and module.running_mean is not None
        and type(module).forward is nn.modules.batchnorm._BatchNorm.forward
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _foldable(module: nn.Module) -> bool:
    layout = layout_of(module)
    if layout is None or layout.kind not in ("linear", "conv", "conv_transpose"):
        return False
    if module._parameters.get("weight") is None:  # computed from others
        return False
    return layout.kind != "conv_transpose" or getattr(module, "groups", 1) == 1


def fold(model: nn.Module, pairs: Mapping[str, str]) -> Callable[[], None]:
    """Fold every BatchNorm of ``pairs`` into its layer, in place; return what undoes it.

    w' = w·γ/σ on the output channel and b' = (b − μ)·γ/σ + β, computed in float64
    (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Raises SpecError on an unknown path.
    """
    undo: list[Callable[[], None]] = []
    for norm_path, layer_path in pairs.items():
        try:
            norm, layer = model.get_submodule(norm_path), model.get_submodule(layer_path)
        except AttributeError:
            raise SpecError(
                f"folded: {norm_path} → {layer_path} is not in the model; is it another model's?"
            ) from None
        if not isinstance(norm, NORMS) or not _fits(norm, layer):
            raise SpecError(f"folded: {norm_path} → {layer_path} is no BatchNorm after a layer")
        undo.append(_fold_one(model, norm, layer))

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    return undo_all


def _fits(norm: Norm, layer: nn.Module) -> bool:
    layout = layout_of(layer)
    if layout is None or not _is_fixed_norm(norm) or not _foldable(layer):
        return False
    return norm.num_features == layer.get_parameter("weight").shape[layout.channel_axis]


def _fold_one(model: nn.Module, norm: Norm, layer: Any) -> Callable[[], None]:
    layout = layout_of(layer)
    assert layout is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight: nn.Parameter = layer.weight
    bias: nn.Parameter | None = layer.bias
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = torch.rsqrt(variance + norm.eps)
    offset = torch.zeros_like(mean)
    if norm.affine:
        gain = gain * norm.weight.detach().double()
        offset = norm.bias.detach().double()
    shape = [1] * weight.dim()
    shape[layout.channel_axis] = -1
    start = torch.zeros_like(mean) if bias is None else bias.detach().double()
    new_weight = weight.detach().double() * gain.reshape(shape)
    new_bias = (start - mean) * gain + offset
    keep = weight.requires_grad
    layer.weight = nn.Parameter(new_weight.to(weight.dtype), requires_grad=keep)
    layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=keep)
    _replace(model, norm, identity := nn.Identity())

    def undo() -> None:
        layer.weight = weight
        layer.bias = bias
        _replace(model, identity, norm)

    return undo


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model holds ``old``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def fold_checked(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    quick: Callable[[nn.Module], Any] | None = None,
) -> dict[str, str]:
    """Fold all that can be folded without changing what ``run`` returns; return the pairs.

    ``quick`` stands for ``run`` once it is known which layers follow each other.
    """
    pairs = find_folds(model, run)
    if not pairs:
        return {}
    run = quick or run
    with torch.no_grad():
        before = run(model)
        undo = fold(model, pairs)
        if same_outputs(before, run(model)):
            return pairs
        undo()
        kept = {}
        for norm, layer in pairs.items():
            undo = fold(model, {norm: layer})
            if same_outputs(before, run(model)):
                kept[norm] = layer
            else:
                undo()
    return kept


def same_outputs(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    """Return whether two outputs agree within ``tolerance`` of the largest number of a tensor."""
    return difference(a, b, tolerance) is None
