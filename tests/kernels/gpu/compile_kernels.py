"""Compiles every kernel for a GPU that need not be there: ``python compile_kernels.py 80``.

The interpreter takes what the compiler refuses. Prints one line a kernel: its name, the bytes of
shared memory, the bytes of a thread's stack, which is where registers are spilled to, and the
instructions that matter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from autoquant.kernels.gpu.device import (
    convolution,
    images,
    matmul,
    normalizing,
    packed,
    rows,
)

INT8 = ("q", "a", "b", "w")
INT32 = ("x_sum", "w_zero", "w_sum", "sums", "flag")
CUT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}
CHAINED = {"OWN": 0, "HAS_BIAS": 1, "X_ZERO": 1, "HANDS": 1, "ADDS": 0}
OWN = CHAINED | {"OWN": 1, "HANDS": 0, "AFTER": 0}
SUM = CHAINED | {"HANDS": 0, "ADDS": 1}
DEPTHWISE = {"WINDOW": 3, "MULTIPLIER": 1, "TAPS_Y": 3, "TAPS_X": 3, "ALIGNED": 1, "W_ZERO": 0}
DEPTHWISE |= {"BLOCK_K": 1, "GROUP_M": 1}
PLAIN = {"MULTIPLIER": 1, "TAPS_Y": 1, "TAPS_X": 1}
"""What convolutions take by default that are not depthwise."""
TO_REAL = {"low": "fp32", "high": "fp32", "statics": (), "integers": ()}
TO_INT8 = TO_REAL | {"out": "*i8"}
EVEN = "i32, a multiple of 16"
TO_SUM = TO_REAL | {"statics": 3 * ("*fp32",), "integers": 3 * ("*i8",)}
HALF = {"x": "*bf16", "bias": "*bf16", "out": "*bf16"}
KERNELS = [
    (
        matmul.int8_matmul,
        CUT | OWN | {"W_ZERO": 1, "EVEN": 0},
        TO_REAL | {"x_zero": "*i32"},
    ),
    *(
        (
            matmul.int8_matmul,
            CUT | CHAINED | {"W_ZERO": zero, "AFTER": after, "EVEN": even},
            TO_INT8,
        )
        for zero, after, even in ((0, 0, 1), (1, 1, 0), (0, 2, 1), (0, 3, 1))
    ),
    (
        matmul.int8_matmul,
        CUT | CHAINED | {"HANDS": 0, "W_ZERO": 1, "AFTER": 1, "EVEN": 0},
        TO_REAL,
    ),
    (
        convolution.int8_convolution,
        CUT
        | OWN
        | {"WINDOW": 2, "PADDED": 0, "W_ZERO": 1}
        | {"ALIGNED": 16, "ALIGNED_N": 16, "ALIGNED_AREA": 1, "LAST": 0},
        TO_REAL,
    ),
    *(
        (
            convolution.int8_convolution,
            CUT
            | CHAINED
            | {"WINDOW": window, "PADDED": window > 0, "W_ZERO": zero, "AFTER": after}
            | {"ALIGNED": 16, "ALIGNED_N": 16, "ALIGNED_AREA": 4, "LAST": 1},
            TO_INT8,
        )
        for window, zero, after in ((0, 0, 1), (1, 0, 1), (2, 0, 0), (1, 1, 2), (2, 1, 1))
    ),
    (
        convolution.int8_convolution,
        CUT
        | CHAINED
        | {"WINDOW": 2, "PADDED": 1, "W_ZERO": 1, "AFTER": 1, "HANDS": 0}
        | {"ALIGNED": 1, "ALIGNED_N": 1, "ALIGNED_AREA": 1, "LAST": 0},
        TO_REAL,
    ),
    *(
        (
            convolution.int8_convolution,
            CUT
            | CHAINED
            | {"WINDOW": 2, "PADDED": 1, "W_ZERO": 1, "AFTER": after}
            | {"ALIGNED": 4, "ALIGNED_N": 1, "ALIGNED_AREA": 1, "LAST": 1},
            TO_INT8,
        )
        for after in (1, 2, 3)
    ),
    *(
        (
            convolution.int8_convolution,
            CUT
            | SUM
            | {"WINDOW": 2, "PADDED": 1, "W_ZERO": 1, "AFTER": 1}
            | {"ALIGNED": 4, "ALIGNED_N": 1, "ALIGNED_AREA": 1, "LAST": last},
            TO_SUM,
        )
        for last in (1, 0)
    ),
    (
        convolution.int8_convolution,
        OWN
        | DEPTHWISE
        | {"PADDED": 0, "LAST": 0, "ALIGNED": 16, "ALIGNED_N": 16}
        | {"ALIGNED_AREA": 1, "BLOCK_M": 32, "BLOCK_N": 32},
        TO_REAL,
    ),
    *(
        (
            convolution.int8_convolution,
            CHAINED
            | DEPTHWISE
            | {"PADDED": 1, "HANDS": hands, "LAST": hands, "ALIGNED_N": 1}
            | {"AFTER": 1, "ALIGNED_AREA": 4, "BLOCK_M": 32, "BLOCK_N": 64},
            TO_INT8 if hands else TO_REAL,
        )
        for hands in (1, 0)
    ),
    *(
        (
            matmul.int8_matmul,
            CUT | SUM | {"W_ZERO": zero, "AFTER": after, "EVEN": 1},
            TO_SUM | {"N": EVEN},
        )
        for zero, after in ((0, 0), (1, 1))
    ),
    *(
        (
            convolution.int8_convolution,
            CUT
            | SUM
            | {"WINDOW": window, "PADDED": window > 0, "W_ZERO": 0, "AFTER": 1}
            | {"ALIGNED": 16, "ALIGNED_N": 16, "ALIGNED_AREA": 4, "LAST": last},
            TO_SUM,
        )
        for window, last in ((0, 1), (1, 1), (2, 0))
    ),
    *(
        (
            convolution.int8_convolution,
            SUM
            | DEPTHWISE
            | {"PADDED": 1, "LAST": last, "ALIGNED_N": 16}
            | {"AFTER": 1, "ALIGNED_AREA": 4, "BLOCK_M": 32, "BLOCK_N": 64},
            TO_SUM | {"N": EVEN},
        )
        for last in (1, 0)
    ),
    (
        normalizing.normalize_rows,
        {"HAS_WEIGHT": 1, "HAS_BIAS": 1, "KEEPS": 1, "ROWS": 1, "BLOCK": 1024},
        {"N": EVEN, "eps": "fp32", "statics": 4 * ("*fp32",), "integers": 4 * ("*i8",)},
    ),
    (rows.quantize_flat, {"BLOCK": 2048}, {}),
    (
        rows.quantize_rows,
        {"SYMMETRIC": False, "DYNAMIC": True, "FOLD": False, "ROWS": 4, "BLOCK": 1024},
        {"zeros": "*i32"},
    ),
    (images.sample_qparams, {"SYMMETRIC": False, "BLOCK": 128}, {}),
    (
        images.quantize_images,
        {"PER_SAMPLE": True, "LAST": False, "FOLD": False, "BLOCK_P": 64, "BLOCK_C": 64},
        {},
    ),
    (
        convolution.spread_nan,
        {"BLOCK_M": 32, "BLOCK_K": 32},
        {},
    ),
    (
        packed.packed_vector,
        {"HAS_BIAS": True, "BITS": 3, "SPAN": 32, "GROUP_SPANS": 2, "BLOCK_N": 8},
        HALF,
    ),
    (
        packed.packed_vector,
        {"HAS_BIAS": True, "BITS": 7, "SPAN": 64, "GROUP_SPANS": 0, "BLOCK_N": 8},
        {},
    ),
    (
        packed.packed_matmul,
        {"HAS_BIAS": True, "BITS": 4, "SPAN": 32, "GROUP_SPANS": 0, "BLOCK_M": 16, "BLOCK_N": 32},
        HALF,
    ),
]
POINTERS = (
    "x",
    "static",
    "to_static",
    "scales",
    "zeros",
    "out",
    "bias",
    "x_scale",
    "x_zero",
    "w_scale",
    "other",
    "y",
    "weight",
)
MORE_POINTERS = ("lows", "highs")
TELLING = (
    r"\b((?:wg)?mma[\w.]*s32[\w.]*|(?:wg)?mma[\w.]*bf16[\w.]*"
    r"|(?:ld|st)\.global\.v4\.b32|cp\.async\.c[ag]|div\.\w+\.f32|\w+\.ftz[\w.]*)"
)


def type_of(name: str, types: dict[str, Any]) -> Any:
    """Return the Triton type of an argument."""
    if name in types:
        return "i32" if types[name] == EVEN else types[name]
    if name in INT8:
        return "*i8"
    if name in INT32:
        return "*i32"
    if name == "packed":
        return "*u8"
    return "*fp32" if name in POINTERS + MORE_POINTERS else "i32"


def multiples(signature: dict[str, Any], types: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """Return where a signature has multiples of 16: pointers, also in tuples, and even numbers."""
    for i, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            yield from ((i, j) for j in range(len(kind)))
        elif kind.startswith("*") or types.get(name) == EVEN:
            yield (i,)


def stack(cubin: bytes) -> int:
    """Return the bytes of a thread's stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", said))


def main(capability: int) -> None:
    """Compile everything; raise what the compiler does."""
    for kernel, given, types in KERNELS:
        constants = {n: PLAIN[n] for n in PLAIN if n in kernel.arg_names} | given
        signature = {
            n: "constexpr" if n in constants else type_of(n, types) for n in kernel.arg_names
        }
        aligned = {place: [["tt.divisibility", 16]] for place in multiples(signature, types)}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        telling = sorted(set(re.findall(TELLING, made.asm["ptx"])))
        spilled = stack(made.asm["cubin"])
        name = "depthwise_convolution" if "TAPS_Y" in given else kernel.__name__
        print(name, made.metadata.shared, spilled, *telling)


if __name__ == "__main__":
    main(int(sys.argv[1]))
