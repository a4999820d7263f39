"""What oneDNN's products of integers may use of this processor: asked of oneDNN, not of the CPU.

``ONEDNN_MAX_CPU_ISA`` caps it. oneDNN reads that once, when it is first used.
"""

from __future__ import annotations

import functools
import os
import platform

import torch

BELOW_AMX = frozenset(
    {
        "SSE41",
        "AVX",
        "AVX2",
        "AVX2_VNNI",
        "AVX2_VNNI_2",
        "AVX512_CORE",
        "AVX512_CORE_VNNI",
        "AVX512_CORE_BF16",
        "AVX512_CORE_FP16",
        "AVX10_1_512",
    }
)
"""Values of ONEDNN_MAX_CPU_ISA under which no AMX is used; oneDNN takes others for no cap."""
X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})


def missing() -> str | None:
    """Return why oneDNN computes no products of integers here, in one line; None where it does."""
    if platform.machine().lower() not in X86:
        return f"oneDNN's products of integers are for x86 processors, not {platform.machine()}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    wanted = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise")
    absent = [name for name in wanted if not hasattr(torch.ops.onednn, name)]
    return f"this torch has no operator onednn::{absent[0]}" if absent else None


@functools.cache
def has_vnni() -> bool:
    """Return whether oneDNN adds products of bytes in 32 bits here (VNNI, or wider).

    It is tried: without VNNI two products are added in 16 bits first, which can't hold these.
    """
    if missing() is not None:
        return False
    for rows, columns, sign in ((1, 64, 1), (17, 130, -1), (64, 64, 1)):
        weight = torch.full((16, columns), 127 * sign, dtype=torch.int8)
        y = torch.ops.onednn.qlinear_pointwise(
            torch.full((rows, columns), 255, dtype=torch.uint8),
            1.0,
            0,
            torch.ops.onednn.qlinear_prepack(weight, None),
            torch.ones(16, dtype=torch.float32),
            torch.zeros(16, dtype=torch.int32),
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if not bool((y == 255 * 127 * columns * sign).all()):
            return False
    return True


@functools.cache
def has_amx() -> bool:
    """Return whether oneDNN may use AMX here; where it isn't sure, it may."""
    capped = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return torch.cpu._is_amx_tile_supported() and (capped or "").upper() not in BELOW_AMX
