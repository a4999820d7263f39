"""Compiles every kernel for a GPU that need not be there: ``python compile_kernels.py 80``.

The interpreter takes what the compiler refuses. Prints one line a kernel: its name, the bytes of
shared memory, and the instructions that matter.
"""

from __future__ import annotations

import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from autoquant.kernels.gpu.device import (
    chained,
    chained_convolution,
    convolution,
    images,
    matmul,
    packed,
    rows,
)

INT8 = ("q", "a", "b", "w")
INT32 = ("x_sum", "w_zero", "w_sum", "sums", "flag")
CUT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}
CONV = {"PER_SAMPLE": True, "LAST": False, "HAS_BIAS": True, "X_ZERO": True}
CHAINED = {"HAS_BIAS": 1, "HANDS": 1}
TO_INT8 = {"out": "*i8", "low": "fp32", "high": "fp32"}
HALF = {"x": "*bf16", "bias": "*bf16", "out": "*bf16"}
KERNELS = [
    (
        matmul.int8_matmul,
        CUT | {"HAS_BIAS": True, "X_ZERO": True, "W_ZERO": True},
        {"x_zero": "*i32"},
    ),
    *(
        (
            chained.chained_matmul,
            CUT | CHAINED | {"W_ZERO": zero, "AFTER": after, "EVEN": even},
            TO_INT8,
        )
        for zero, after, even in ((0, 0, 1), (1, 1, 0), (0, 2, 1), (0, 3, 1))
    ),
    (
        chained.chained_matmul,
        CUT | CHAINED | {"HANDS": 0, "W_ZERO": 1, "AFTER": 1, "EVEN": 0},
        TO_INT8 | {"out": "*fp32"},
    ),
    *(
        (
            chained_convolution.chained_convolution,
            CUT
            | CHAINED
            | {"WINDOW": window, "PADDED": window > 0, "W_ZERO": zero, "AFTER": after}
            | {"ALIGNED": 16, "ALIGNED_N": 16, "LAST": 1},
            TO_INT8,
        )
        for window, zero, after in ((0, 0, 1), (1, 0, 1), (2, 0, 0), (1, 1, 2), (2, 1, 1))
    ),
    (
        chained_convolution.chained_convolution,
        CUT
        | CHAINED
        | {"WINDOW": 2, "PADDED": 1, "W_ZERO": 1, "AFTER": 1, "HANDS": 0}
        | {"ALIGNED": 1, "ALIGNED_N": 1, "LAST": 0},
        TO_INT8 | {"out": "*fp32"},
    ),
    *(
        (
            chained_convolution.chained_convolution,
            CUT
            | CHAINED
            | {"WINDOW": 2, "PADDED": 1, "W_ZERO": 1, "AFTER": after}
            | {"ALIGNED": 4, "ALIGNED_N": 1, "LAST": 1},
            TO_INT8,
        )
        for after in (1, 2, 3)
    ),
    *(
        (
            chained_convolution.chained_depthwise,
            CHAINED
            | {"MULTIPLIER": 1, "TAPS_Y": 3, "TAPS_X": 3, "HANDS": hands, "LAST": hands}
            | {"AFTER": 1, "BLOCK_M": 32, "BLOCK_N": 64},
            TO_INT8 | ({} if hands else {"out": "*fp32"}),
        )
        for hands in (1, 0)
    ),
    (chained.quantize_flat, {"BLOCK": 2048}, {}),
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
        convolution.int8_convolution,
        CUT | CONV | {"ALIGNED": 16, "W_ZERO": True},
        {},
    ),
    (
        convolution.depthwise_convolution,
        CONV | {"MULTIPLIER": 1, "TAPS_Y": 3, "TAPS_X": 3} | {"BLOCK_M": 32, "BLOCK_N": 32},
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
)
MORE_POINTERS = ("lows", "highs")
TELLING = (
    r"\b((?:wg)?mma[\w.]*s32[\w.]*|(?:wg)?mma[\w.]*bf16[\w.]*"
    r"|cp\.async\.c[ag]|div\.\w+\.f32|\w+\.ftz[\w.]*)"
)


def type_of(name: str, types: dict[str, str]) -> str:
    """Return the Triton type of an argument."""
    if name in types:
        return types[name]
    if name in INT8:
        return "*i8"
    if name in INT32:
        return "*i32"
    if name == "packed":
        return "*u8"
    return "*fp32" if name in POINTERS + MORE_POINTERS else "i32"


def main(capability: int) -> None:
    """Compile everything; raise what the compiler does."""
    for kernel, constants, types in KERNELS:
        signature = {
            n: "constexpr" if n in constants else type_of(n, types) for n in kernel.arg_names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if signature[n].startswith("*")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        telling = sorted(set(re.findall(TELLING, made.asm["ptx"])))
        print(kernel.__name__, made.metadata.shared, *telling)


if __name__ == "__main__":
    main(int(sys.argv[1]))
