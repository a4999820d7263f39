"""What is recorded as a CUDA graph, and what is refused."""

import pytest
import torch

from autoquant.kernels.gpu.graphs import CudaRecorder
from autoquant.kernels.recording import CannotRecord

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def recorder():
    return CudaRecorder(torch.device("cuda"))


def test_a_replay_computes_on_what_lies_there_by_now(recorder):
    weight, x = torch.randn(16, 16, device="cuda"), torch.randn(4, 16, device="cuda")
    calls = []

    def work():
        calls.append(1)
        return [(x @ weight).relu()]

    work()
    recorded = recorder.record(work)
    made = len(calls)
    for _ in range(3):
        x.normal_()
        weight.normal_()
        recorded.replay()
        torch.testing.assert_close(recorded.outputs[0], (x @ weight).relu())
    assert len(calls) == made


def test_graphs_share_memory_one_after_the_other(recorder):
    x = torch.randn(1 << 20, device="cuda")
    works = [lambda n=n: [(x * n).exp().sum(0, keepdim=True)] for n in (1, 2, 3)]
    recorded = []
    for work in works:
        work()
        recorded.append(recorder.record(work))
    for _ in range(2):
        for work, made in zip(works, recorded, strict=True):
            made.replay()
            torch.testing.assert_close(made.outputs[0].clone(), work()[0])


@pytest.mark.parametrize(
    "work",
    [
        lambda x: [x * float(x.sum())],
        lambda x: [x.cpu()],
        lambda x: [x[x > 0]],
        lambda x: [x + torch.ones(8).cuda()],
    ],
)
def test_what_waits_for_the_host_is_refused_and_the_device_goes_on(recorder, work):
    x = torch.rand(8, device="cuda")
    with pytest.raises(CannotRecord) as refused:
        recorder.record(lambda: work(x))
    assert "\n" not in str(refused.value)
    assert "previous error" not in str(refused.value)
    torch.testing.assert_close(work(x)[0], work(x)[0])
    good = recorder.record(lambda: [x * 2])
    good.replay()
    torch.testing.assert_close(good.outputs[0], x * 2)
