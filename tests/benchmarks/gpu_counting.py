"""What one forward of a candidate launches on a GPU, counted without one.

The model runs on tensors that have a shape and no memory (PyTorch's FakeTensorMode): kernels of
this project are noted instead of launched, PyTorch's operators are noted by what they read and
write. Structure and sizes are those of the program that a GPU records; what a kernel really fetches
from memory, and how long it takes, is not known here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.kernels.engine import Engine
from autoquant.kernels.gpu.backend import TritonBackend
from autoquant.kernels.gpu.launch import Launch, counting
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import Prepared, prepare, use_channels_last
from autoquant.spec.needs import needs_of
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

PRODUCT, DEPTHWISE, ATTENTION = "products", "depthwise convolutions", "attention"
QUANTIZING, NORMS, ADDING, OTHER = "quantizing", "layer norms", "additions, ReLUs", "the rest"
KINDS = (PRODUCT, DEPTHWISE, ATTENTION, QUANTIZING, NORMS, ADDING, OTHER)


@dataclass(frozen=True)
class Step:
    """One launch: bytes that it reads and writes, each tensor once, and operations.

    An addition and a multiplication are two operations. ``sources`` and ``results`` name the
    memory of the activations that it reads and writes.
    """

    name: str
    kind: str
    read: int
    written: int
    operations: int = 0
    sources: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()


def _memory(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(t.untyped_storage()._cdata for t in tensors)


WRITTEN = {
    "quantize_flat": ("q",),
    "quantize_images": ("q",),
    "quantize_rows": ("q", "scales", "zeros", "sums"),
    "sample_qparams": ("scales", "zeros"),
}
"""Arguments that kernels write; the others write ``out`` and, where they add, ``integers``."""


def of_kernel(launch: Launch) -> Step:
    """Return a launch of one of this project's kernels as a step."""
    named = launch.named()
    norm = launch.name == "normalize_rows"
    if not (norm or named.get("ADDS")):  # what stands there is not touched
        named = {n: x for n, x in named.items() if n not in ("other", "statics", "integers")}
    tensors = {
        n: [t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)] for n, x in named.items()
    }
    written = WRITTEN.get(launch.name, ("out", "integers", *(["y"] if named.get("KEEPS") else [])))
    if launch.name == "spread_nan":  # looks at its flag, and is done
        return Step(launch.name, OTHER, tensors["flag"][0].nbytes, 0)
    outs = {id(t): t for n in written for t in tensors.get(n, ())}
    inputs = [t for n, row in tensors.items() if n == "y" or n not in written for t in row]
    given = {id(t): t for t in inputs if id(t) not in outs or norm}
    read, wrote = (sum(t.nbytes for t in those.values()) for those in (given, outs))
    name, operations = launch.name, 0
    kind = QUANTIZING if name not in ("sample_qparams",) else OTHER
    if norm:
        kind = NORMS
    elif "N" in named:
        depthwise = "TAPS_Y" in named
        kind = DEPTHWISE if depthwise else PRODUCT
        name = "depthwise_convolution" if depthwise else name
        groups = launch.grid[1] if "convolution" in name and not depthwise else 1
        depth = named.get("K", 0) or named["width"]  # rows of ``int8_matmul`` are as wide as that
        operations = 2 * named["M"] * named["N"] * depth * groups
        if named.get("stride_x", 1) > 1 and not depthwise and depth == named.get("depth"):
            # One tap that skips pixels reads those alone that it meets.
            met = named["M"] * depth * groups
            read -= max(tensors["q"][0].nbytes - met, 0)
    first = [next(t for t in launch.arguments if isinstance(t, Tensor))]
    first += tensors.get("other", [])
    sources, results = _memory(first), _memory(outs.values())
    return Step(name, kind, read, wrote, operations, sources, results)


