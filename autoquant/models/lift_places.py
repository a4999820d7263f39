"""Where a lifted layer goes in the module tree, and the layer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from autoquant.models.lift_patterns import Match, root


class Placer:
    """Puts layers where the parameters that they take over were."""

    def __init__(self, module: GraphModule, names: dict[int, list[str]]) -> None:
        self.module = module
        self.names = names
        self.placed: dict[tuple[Any, ...], str] = {}
        self.paths: set[str] = set()
        self.flipped: dict[int, nn.Parameter] = {}
        self.taken: dict[int, Tensor] = {}

    def place(self, found: Match, tensors: dict[str, Tensor]) -> str:
        """Return the path of the layer of ``found``, which is put there the first time."""
        options = tuple(sorted((k, str(v)) for k, v in found.options.items()))
        key = (found.layer, options, tuple((role, id(t)) for role, t in tensors.items()))
        if key not in self.placed:
            stored = root(next(iter(found.weights.values())))
            assert stored is not None
            path, extra = self._path(str(stored.target), found, tensors)
            self._put(path, self._build(found, tensors, extra))
            self.placed[key] = path
            self.taken.update({id(t): t for t in tensors.values()})
        return self.placed[key]

    def _path(
        self, target: str, found: Match, tensors: dict[str, Tensor]
    ) -> tuple[str, dict[str, Tensor]]:
        """Return a free path for the layer, and the buffers it takes along.

        The owner of the parameters, where it holds nothing else; otherwise the parameter's name;
        beside the layer that holds the parameter already, where there is one. Of the names of tied
        parameters, that of the module which the operator was called in is taken first: torch.export
        keeps the names, but not which of them the operator used.
        """
        role, tensor = next(iter(tensors.items()))
        caller = f"{_module_called(found.node)}.{role}"
        names = self.names[id(tensor)]
        for name in sorted(names, key=lambda n: (n != caller, n != target)):
            owner, _, last = name.rpartition(".")
            if last == role and owner and owner not in self.paths:
                holder = self.module.get_submodule(owner)
                held = {**holder._parameters, **holder._buffers}
                extra = {n: t for n, t in held.items() if n == "num_batches_tracked"}
                if (
                    type(holder) is nn.Module
                    and not holder._modules
                    and set(held) - set(extra) == set(tensors)
                    and all(held[r] is t for r, t in tensors.items())
                ):
                    return owner, extra  # type: ignore[return-value]
        holder_path = next((p for p in self.paths if f"{target}.".startswith(f"{p}.")), None)
        if holder_path is None:
            return target, {}
        path = base = f"{holder_path}_{found.layer.__name__.lower()}"
        count = 1
        while self._exists(path):
            count += 1
            path = f"{base}_{count}"
        return path, {}

    def _exists(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        return hasattr(self.module.get_submodule(owner), name)

    def _build(
        self, found: Match, tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> nn.Module:
        """Return the layer; it is made without memory and given the program's own tensors."""
        with torch.device("meta"):
            layer = found.layer(**found.options)
        if "num_batches_tracked" in layer._buffers:
            layer._buffers["num_batches_tracked"] = extra.get(
                "num_batches_tracked", torch.tensor(0, dtype=torch.int64)
            )
        for role, tensor in tensors.items():
            if role in layer._buffers:
                layer._buffers[role] = tensor
                continue
            if role == "weight" and found.transposed:
                tensor = self.flipped.setdefault(
                    id(tensor),
                    nn.Parameter(tensor.detach().t().contiguous(), tensor.requires_grad),
                )
            elif not isinstance(tensor, nn.Parameter):
                tensor = self.flipped.setdefault(
                    id(tensor), nn.Parameter(tensor, requires_grad=False)
                )
            setattr(layer, role, tensor)
        return layer

    def _put(self, path: str, layer: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        holder = self.module.get_submodule(owner)
        if name in holder.__dict__ or name in holder._parameters or name in holder._buffers:
            delattr(holder, name)
        holder.add_module(name, layer)
        self.paths.add(path)

    def drop_leftovers(self) -> None:
        """Delete the attributes whose tensors layers hold now: nothing reads them any more."""
        for identity in self.taken:
            for full in self.names[identity]:
                owner, _, name = full.rpartition(".")
                if any(full.startswith(f"{path}.") for path in self.paths):
                    continue
                holder = self.module.get_submodule(owner)
                if name in holder._parameters or name in holder._buffers:
                    delattr(holder, name)
        for node in tuple(self.module.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.module.graph.erase_node(node)


def _module_called(node: Node) -> str:
    """Return the path of the innermost module that the operator was exported from."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])
