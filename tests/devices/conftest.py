"""A GPU for every test: one that is simulated and, where there is one, a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.devices.simulated import SimulatedGPU

REAL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


@pytest.fixture(autouse=True)
def _folder(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(params=["simulated", REAL])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return which GPU ``cuda`` is; a simulated one fails the test where devices were mixed."""
    if request.param == "cuda":
        yield "cuda"
        return
    with SimulatedGPU():
        yield "simulated"
