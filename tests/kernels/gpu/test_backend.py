import subprocess
import sys

import pytest
import torch

from autoquant.kernels.gpu import BACKEND, TritonBackend

CPU = torch.device("cpu")


def test_a_cpu_is_for_tests_only(monkeypatch):
    assert "CUDA" in BACKEND.missing(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "CUDA" in BACKEND.missing(CPU)
    assert TritonBackend(interpret=True).missing(CPU) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" in TritonBackend(interpret=True).missing(CPU)


def test_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton is not installed" in BACKEND.missing(torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "missing"), [((7, 5), "7.5"), ((8, 0), None), ((12, 0), None)]
)
def test_capability(monkeypatch, capability, missing):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    says = BACKEND.missing(torch.device("cuda"))
    assert says is None if missing is None else missing in says


def test_what_runs_interpreted_is_not_for_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "TRITON_INTERPRET" in BACKEND.missing(torch.device("cuda"))


def test_importing_and_asking_imports_no_triton():
    program = (
        "import sys, torch; from autoquant.kernels.gpu import BACKEND;"
        "BACKEND.missing(torch.device('cpu'));"
        "assert 'triton' not in sys.modules;"
        "assert not [m for m in sys.modules if m.startswith('autoquant.kernels.gpu.device')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
