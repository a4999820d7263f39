import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_MEMORY = 99 * 1024
"""What a program of the smallest GPUs of capability 8 may have."""

STACK = 32
"""Bytes that a thread may have where its registers are too few: next to nothing."""
WIDE = {"ld.global.v4.b32", "st.global.v4.b32"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_the_instructions_they_are_made_for(tmp_path, capability):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines: dict[str, list[list[str]]] = {}
    for name, *words in map(str.split, done.stdout.splitlines()):
        lines.setdefault(name, []).append(words)
    for name in ("int8_matmul", "int8_convolution"):
        for words in lines[name]:
            assert any("mma" in word and "s8.s8" in word for word in words)
    assert "cp.async.cg" in lines["int8_convolution"][0]  # 16 bytes at a time
    sums = [
        words
        for name in ("int8_matmul", "int8_convolution", "depthwise_convolution", "normalize_rows")
        for words in lines[name]
        if set(words) >= WIDE
    ]
    assert len(sums) == 8  # what is added, and the sum, 16 bytes at a time
    for words in (*lines["int8_matmul"], *lines["int8_convolution"][:6], *sums[:5]):
        assert "cp.async.cg" in words
    assert any("mma" in word and "bf16" in word for word in lines["packed_matmul"][0])
    for name in ("quantize_rows", "quantize_images", "sample_qparams", "quantize_flat"):
        for _, _, *words in lines[name]:
            assert words == ["div.rn.f32"]  # IEEE division, and denormals are kept
    for words in (words for kernel in lines.values() for words in kernel):
        assert int(words[0]) <= SHARED_MEMORY
        assert int(words[1]) <= STACK
        assert not any(".ftz" in word for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_listed_tiles_take_no_more_shared_memory_than_estimated(tmp_path, capability):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("compile_configs.py")), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(",") for line in done.stdout.splitlines()]
    assert {family for family, *_ in lines} == {"int8 matmul", "int8 convolution", "packed matmul"}
    for family, itemsize, estimated, took in lines:
        assert int(took) <= int(estimated), (family, itemsize, estimated, took)
    # The estimate is no wild guess: some entry of every family takes what it says, or nearly so.
    for family in ("int8 matmul", "packed matmul"):
        shares = [int(took) / int(e) for f, _, e, took in lines if f == family]
        assert max(shares) >= 0.75
