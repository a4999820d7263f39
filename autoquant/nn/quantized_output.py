"""A layer's output that stays integers until the one layer that reads it.

To the user's code it is a float32 tensor like any other. Whoever touches it beside that layer gets
the real numbers, computed then: nothing depends on a guess about who reads it, only the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from autoquant.kernels.layout import lies_channels_last
from autoquant.spec.recipe import ActivationScheme

_FORM = frozenset(
    {
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "grad_fn"),
        *("is_quantized", "is_sparse", "is_mkldnn", "is_meta", "is_nested", "names"),
    }
)
_ASKED = frozenset(
    {
        *("dim", "size", "stride", "numel", "is_contiguous", "__len__", "is_floating_point"),
        *("is_complex", "is_conj", "is_neg", "is_inference", "element_size", "get_device"),
    }
)
"""Attributes and methods that read nothing of a tensor but its form."""


class QuantizedOutput(Tensor):
    """``q``, uint8, the integers that ``scheme`` makes of a layer's float32 output.

    ``compute`` gives that output itself, which lies in memory as ``stride`` says, from ``source``,
    the integers that the layer read. Nobody writes into either. Where ``gelu`` is set, ``q`` are
    the integers of the output's GELU of that approximation: whoever asks for it gets them.
    """

    q: Tensor
    source: Tensor
    scheme: ActivationScheme
    compute: Callable[[Tensor], Tensor]
    gelu: str | None
    channels_last: bool
    _real: Tensor | None
    _made: int

    @staticmethod
    def of(
        q: Tensor,
        source: Tensor,
        scheme: ActivationScheme,
        compute: Callable[[Tensor], Tensor],
        stride: tuple[int, ...],
        gelu: str | None = None,
    ) -> QuantizedOutput:
        """Return the output."""
        y: QuantizedOutput = Tensor._make_wrapper_subclass(
            QuantizedOutput, q.shape, strides=stride, dtype=torch.float32, device=q.device
        )
        y.q, y.source, y.scheme, y.compute, y.gelu = q, source, scheme, compute, gelu
        y.channels_last = lies_channels_last(q.shape, stride)
        y._real, y._made = None, 0
        return y

    def marks(self) -> dict[str, Any]:
        """Return what was written on the output beside its numbers."""
        own = QuantizedOutput.__annotations__
        return {name: value for name, value in vars(self).items() if name not in own}

    def activated(self) -> QuantizedOutput:
        """Return the output's GELU, as ``gelu`` says."""
        assert self.gelu is not None
        compute, approximate = self.compute, self.gelu
        return QuantizedOutput.of(
            self.q,
            self.source,
            self.scheme,
            lambda source: F.gelu(compute(source), approximate=approximate),
            self.stride(),
        )

    @property
    def seen(self) -> bool:
        """Whether anybody has the real numbers."""
        return self._real is not None

    @property
    def written(self) -> bool:
        """Whether the real numbers were written into, or may have been: then ``q`` is not they."""
        real = self._real
        return real is not None and (real.is_inference() or real._version != self._made)

    def dequantized(self) -> Tensor:
        """Return the real numbers, always the same tensor."""
        if self._real is None:
            self._real = self.compute(self.source)
            self._made = 0 if self._real.is_inference() else self._real._version
        return self._real

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what is asked of the form; for all else put the real numbers in its place."""
        if leaves_alone(func, args, kwargs):
            return args[0]
        if (asked := gelu_of(func, args, kwargs)) is not None:
            x = args[0]
            if isinstance(x, QuantizedOutput) and x.gelu == asked and not x.written:
                return x.activated()
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            plain = name in _FORM
        else:
            plain = name in _ASKED
        if plain:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(as_real, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Put the real numbers in its place, where code reached it without torch's functions."""
        args, kwargs = pytree.tree_map(as_real, (args, kwargs or {}))
        return func(*args, **kwargs)


def gelu_of(func: Any, args: tuple[Any, ...], kwargs: Any) -> str | None:
    """Return the approximation where a call of torch is a GELU of its first argument, or None."""
    if func is not F.gelu or len(args) != 1:
        return None
    return str((kwargs or {}).get("approximate", "none"))


def leaves_alone(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Return whether a call of torch gives its first argument as it is: a dropout at rest."""
    return func is F.dropout and len(args) == 1 and not (kwargs or {}).get("training", True)


def as_real(x: Any) -> Any:
    """Return the real numbers of a QuantizedOutput, anything else as it is."""
    return x.dequantized() if isinstance(x, QuantizedOutput) else x
