"""A GPU that is not there: tensors that say they are on ``cuda:0``, and may not meet the CPU's.

Within ``SimulatedGPU`` whatever asks for the device ``cuda`` gets a CPU tensor whose memory is
marked. Python code sees its device as ``cuda:0``; every operator of torch is looked at before it
runs, and one that mixes both devices raises, as it would on a GPU, and is remembered, because what
raises may be caught. Numbers are the CPU's, so that results can be compared to the last digit.

What a GPU allows is allowed (PyTorch's "CUDA semantics"): numbers without an axis beside tensors
of a GPU in elementwise operators, copies from one to the other, indices on the CPU. What reads the
memory from outside of torch is refused: NumPy, and pointers that are given to C code.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
C_CODE = "autoquant.kernels.cpu"
"""The package whose modules give pointers to C."""
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)

_MARK = "_simulated_device"
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"}
_INDEXING |= {"_index_put_impl_", "_unsafe_masked_index"}
_CROSSING = {"copy_", "_copy_from", "_to_copy", "set_"}
_FILLING = {"fill", "fill_"}
_LENGTHS = {
    "_pack_padded_sequence": 1,
    "_pack_padded_sequence_backward": 2,
    "_pad_packed_sequence": 1,
}
"""Operators on sequences, and which of their arguments, lengths, is on the CPU always."""


def device_of(x: Tensor) -> torch.device:
    """Return the device that a tensor says it is on."""
    if not _real(x):
        return x.device
    return getattr(x.untyped_storage(), _MARK, CPU)


def _real(x: Tensor) -> bool:
    """Return whether a tensor has memory on the CPU, of which nobody else makes another device."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_meta


def _mark(x: Tensor, device: torch.device) -> None:
    if _real(x):
        setattr(x.untyped_storage(), _MARK, device)


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def _whole(device: Any) -> torch.device:
    """Return a device with its index, as tensors name it."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device(found.type, found.index or 0) if found.type == "cuda" else found


class _Python(TorchFunctionMode):
    """Answers what Python code asks for: which device a tensor is on, and to make one there."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").partition(".")[0]
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in ("__get__", "__set__"):
            name = f"{name} {getattr(getattr(func, '__self__', None), '__name__', '')}"
        if first is not None and _real(first):
            if name == "__get__ device":
                return device_of(first)
            if name in ("__get__ is_cuda", "__get__ is_cpu"):
                return (device_of(first) == GPU) == name.endswith("cuda")
            if name == "get_device":
                return 0 if device_of(first) == GPU else -1
            if name in ("to", "cuda", "cpu"):
                return self._move(first, name, args[1:], kwargs)
            if name == "__deepcopy__":
                return self._copied(first, func(*args, **kwargs))
            if name in ("new_tensor", "tensor") and kwargs.get("device") is None:
                kwargs["device"] = device_of(first)
            if device_of(first) == GPU:
                if name in ("numpy", "__array__"):
                    self.gpu.refuse("can't convert cuda:0 device type tensor to numpy", TypeError)
                if name == "data_ptr" and _caller().startswith(C_CODE):
                    self.gpu.refuse(f"the memory of a GPU, given to C code by {_caller()}")
        return self._run(func, name, args, kwargs)

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch; what it makes without a device is where its tensors are."""
        given = kwargs.get("device")
        if given is None:
            on_gpu = any(device_of(x) == GPU for x in _tensors(args, kwargs))
            with self.gpu.making(GPU if on_gpu else CPU):
                return func(*args, **kwargs)
        target = _whole(given)
        if target.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            self.gpu.refuse(f"Expected a {target.type!r} device type for generator")
        with self.gpu.making(target):
            made = func(*args, **kwargs | {"device": CPU})
        for x in _tensors(made):
            if device_of(x) != target and any(
                x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() != 0
                for y in _tensors(args)
            ):
                return _to(x, target, {"copy": True})  # as_tensor gave what it was given
            _mark(x, target)
        return made

    def _move(self, x: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if name == "cpu":
            return _to(x, CPU, {})
        if name == "cuda":
            given = args[0] if args else kwargs.pop("device", None)
            return _to(x, GPU if given is None else _whole(given), {})
        copy = kwargs.pop("copy", False)
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            device, dtype, memory_format = device_of(other), other.dtype, None
        else:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {"copy": copy}
        options |= {} if dtype is None else {"dtype": dtype}
        options |= {} if memory_format is None else {"memory_format": memory_format}
        return _to(x, device_of(x) if device is None else _whole(device), options)

    def _copied(self, source: Tensor, made: Tensor) -> Tensor:
        _mark(made, device_of(source))
        if source.grad is not None and made.grad is not None:
            _mark(made.grad, device_of(source.grad))
        return made


def _to(x: Tensor, device: torch.device, options: dict[str, Any]) -> Tensor:
    """Return ``x`` on a device: ``x`` itself, where it is there and nothing else is asked for."""
    if device.type not in ("cpu", "cuda"):
        return x.to(device, **options)
    moves = device != device_of(x)
    options = options | {"copy": True} if moves else options
    made = x.to(options.pop("dtype", x.dtype), **options)
    if moves:
        _mark(made, device)
    return made


def _caller() -> str:
    """Return the module of the code that called torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


