"""Inputs are copied to a device once, unless somebody writes into them."""

import torch

from autoquant.measure import staging
from autoquant.measure.staging import Staging
from tests.devices.simulated import SimulatedGPU, device_of


def copies(monkeypatch):
    made = []
    before = staging.to_device
    monkeypatch.setattr(staging, "to_device", lambda *a: made.append(a[0]) or before(*a))
    return made


def test_a_batch_is_copied_once(monkeypatch):
    made = copies(monkeypatch)
    batch = (torch.ones(3), {"a": [torch.zeros(2), "text"]})
    with SimulatedGPU():
        staged = Staging(torch.device("cuda"))
        for _ in range(3):
            found = staged.of(batch)
            assert device_of(found[0]) == device_of(found[1]["a"][0]) == torch.device("cuda", 0)
        assert staged.bytes == 20
    assert len(made) == 1


def test_what_is_written_into_is_copied_every_time(monkeypatch):
    made = copies(monkeypatch)
    batch, other = torch.ones(3), torch.ones(2)
    with SimulatedGPU():
        staged = Staging(torch.device("cuda"))
        for _ in range(3):
            found = staged.of(batch)
            assert torch.equal(found.cpu(), torch.ones(3))
            found.add_(1)
            staged.of(other)
        assert staged.bytes == 8
        other.mul_(2)  # the batch itself was written into
        assert torch.equal(staged.of(other).cpu(), torch.full((2,), 2.0))
    assert len(made) == 5


def test_what_does_not_fit_is_not_kept(monkeypatch):
    monkeypatch.setattr(staging, "MOST_BYTES", 16)
    with SimulatedGPU():
        staged = Staging(torch.device("cuda"))
        batches = [torch.ones(3), torch.ones(1), torch.ones(2)]
        for batch in batches:
            staged.of(batch)
        assert staged.bytes == 16
        staged.clear()
        for batch in batches:
            staged.of(batch)
        assert staged.bytes == 0


def test_on_a_cpu_nothing_is_copied():
    batch = torch.ones(3)
    assert Staging(torch.device("cpu")).of(batch) is batch
