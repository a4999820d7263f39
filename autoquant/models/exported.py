"""Exported programs as ordinary models: every operator that takes parameters becomes its nn layer.

torch.export leaves operators (``aten.conv2d(x, features_0_0_weight)``) where the model had modules.
Lifting puts an ``nn.Conv2d`` with that very parameter at ``features.0.0`` and calls it instead, so
whatever works on modules works on an exported program too, under the same names.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from autoquant.models import lift_layers  # noqa: F401  (registers its patterns)
from autoquant.models.lift_patterns import CARRIERS, Match, aten, match, root
from autoquant.models.lift_places import Placer


def lift(program: ExportedProgram) -> GraphModule:
    """Return ``program`` as a module tree in eval mode that computes the same.

    It is called as ``program.module()`` is, and checks the shapes of its inputs as that does
    (AssertionError "Guard failed: …"). Names: the parameter ``a.b.weight`` makes the layer ``a.b``;
    a parameter of another name, ``a.w``, makes the layer ``a.w`` with the parameter
    ``a.w.weight``. x·W becomes nn.Linear, whose weight is Wᵀ. A parameter is lifted only where
    every operator that reads it is: others stay parameters of the graph. Layers that shared a
    parameter share it still. Parameters are those of ``program``, not copies, save the transposed.
    """
    module = _stateful(program)
    _inline_no_grad(module)
    names = _merge_aliases(module)
    # Looked up before the first layer takes a parameter's place.
    matches = [
        (found, {role: _tensor(module, node) for role, node in found.weights.items()})
        for found in _liftable(module)
    ]
    placer = Placer(module, names)
    replaced: dict[Node, Node] = {}
    for found, tensors in matches:
        _call(module, found, placer.place(found, tensors), replaced)
    placer.drop_leftovers()
    module.graph.lint()
    module.recompile()
    return module.eval()


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """Return ``module``, moved to ``device`` with what its graphs make on the way.

    A lifted program says of each tensor that it makes on which device: those of its export.
    """
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = pytree.tree_map_only(
                    torch.device, lambda _: device, (node.args, node.kwargs)
                )
            part.recompile()
    return module.to(device)


def _stateful(program: ExportedProgram) -> GraphModule:
    """Return ``program.module()`` with its input checks, able to switch to eval mode and back."""
    if not program.example_inputs:
        # The checks are only generated beside example inputs, of which they read the structure.
        spec = program.call_spec.in_spec
        program = copy.copy(program)
        program._example_inputs = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    module = program.module()
    # Replaced by methods that raise, since operators such as dropout hold the mode they were
    # exported in; the layers that are lifted have a mode of their own.
    for name in ("train", "eval"):
        module.__dict__.pop(name, None)
    return module


def _inline_no_grad(module: GraphModule) -> None:
    """Replace each call of a ``torch.no_grad()`` block by its operators: the numbers are the same.

    In the block's own graph its parameters would be inputs that have no names.
    """
    inline = torch.ops.higher_order.wrap_with_set_grad_enabled
    while calls := [n for n in module.graph.nodes if n.target is inline]:
        for node in calls:
            block = node.args[1]
            body = getattr(module, block.target)
            holders = [n for n in body.graph.nodes if n.op == "placeholder"]
            given: dict[Node, Any] = dict(zip(holders, node.args[2:], strict=True))
            with module.graph.inserting_before(node):
                results: Any = module.graph.graph_copy(body.graph, given)
            if not isinstance(results, (tuple, list)):
                node.replace_all_uses_with(results)
            for user in tuple(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
            module.graph.erase_node(node)
            if not block.users:
                module.graph.erase_node(block)
                delattr(module, block.target)


def _merge_aliases(module: GraphModule) -> dict[int, list[str]]:
    """Make parameters that are one tensor one object; return the names of each, by its id.

    An archive keeps tied weights as several views of one storage.
    """
    seen: dict[tuple[Any, ...], Tensor] = {}
    names: dict[int, list[str]] = defaultdict(list)
    for path, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in tuple(table.items()):
                if tensor is None:
                    continue
                key = (
                    (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                    if table is owner._parameters and tensor.numel()
                    else id(tensor)
                )
                table[name] = seen.setdefault((key,), tensor)
                names[id(table[name])].append(f"{path}.{name}" if path else name)
    return names


def _liftable(module: GraphModule) -> list[Match]:
    """Return the matches whose parameters are read by nothing but matches, in graph order."""
    found = {node: m for node in module.graph.nodes if (m := match(node)) is not None}
    readers: dict[int, list[tuple[Node, Node]]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[id(_attribute(module, node.target))].extend(_readers(node))
    while True:
        spoiled = {
            tensor
            for tensor, uses in readers.items()
            if not all(user in found and _reads_as_weight(found[user], via) for user, via in uses)
            or len({found[user].transposed for user, via in uses if _is_matrix(found[user], via)})
            > 1
        }
        kept = {
            node: m
            for node, m in found.items()
            if not spoiled & {id(_tensor(module, w)) for w in m.weights.values()}
        }
        if len(kept) == len(found):
            return list(found.values())
        found = kept


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (operator, argument) of every operator that reads the stored tensor ``node``."""
    for user in node.users:
        if user.op == "call_function" and user.target in CARRIERS and user.args[0] is node:
            yield from _readers(user)
        else:
            yield user, node


def _reads_as_weight(found: Match, via: Node) -> bool:
    inputs = pytree.tree_leaves((found.inputs, found.addend))
    return any(via is w for w in found.weights.values()) and not any(via is i for i in inputs)


def _is_matrix(found: Match, via: Node) -> bool:
    return found.weights.get("weight") is via


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _tensor(module: nn.Module, weight: Node) -> Tensor:
    """Return the stored tensor that an argument of an operator carries."""
    stored = root(weight)
    assert stored is not None  # patterns match stored tensors only
    return _attribute(module, str(stored.target))


def _call(module: GraphModule, found: Match, path: str, replaced: dict[Node, Node]) -> None:
    """Replace the operator by a call of the layer at ``path``.

    ``replaced`` says which node stands for one that is gone, and learns those that go here.
    """
    node, graph = found.node, module.graph
    inputs, addend = map_arg((found.inputs, found.addend), lambda n: replaced.get(n, n))
    with graph.inserting_before(node):
        result = graph.call_module(path, inputs)
        if addend is not None:
            result = graph.call_function(aten.add.Tensor, (result, addend))
    outdated = {node: result}
    if found.returns != "same":
        outdated = {}
        for user in node.users:
            with graph.inserting_before(user):
                outdated[user] = _part(graph, result, user.args[1], found.returns)
    for old, new in outdated.items():
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    replaced.update(outdated)
    if found.returns != "same":
        graph.erase_node(node)
    for weight in found.weights.values():
        _erase_unused(weight)


def _part(graph: torch.fx.Graph, result: Node, index: Any, returns: str) -> Node:
    """Return entry ``index`` of what the operator returned, taken from what the layer returns."""
    if returns == "first":
        return result
    if index == 0:
        return graph.call_function(operator.getitem, (result, 0))
    state = graph.call_function(operator.getitem, (result, 1))
    return graph.call_function(operator.getitem, (state, index - 1))


def _erase_unused(node: Any) -> None:
    """Erase a parameter's node, and those that carried it, where nothing reads them any more."""
    if isinstance(node, Node) and not node._erased and not node.users:
        carried = node.args[0] if node.args else None
        node.graph.erase_node(node)
        _erase_unused(carried)
