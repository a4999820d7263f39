"""Every instruction set that oneDNN or torch can keep to gives the reference's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoquant.kernels.cpu import onednn
from autoquant.kernels.cpu.instructions import has_amx, has_vnni

ROOT = Path(__file__).parents[3]
WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
WITH_VNNI = ("AVX2_VNNI", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX10_1_512")

pytestmark = pytest.mark.skipif(
    onednn.missing(torch.device("cpu")) is not None, reason="no oneDNN here"
)


def run(tmp_path, **settings):
    """Run ``levels`` in a process, with nothing known of this machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ONEDNN_", "DNNL_"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "2", **settings}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.kernels.cpu.levels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["taken"] >= 50
    return found


@pytest.mark.parametrize("level", WITHOUT_VNNI)
def test_without_vnni_products_of_two_8_bit_operands_are_computed_in_16_bits(tmp_path, level):
    found = run(tmp_path, ONEDNN_MAX_CPU_ISA=level)
    assert not found["vnni"]
    assert not found["amx"]
    assert (found["eight_by_eight"] > 0) == found["int16"]
    assert (found["in_16_bits"] > 0) == found["int16"]
    assert found["plain_refused"] == []


def test_without_vnni_and_avx2_they_are_refused(tmp_path):
    found = run(tmp_path, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="default")
    assert not found["int16"]
    assert found["eight_by_eight"] == found["in_16_bits"] == 0


@pytest.mark.parametrize("level", WITH_VNNI)
def test_with_vnni_and_without_amx_common_layers_are_taken(tmp_path, level):
    """A processor that lacks the level keeps to the next one below that it has."""
    found = run(tmp_path, ONEDNN_MAX_CPU_ISA=level)
    assert not found["amx"]
    assert (found["eight_by_eight"] > 0) == (found["vnni"] or found["int16"])
    assert found["vnni"] or found["in_16_bits"] or not found["int16"]
    assert found["plain_refused"] == []
    if level == "AVX10_1_512":
        assert found["vnni"] == torch.cpu._is_vnni_supported()


def test_what_this_processor_has_is_used(tmp_path):
    found = run(tmp_path)
    if not {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & set(os.environ):
        assert (found["vnni"], found["amx"]) == (has_vnni(), has_amx())
    assert found["vnni"] == (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    # With AMX, a few shapes are wrong.
    assert len(found["plain_refused"]) <= (8 if found["amx"] else 0)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_vectorization_of_torch_gives_the_same(tmp_path, capability):
    run(tmp_path, ATEN_CPU_CAPABILITY=capability)
