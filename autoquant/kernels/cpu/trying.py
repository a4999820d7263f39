"""The child process of ``verification``: tries convolutions, and says what came out.

Geometries come as lines of JSON on standard input; each is answered by ``right``, ``wrong``, or
``failed`` where it could not be tried, for want of memory say. Whatever libraries print goes
nowhere.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
from typing import Any

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
    x = torch.randint(0, 256, g.x, generator=draw, dtype=torch.uint8)
    scale = torch.rand(g.weight[0], generator=draw, dtype=torch.float32) + 0.5
    bias = torch.randn(g.weight[0], generator=draw, dtype=torch.float32)
    zero_point = ZERO_POINT if g.zero_point else 0
    channels = (1, -1, *[1] * (len(g.x) - 2))
    exact = multiply(g.operation, x.float().sub_(zero_point), q.float(), None)
    exact.mul_(scale.view(channels))
    bias *= float(exact.abs().max()) / 4
    sum_ = exact + bias.view(channels)
    size = max(float(exact.abs().max()), float(bias.abs().max()))
    weight = PackedWeight(q, scale, scale, largest, float(scale.max()), {})
    product = ConvProduct(
        weight, ActivationScheme(8, scale=1.0, zero_point=zero_point - 128), g.operation
    )
    limit = (-size / 3, size / 2)
    found = [
        product.run(x, 1.0, bias, None),
        product.run(x, 1.0, None, limit),
    ]
    wanted = [sum_, exact.clamp(*limit)]
    if any(_furthest(y, z) > TOLERANCE * size for y, z in zip(found, wanted, strict=True)):
        return False
    if product.axes == 3:  # oneDNN hands on no bytes of volumes
        return True
    step = size / 150
    stored = product.run(x, 1.0, bias, (0.0, math.inf), (step, 3))
    return _furthest(stored, (sum_.clamp(min=0.0) / step + 3).clamp(0, 255)) <= 0.5 + 1e-3


def _furthest(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return math.inf
    return float((found.float() - exact).abs().nan_to_num(nan=math.inf).max())


def main() -> None:
    """Answer until the input ends, or nothing was asked for a while."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print("ready", file=answers, flush=True)
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
