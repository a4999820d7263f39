"""What stays in float may be bfloat16: attention, norms, residuals, layers without a recipe.

A model is lowered once it is prepared, and held against the untouched one in float32. From then on
every parameter and buffer of real numbers is rounded to bfloat16, and so is what comes in at the
model's door; what leaves it is float32 again. Weights are quantized from what they were before.

The user's code was written for float32, and may make constants of that. Most of torch computes a
mix of the two in float32; what refuses to (products, attention, norms) gets bfloat16 alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoquant.errors import UserError
from autoquant.nn.converted import Converted, converted_modules
from autoquant.nn.fold import folded_norms
from autoquant.nn.slots import SiteSlot

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16}
"""What the rest may be besides float32, by the name that recipes have for it."""


def in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Return ``tree`` with every tensor of real numbers in ``dtype``."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | PackedSequence):
            x = leaf.data if isinstance(leaf, PackedSequence) else leaf
            return leaf.to(dtype) if x.is_floating_point() else leaf
        return leaf

    return pytree.tree_map(cast, tree, is_leaf=lambda x: isinstance(x, PackedSequence))


# --- code that mixes the two ---------------------------------------------------------------------

PRODUCTS = frozenset(
    {
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.einsum, torch.baddbmm),
        *(torch.addmm, torch.inner, torch.tensordot, Tensor.matmul, Tensor.__matmul__),
        *(Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot, Tensor.baddbmm),
        *(Tensor.addmm, Tensor.inner, F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.prelu),
    }
)
"""What torch computes of one format alone."""


class _Mixing(TorchFunctionMode):
    """Lets calls of torch take tensors of ``dtype`` beside float32 where they would refuse to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, on one format where it takes no mix."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args, kwargs = self._alike(func, args, kwargs) or (args, kwargs)
        elif func is F.scaled_dot_product_attention:  # whose mask may be of another
            named = {name: kwargs[name] for name in ("query", "key", "value") if name in kwargs}
            alike = self._alike(func, args[:3], named)
            if alike is not None:
                args, kwargs = (*alike[0], *args[3:]), kwargs | alike[1]
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            alike = self._alike(func, args, kwargs) or self._within(args, kwargs)
            if alike is None:
                raise
        return func(*alike[0], **alike[1])

    def _within(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments with plain numbers that ``dtype`` has, None where it has them all.

        Such as the least float32, which masks are filled with: bfloat16 ends a little before.
        """
        most = torch.finfo(self.dtype).max

        def beyond(leaf: Any) -> bool:
            return isinstance(leaf, float) and most < abs(leaf) < math.inf

        if not any(map(beyond, pytree.tree_leaves((args, kwargs)))):
            return None
        within: tuple[Any, Any] = pytree.tree_map(
            lambda leaf: math.copysign(most, leaf) if beyond(leaf) else leaf, (args, kwargs)
        )
        return within

    def _alike(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments with all real numbers in one format, None where they are already.

        That is ``dtype``, or that of what is written into.
        """
        found = {
            leaf.dtype
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        if len(found) < 2 or self.dtype not in found:
            return None
        into = self.dtype
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            into = args[0].dtype
        elif isinstance(kwargs.get("out"), Tensor):
            into = kwargs["out"].dtype
        if not into.is_floating_point:
            return None
        alike: tuple[Any, Any] = in_dtype((args, kwargs), into)
        return alike


# --- the model's door ----------------------------------------------------------------------------


class _Door:
    """Stands before and behind a model: real numbers are ``dtype`` inside, and float32 outside."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.on = True
        self._inside: list[_Mixing | None] = []

    @property
    def inside(self) -> bool:
        """Whether the model is running."""
        return bool(self._inside)

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cast what the model is given."""
        if not self.on:
            self._inside.append(None)
            return None
        given = in_dtype((args, kwargs), self.dtype)
        mixing = _Mixing(self.dtype)
        mixing.__enter__()
        self._inside.append(mixing)
        return given

    def leave(self, _: nn.Module, args: Any, outputs: Any) -> Any:
        """Cast what the model returns; where it fails this is called, too."""
        mixing = self._inside.pop() if self._inside else None
        if mixing is None:
            return None
        mixing.__exit__(None, None, None)
        return in_dtype(outputs, torch.float32)


def hang_door(model: nn.Module, dtype: torch.dtype) -> _Door:
    """Put a door before and behind a model."""
    door = _Door(dtype)
    model.register_forward_pre_hook(door.enter, with_kwargs=True)
    model.register_forward_hook(door.leave, always_call=True)
    return door


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_always_called",
)


def drop_door(model: nn.Module) -> None:
    """Take the door off a copy of a model."""
    for key in [
        key
        for hooks in (model._forward_pre_hooks, model._forward_hooks)
        for key, hook in hooks.items()
        if isinstance(getattr(hook, "__self__", None), _Door)
    ]:
        for name in _HOOKS:
            getattr(model, name).pop(key, None)


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rest:
    """A lowered model's rest, ``name`` in recipes. ``swaps`` are (tensor, float32, rounded)."""

    name: str
    dtype: torch.dtype
    door: _Door
    slots: tuple[SiteSlot, ...]
    layers: tuple[Converted, ...]
    swaps: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Have the model in float32 inside, as it was: for gradients, and for what it should do."""
        self._turn(on=False)
        try:
            yield
        finally:
            self._turn(on=True)

    def _turn(self, *, on: bool) -> None:
        self.door.on = on
        for tensor, exact, rounded in self.swaps:
            tensor.data = rounded if on else exact
        dtype = self.dtype if on else None
        for slot in self.slots:
            slot.rest = dtype
        for layer in self.layers:
            layer.rest = dtype


def lowered(model: nn.Module, slots: Iterable[SiteSlot], name: str) -> Rest:
    """Round a model to the format ``name``, in place; its weights are quantized from what they are.

    Nothing that a layer gives is made ready for the next one from here on: it is rounded between
    the two. Raises UserError, naming the tensor, where one can't be rounded.
    """
    dtype = DTYPES[name]
    folded = {id(t) for norm in folded_norms(model) for t in _tensors(norm).values()}
    swaps = []
    for path, tensor in _tensors(model).items():
        if id(tensor) in folded or not tensor.is_floating_point():
            continue
        exact = tensor.data
        try:
            rounded = exact.to(dtype)
            tensor.grad = None
            tensor.data = rounded
        except (RuntimeError, NotImplementedError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path}: can't be {dtype} ({why}): --rest float32") from error
        swaps.append((tensor, exact, rounded))
    exactly = {id(tensor): exact for tensor, exact, _ in swaps}
    mine = tuple(slots)
    for slot in mine:
        slot.exact = exactly.get(id(slot.parameter))
    layers = tuple(converted_modules(model))
    for layer in layers:
        layer.after = layer.reader = layer.plan = None
    door = hang_door(model, dtype)
    rest = Rest(name, dtype, door, mine, layers, tuple(swaps))
    rest._turn(on=True)
    return rest


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, each once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_float32(model: nn.Module, name: str) -> None:
    """Raise UserError where a model that is to have a lower rest is not float32 itself."""
    for path, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(
                f"--rest {name} takes a model in float32, and {path} is "
                f"{str(tensor.dtype).removeprefix('torch.')}: without --rest its own formats stay"
            )


@dataclass
class Calls:
    """Calls of a lowered model's modules: which are ``running``, by name, the innermost last.

    ``alone`` are modules that were called from outside of the model, past its door.
    """

    running: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """What was running when an error came up."""
        return self.running[-1] if self.running else "the code around the model"


@contextlib.contextmanager
def watched(model: nn.Module, rest: Rest) -> Iterator[Calls]:
    """Watch the calls of a lowered model inside."""
    calls, names = Calls(), {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        name = f"{names[id(module)] or 'the model'} ({type(module).__name__})"
        if module is not model and not rest.door.inside:
            calls.alone.append(name)
        calls.running.append(name)

    def leave(module: nn.Module, args: Any, outputs: Any) -> None:
        calls.running.pop()

    handles = []
    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
