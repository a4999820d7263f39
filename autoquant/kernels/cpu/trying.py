"""The child process of ``verification``: tries convolutions, and says what came out.

Its first line is ``guarded`` where the allocator of ``guard.c`` watches over memory, else
``unguarded``. Geometries come as lines of JSON on standard input; each is answered by ``right``,
``wrong``, or ``failed`` where it could not be tried, for want of memory say. One that writes beyond
its memory ends the process. Whatever libraries print goes nowhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from autoquant.kernels.cpu.geometry import Geometry
from autoquant.kernels.cpu.instructions import has_vnni
from autoquant.kernels.cpu.onednn import PAIR_LIMIT, ConvProduct
from autoquant.kernels.cpu.packed_weight import PackedWeight
from autoquant.kernels.operation import Operation
from autoquant.kernels.reference import multiply
from autoquant.spec.recipe import ActivationScheme

TOLERANCE = 1e-5
"""Largest difference to the reference's output, as a share of its largest number."""
ZERO_POINT = 121
SAMPLES = 3
"""How many different samples a batch holds."""
LARGEST = 127
IDLE_SECONDS = 60.0
"""How long a child stays that nobody asks; it takes 200 MB."""


def geometry_of(line: str) -> Geometry:
    """Return the geometry that a line of JSON says."""
    found: dict[str, Any] = json.loads(line)
    o = found.pop("operation")
    operation = Operation(
        o["kind"], tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"]
    )
    weight, x = tuple(found.pop("weight")), tuple(found.pop("x"))
    return Geometry(operation, weight, x, **found)


def is_right(g: Geometry) -> bool:
    """Return whether oneDNN gives the reference's output, as real numbers and as bytes."""
    draw = torch.Generator().manual_seed(0)
    largest = LARGEST if has_vnni() else PAIR_LIMIT // (2 * 255)
    q = torch.randint(-largest, largest + 1, g.weight, generator=draw, dtype=torch.int8)
    # A batch repeats a few samples, in an order in which a mistaken one would be seen.
    kinds = torch.arange(g.x[0]).remainder_(SAMPLES)
    samples = torch.randint(
        0, 256, (min(SAMPLES, g.x[0]), *g.x[1:]), generator=draw, dtype=torch.uint8
    )
    x = samples[kinds]
    scale = torch.rand(g.weight[0], generator=draw, dtype=torch.float32) + 0.5
    bias = torch.randn(g.weight[0], generator=draw, dtype=torch.float32)
    zero_point = ZERO_POINT if g.zero_point else 0
    channels = (1, -1, *[1] * (len(g.x) - 2))
    exact = multiply(g.operation, samples.float().sub_(zero_point), q.float(), None)
    exact.mul_(scale.view(channels))
    bias *= float(exact.abs().max()) / 4
    sum_ = exact + bias.view(channels)
    size = max(float(exact.abs().max()), float(bias.abs().max()))
    weight = PackedWeight(q, scale, scale, largest, float(scale.max()), {})
    product = ConvProduct(
        weight, ActivationScheme(8, scale=1.0, zero_point=zero_point - 128), g.operation
    )
    limit = (-size / 3, size / 2)
    with guarded():
        found = [product.run(x, 1.0, bias, None), product.run(x, 1.0, None, limit)]
    wanted = [sum_, exact.clamp(*limit)]
    if any(_furthest(y, z, kinds) > TOLERANCE * size for y, z in zip(found, wanted, strict=True)):
        return False
    if product.axes == 3:  # oneDNN hands on no bytes of volumes
        return True
    step = size / 150
    with guarded():
        stored = product.run(x, 1.0, bias, (0.0, math.inf), (step, 3))
    bytes_ = (sum_.clamp(min=0.0) / step + 3).clamp(0, 255)
    return _furthest(stored, bytes_, kinds) <= 0.5 + 1e-3


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Watch the memory that is taken within the context, by any thread, until it is freed."""
    guard = _guard() or (lambda on: None)
    guard(1)
    try:
        yield
    finally:
        guard(0)


@functools.cache
def _guard() -> Callable[[int], None] | None:
    """Return the switch of the allocator that was preloaded; None where none was."""
    try:
        switch = ctypes.CDLL(None).autoquant_guard
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows a name is needed
        return None
    switch.argtypes, switch.restype = [ctypes.c_int], None
    return cast(Callable[[int], None], switch)


def _furthest(found: Tensor, exact: Tensor, kinds: Tensor) -> float:
    """Return the largest difference of a batch to the outputs of the samples that it repeats."""
    if found.shape != (len(kinds), *exact.shape[1:]):
        return math.inf
    most = 0.0
    for i, kind in enumerate(kinds.tolist()):
        if i >= len(exact) and torch.equal(found[i], found[kind]):
            continue
        difference = (found[i].float() - exact[kind]).abs().nan_to_num_(nan=math.inf)
        most = max(most, float(difference.max()))
    return most


def main() -> None:
    """Answer until the input ends, or nothing was asked for a while."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print("unguarded" if _guard() is None else "guarded", file=answers, flush=True)
    while _is_asked():
        line = sys.stdin.readline()
        if not line:
            return
        g = geometry_of(line)
        torch.set_num_threads(g.threads)
        try:
            answer = "right" if is_right(g) else "wrong"
        except (RuntimeError, MemoryError):
            answer = "failed"
        print(answer, file=answers, flush=True)


def _is_asked() -> bool:
    """Wait for a line, which comes alone; return False where none comes for too long."""
    if os.name != "posix":  # pipes can't be waited for there
        return True
    return bool(select.select([sys.stdin], [], [], IDLE_SECONDS)[0])


if __name__ == "__main__":
    main()