_SILENT = ("aten::empty", "aten::detach", "aten::alias", "prim::", "aten::_unsafe_view")
_KIND_OF = {
    "aten::native_layer_norm": NORMS,
    "aten::add": ADDING,
    "aten::add_": ADDING,
    "aten::relu": ADDING,
    "aten::relu_": ADDING,
    "aten::hardtanh": ADDING,
    "aten::hardtanh_": ADDING,
}
_GATHERS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")


def of_operator(func: Any, args: Any, kwargs: Any, made: Any) -> Step | None:
    """Return a call of a PyTorch operator as a step, None where it launches nothing."""
    name = func._schema.name
    if name.startswith(_SILENT) or (func.is_view and not func._schema.is_mutable):
        return None
    given = {
        id(x): x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()
    }
    results = {id(x): x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)}
    changed = [
        x
        for argument, x in zip(func._schema.arguments, args, strict=False)
        if isinstance(x, Tensor)
        and argument.alias_info is not None
        and argument.alias_info.is_write
    ]
    owned = {x.untyped_storage()._cdata for x in given.values()}
    fresh = [x for x in results.values() if x.untyped_storage()._cdata not in owned]
    if not fresh and not changed:
        return None
    wrote = sum(t.nbytes for t in (*fresh, *changed))
    read = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in given.values())
    short, operations = name.removeprefix("aten::"), 0
    kind = _KIND_OF.get(name, OTHER)
    if name in _GATHERS:
        read = wrote
    if "scaled_dot_product" in name:
        q, k = args[0], args[1]
        operations, kind = 4 * q.numel() * k.shape[-2], ATTENTION
        short, wrote = "scaled_dot_product_attention", q.nbytes
    if name in ("aten::copy_", "aten::zeros", "aten::fill_", "aten::zero_"):
        read -= sum(t.nbytes for t in changed)
    sources, results = _memory(given.values()), _memory((*fresh, *changed))
    return Step(short, kind, read, wrote, operations, sources, results)


class _Operators(TorchDispatchMode):
    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.alive: list[Any] = []  # so that no memory has the name of what is gone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.alive.append(made)
        step = of_operator(func, args, kwargs or {}, made)
        if step is not None:
            self.steps.append(step)
        return made


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let the backend prepare its products without a GPU; none is launched."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def candidate(model: torch.nn.Module, few: Tensor) -> Prepared:
    """Return the model with 8 bits in every layer, as this project's kernels take it.

    ``few`` inputs calibrate it: any will do where only sizes are looked at.
    """
    engine = Engine((TritonBackend(interpret=True),))
    prepared = prepare(model, lambda m: m(few), engine=engine)
    if any(site.layer == "Conv2d" for site in prepared.sites):
        use_channels_last(model)
    activation = ActivationScheme(8)
    recipe = {
        s.name: SiteRecipe(WeightScheme(8, calibration="max"), activation if s.activation else None)
        for s in prepared.sites
    }
    needs = {name: needs_of(site) for name, site in recipe.items()}
    Applier(prepared, calibrate(prepared, [few], lambda m, x: m(x), needs)).apply(recipe)
    with torch.no_grad(), counting(lambda *_: None):  # packs the weights
        model(few)
    return prepared


def steps_of(prepared: Prepared, shape: torch.Size, like: Tensor) -> list[Step]:
    """Return what one replayed forward launches on inputs of ``shape``, which lie as ``like``.

    Copying the inputs to where the recorded kernels read, and the output from where they write,
    belongs to it.
    """
    steps: list[Step] = []
    flag = torch.zeros(1, dtype=torch.int32)
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x = torch.empty(shape, dtype=like.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
    steps.append(Step("copy of the inputs", OTHER, x.nbytes, x.nbytes))
    with (
        torch.no_grad(),
        prepared.engine.collecting(flag),
        counting(lambda _, launch: steps.append(of_kernel(launch))),
        fake,
        _Operators(steps),
    ):
        y = prepared.model(x)
    return [*steps, Step("copy of the output", OTHER, y.nbytes, y.nbytes)]
