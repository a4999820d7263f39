"""Which aten operators are which nn layers: the table that lifting an exported program reads.

A pattern looks at one node of an exported graph and says which layer computes the same, or None.
It reads shapes from ``node.meta["val"]``, where torch.export records them, and changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

aten = torch.ops.aten

TRANSPARENT = frozenset(
    {aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default}
)
"""Operators that return the numbers and the shape they were given."""

_FLIPS = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.transpose.int,
        aten.permute.default,
        aten.swapaxes.default,
    }
)
_SPREADS = frozenset(
    {
        aten.expand.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
    }
)
CARRIERS = TRANSPARENT | _FLIPS | _SPREADS
"""Operators between a parameter and the operator that computes with it."""


@dataclass(frozen=True, eq=False)
class Match:
    """An operator and the layer that computes the same.

    ``options`` are the layer's constructor arguments. ``weights`` maps the layer's parameter and
    buffer names to the arguments that hold them; where ``transposed``, the layer's weight is the
    transpose of the parameter. ``inputs`` are what the layer is called with, ``addend`` is added to
    its output. ``returns`` tells how its output becomes the operator's: ``same``, ``first`` (the
    operator returns a tuple of which only the first is used) or ``lstm`` (y, h, c for y, (h, c)).
    """

    node: Node
    layer: type[nn.Module]
    options: dict[str, Any]
    weights: dict[str, Node]
    inputs: tuple[Any, ...]
    transposed: bool = False
    addend: Node | None = None
    returns: str = "same"


Pattern = Callable[[Node, dict[str, Any]], Match | None]
PATTERNS: dict[Any, Pattern] = {}


def match(node: Node) -> Match | None:
    """Return which layer computes what ``node`` does, or None."""
    pattern = PATTERNS.get(node.target) if node.op == "call_function" else None
    found = pattern(node, bind(node)) if pattern else None
    if found is None or not found.weights or not all(map(_is_float, found.weights.values())):
        return None
    if found.returns == "first" and any(
        user.target is not operator.getitem or (user.args[1] != 0 and user.users)
        for user in node.users
    ):
        return None
    return found


def bind(node: Node) -> dict[str, Any]:
    """Return every argument of an operator's call by its name, defaults included."""
    target: Any = node.target
    bound = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def root(node: Any) -> Node | None:
    """Return the stored tensor that ``node`` carries unchanged in numbers, or None."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in CARRIERS:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Return the shape of what ``node`` computes (entries may be symbolic), or None."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_stored(node: Any) -> bool:
    """Whether ``node`` is a stored tensor as it is: not transposed, not reshaped."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in TRANSPARENT:
        node = node.args[0]
    return isinstance(node, Node) and node.op == "get_attr"


def stored(**arguments: Any) -> dict[str, Node] | None:
    """Return the arguments that are given, or None where one is not a stored tensor."""
    given = {name: node for name, node in arguments.items() if node is not None}
    return given if all(map(is_stored, given.values())) else None


def _matrix(node: Any) -> tuple[tuple[int, int], bool] | None:
    """Return (rows, columns) of the stored matrix that ``node`` holds, and whether it is flipped.

    The matrix may be repeated over leading dimensions, as decompositions of a batched product do.
    """
    if not isinstance(node, Node):
        return None
    shape = shape_of(node)
    if node.op == "get_attr":
        return (shape, False) if shape is not None and len(shape) == 2 else None
    if node.op != "call_function" or node.target not in CARRIERS or shape is None:
        return None
    inner = _matrix(node.args[0])
    if inner is None:
        return None
    (rows, columns), flipped = inner
    if node.target in _FLIPS:
        return _flip(node, (rows, columns), flipped)
    return inner if shape[-2:] == (rows, columns) else None


def _flip(node: Node, size: tuple[int, int], flipped: bool) -> tuple[tuple[int, int], bool] | None:
    """Return the matrix of a transposition, None where it is one of more than two dimensions."""
    if len(shape_of(node.args[0]) or ()) != 2:
        return None
    permutes = node.target is aten.permute.default
    given: Any = node.args[1] if permutes else node.args[1:]
    axes = [axis % 2 for axis in given]
    swaps = not axes or (axes == [1, 0] if permutes else axes[0] != axes[1])
    return ((size[1], size[0]), not flipped) if swaps else (size, flipped)


def register(*targets: Any) -> Callable[[Pattern], Pattern]:
    """Return a decorator that files a pattern under the operators it reads."""

    def add(pattern: Pattern) -> Pattern:
        PATTERNS.update(dict.fromkeys(targets, pattern))
        return pattern

    return add


def _linear(
    node: Node, x: Any, weight: Any, *, product: bool, bias: Any = None, addend: Any = None
) -> Match | None:
    """Return the nn.Linear of x·weightᵀ (or x·weight where ``product``) + bias."""
    held = _matrix(weight)
    given = shape_of(x)
    if held is None or given is None:
        return None
    (rows, columns), flipped = held
    size_in, size_out = (rows, columns) if product else (columns, rows)
    # A matrix repeated over more dimensions than the input has would add them to the output.
    if [str(n) for n in (*given[:-1], size_out)] != [str(n) for n in shape_of(node) or ()]:
        return None
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    options = {"in_features": size_in, "out_features": size_out, "bias": bias is not None}
    return Match(node, nn.Linear, options, weights, (x,), flipped != product, addend)


@register(aten.linear.default)
def _linear_operator(node: Node, a: dict[str, Any]) -> Match | None:
    return _with_bias(node, a["input"], a["weight"], a["bias"], product=False)


@register(aten.addmm.default)
def _addmm(node: Node, a: dict[str, Any]) -> Match | None:
    if a["alpha"] != 1 or a["beta"] != 1:
        return None
    return _with_bias(node, a["mat1"], a["mat2"], a["self"], product=True)


def _with_bias(node: Node, x: Any, weight: Any, bias: Any, *, product: bool) -> Match | None:
    """Return the nn.Linear; a bias that is computed or of another shape is added after it."""
    size = shape_of(node)
    if bias is not None and not (is_stored(bias) and size and shape_of(bias) == size[-1:]):
        return _linear(node, x, weight, product=product, addend=bias)
    return _linear(node, x, weight, product=product, bias=bias)


@register(aten.mm.default, aten.bmm.default)
def _product(node: Node, a: dict[str, Any]) -> Match | None:
    return _linear(node, a["self"], a["mat2"], product=True)


@register(aten.matmul.default)
def _matmul(node: Node, a: dict[str, Any]) -> Match | None:
    return _linear(node, a["self"], a["other"], product=True)


@register(aten.mv.default)
def _matrix_vector(node: Node, a: dict[str, Any]) -> Match | None:
    return _linear(node, a["vec"], a["self"], product=False)


@register(aten.embedding.default)
def _embedding(node: Node, a: dict[str, Any]) -> Match | None:
    weights = stored(weight=a["weight"])
    size = shape_of(a["weight"])
    if weights is None or size is None:
        return None
    options = {
        "num_embeddings": size[0],
        "embedding_dim": size[1],
        "padding_idx": None if a["padding_idx"] < 0 else a["padding_idx"],
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }
    return Match(node, nn.Embedding, options, weights, (a["indices"],))
