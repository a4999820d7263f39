"""Compiles the listed tiles for a GPU that need not be there: ``python compile_configs.py 80``.

Prints one line for each: the family, bytes of an activation, what was estimated and what the
compiler took of shared memory. Shapes are multiples of 16, for which loads run ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from compile_kernels import KERNELS, PLAIN, type_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from autoquant.kernels.gpu.defaults import table
from autoquant.kernels.gpu.launch import Config
from autoquant.kernels.gpu.shared_memory import SPAN, shared_bytes

BITS = 4
EVEN = ("width", "N", "K", "channels", "depth", "chunks")
FLOATS = {2: "*bf16", 4: "*fp32"}


def cases() -> Iterator[tuple[str, str, int]]:
    """Return family, name of its kernel and bytes of an activation."""
    yield "int8 matmul", "int8_matmul", 1
    yield "int8 convolution", "int8_convolution", 1
    for itemsize in FLOATS:
        yield "packed matmul", "packed_matmul", itemsize


def compiled(name: str, c: Config, itemsize: int, capability: int) -> int:
    """Return the bytes of shared memory that the compiler takes."""
    kernel, constants, types = next(k for k in KERNELS if k[0].__name__ == name)
    packed = {"SPAN": SPAN, "BITS": BITS} if name == "packed_matmul" else {}
    cut: dict[str, Any] = {k: v for k, v in constants.items() if k in kernel.arg_names}
    cut |= packed | dict(c.blocks) | (PLAIN if name == "int8_convolution" else {})
    if packed:
        types = types | dict.fromkeys(("x", "bias", "out"), FLOATS[itemsize])
    signature = {n: "constexpr" if n in cut else type_of(n, types) for n in kernel.arg_names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if str(signature[n]).startswith("*") or (n in EVEN and n not in cut)
    }
    source = ASTSource(kernel, signature, cut, even)
    options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(made.metadata.shared)


def main(capability: int) -> None:
    """Compile every listed tile that fits by the estimate."""
    limit = table().architecture(capability).shared_memory
    for family, name, itemsize in cases():
        bits = BITS if name == "packed_matmul" else 0
        for c in table().listed(family, capability):
            estimated = shared_bytes(c, bits, itemsize, capability)
            if estimated <= limit:
                took = compiled(name, c, itemsize, capability)
                print(family, itemsize, estimated, took, sep=",", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