class _Operators(TorchDispatchMode):
    """Looks at every operator before it runs, and says on which device its results are."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors(args, kwargs)
        if not all(map(_real, given)):
            return func(*args, **kwargs)
        devices = {device_of(x) for x in given}
        lengths = _LENGTHS.get(func.overloadpacket.__name__)
        if lengths is not None and device_of(args[lengths]) == GPU:
            self.gpu.refuse(f"lengths should be on the CPU ({func})")
        if len(devices) > 1 and not allowed(func, args, kwargs):
            self.gpu.refuse(f"{MIXED} ({func})")
        generator = kwargs.get("generator")
        if generator is not None and GPU in devices:
            self.gpu.refuse(f"Expected a 'cuda' device type for generator ({func})")
        made = func(*args, **kwargs)
        target = GPU if GPU in devices or (not devices and self.gpu.device == GPU) else CPU
        if target == GPU:
            known = {x.untyped_storage()._cdata for x in given}
            for x in _tensors(made if lengths is None else made[:1]):
                if x.untyped_storage()._cdata not in known:
                    _mark(x, GPU)
        return made


def allowed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a GPU takes this operator's tensors, which are on both devices."""
    name = func.overloadpacket.__name__
    if name in _CROSSING or name in _LENGTHS:
        return True
    if name in _FILLING:
        return all(x.dim() == 0 for x in _tensors(args[1:], kwargs))
    if name in _INDEXING:
        values = _tensors(args[2:3], {k: v for k, v in kwargs.items() if k == "values"})
        on_gpu = device_of(args[0]) == GPU
        indices = _tensors(args[1])
        return all(device_of(x) == device_of(args[0]) or not x.dim() for x in values) and (
            on_gpu or all(device_of(x) == CPU for x in indices)
        )
    if name.startswith("_foreach_"):
        lists = [a for a in args if isinstance(a, list | tuple) and _tensors(a)]
        return all(_elementwise(row, mutable=True) for row in zip(*lists, strict=False))
    if torch.Tag.pointwise in func.tags or name.startswith("masked_fill"):
        return _elementwise(_tensors(args, kwargs), mutable=func._schema.is_mutable)
    return False


def _elementwise(tensors: Iterable[Any], *, mutable: bool) -> bool:
    """Return whether an elementwise operator takes these: one device, but for the CPU's scalars.

    The first of ``tensors`` is written into where the operator is ``mutable``.
    """
    found = [x for x in tensors if isinstance(x, Tensor)]
    axes = [device_of(x) for x in found if x.dim()]
    common = axes[0] if axes else GPU
    if mutable and device_of(found[0]) != common:
        return False
    return all(
        device_of(x) == common or (common == GPU and x.dim() == 0 and device_of(x) == CPU)
        for x in found
    )


def _in_mode(mode: TorchFunctionMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    with mode:
        return func(*args, **kwargs)


class _Event:
    """Stands for a CUDA event, by the wall clock."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class SimulatedGPU:
    """A context in which there is a GPU, to all that autoquant and a user's code can see.

    Leaving it raises AssertionError where devices were mixed, whoever caught that, with the stack
    of the first time. ``mixed`` holds all of them. Backends for GPUs find none: layers are computed
    in float, by torch.
    """

    def __init__(self) -> None:
        self.mixed: list[str] = []
        self.device = CPU
        self._stack = ExitStack()

    def making(self, device: torch.device) -> _Making:
        """Return a context in which what torch makes from nothing is on ``device``."""
        return _Making(self, device)

    def refuse(self, why: str, kind: type[Exception] = RuntimeError) -> None:
        """Remember, and raise, what a GPU would raise."""
        stack = traceback.extract_stack()[:-1]
        ours = [frame for frame in stack if "/torch/" not in frame.filename]
        ours = [frame for frame in ours if frame.filename != __file__]
        self.mixed.append(f"{why}\n{''.join(traceback.format_list(ours[-12:]))}")
        raise kind(why)

    def __enter__(self) -> SimulatedGPU:
        with ExitStack() as stack:
            there = {
                "is_available": lambda: True,
                "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
                "get_device_name": lambda device=None: "simulated GPU",
                "get_rng_state": lambda device=None: torch.get_rng_state(),
                "synchronize": lambda device=None: None,
                "Event": _Event,
            }
            for name, found in there.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, found))
            python = _Python(self)
            # Hooks run while torch is asked for gradients, as whoever wrote them does: looked at.
            engine = torch.autograd._engine_run_backward
            with_hooks = functools.partial(_in_mode, python, engine)
            stack.enter_context(
                mock.patch.object(torch.autograd, "_engine_run_backward", with_hooks)
            )
            stack.enter_context(_Operators(self))
            stack.enter_context(python)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if self.mixed:
            raise AssertionError(f"{len(self.mixed)} times: {self.mixed[0]}") from error


class _Making:
    def __init__(self, gpu: SimulatedGPU, device: torch.device) -> None:
        self.gpu, self.device = gpu, device

    def __enter__(self) -> None:
        self.before, self.gpu.device = self.gpu.device, self.device

    def __exit__(self, *_: Any) -> None:
        self.gpu.device = self.before
