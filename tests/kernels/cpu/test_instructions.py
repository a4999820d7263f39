"""What oneDNN may use is asked of oneDNN; where it isn't for the processor, the reference is."""

import platform

import pytest
import torch

from autoquant.kernels.cpu import instructions, onednn
from autoquant.kernels.engine import make_engine
from autoquant.kernels.operation import LINEAR
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import quantized

CPU = torch.device("cpu")


@pytest.fixture
def asked_anew():
    for function in (instructions.has_vnni, instructions.has_amx):
        function.cache_clear()
    yield
    for function in (instructions.has_vnni, instructions.has_amx):
        function.cache_clear()


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", "ppc64le", ""])
def test_on_other_processors_the_reference_stands_in(monkeypatch, asked_anew, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert "x86" in onednn.missing(CPU)
    assert not instructions.has_vnni()
    engine = make_engine(CPU)
    assert not engine.fast
    assert f"x86 processors, not {machine}" in engine.notes[0]
    weight = quantized(torch.randn(4, 8), WeightScheme(8))
    assert engine.prepare(LINEAR, weight, ActivationScheme(8, scale=0.1, zero_point=0), CPU) is None


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_x86_goes_by_many_names(monkeypatch, machine):
    here = onednn.missing(CPU)
    if platform.machine().lower() in instructions.X86:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        assert onednn.missing(CPU) == here
    assert "for a CPU, not cuda" in onednn.missing(torch.device("cuda"))


def test_a_torch_without_onednn_is_said(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert make_engine(CPU).notes == (
        "this torch was built without oneDNN: candidates are computed in float, which is slower",
    )


@pytest.mark.parametrize(
    ("cap", "amx"),
    [(None, True), ("DEFAULT", True), ("AVX512_CORE_AMX", True), ("NONSENSE", True), ("", True)]
    + [(cap, False) for cap in (*sorted(instructions.BELOW_AMX), "avx2")],
)
@pytest.mark.parametrize("tiles", [True, False])
def test_amx_is_reckoned_with_unless_it_is_surely_not_used(
    monkeypatch, asked_anew, cap, amx, tiles
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        if cap is not None:
            monkeypatch.setenv(name, cap)
        instructions.has_amx.cache_clear()
        assert instructions.has_amx() == (amx and tiles)
