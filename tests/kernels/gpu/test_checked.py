"""The kernels are checked on a model's own layers before a search, what they hand on as well."""

import pytest
import torch
from torch import nn

from autoquant.errors import UserError
from autoquant.kernels.gpu.conv import ConvProduct
from autoquant.kernels.gpu.linear import LinearProduct
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session.kernel_check import check_kernels
from autoquant.session.session import open_session
from autoquant.spec.space import SearchSpace

SPACE = "autoquant_space: 1\nrules: [{weight_bits: [8], activation_bits: [7]}]\n"


@pytest.fixture
def check(backend, device):
    """Return a function that checks the kernels on a small model."""

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 4, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(16, 16)),
            *(nn.GELU(), nn.Linear(16, 5)),
        )
        data = [(torch.randn(2, 4, 5, 5), torch.randint(0, 5, (2,))) for _ in range(3)]
        task = Task(evaluation_data=lambda: data, metric="accuracy")
        loaded = LoadedModel(model.eval(), "module", "m", "0" * 64)
        session = open_session(loaded, task, device)
        session.prepared.engine.backends = (backend,)
        session.baseline("search")
        check_kernels(session, SearchSpace.parse(SPACE, "one").resolve(session.prepared.sites))

    return run


def test_kernels_that_are_right_pass(check, monkeypatch):
    handed = []
    for kind in (ConvProduct, LinearProduct):
        own = kind.handed
        monkeypatch.setattr(
            kind, "handed", lambda *words, own=own: handed.append(own(*words)) or handed[-1]
        )
    check()
    assert [q.dim() for q in handed] == [4, 2]  # the convolution to the next, linear to linear


@pytest.mark.parametrize("kind", [ConvProduct, LinearProduct])
def test_integers_that_are_wrong_are_found(check, monkeypatch, kind):
    own = kind.handed
    monkeypatch.setattr(kind, "handed", lambda *words: own(*words).add_(2))
    with pytest.raises(UserError, match="of the integers that it hands to"):
        check()


@pytest.mark.parametrize("kind", [ConvProduct, LinearProduct])
def test_real_numbers_that_are_wrong_are_found(check, monkeypatch, kind):
    own = kind._chained
    monkeypatch.setattr(
        kind, "_chained", lambda self, q, bias, end, *last: own(self, q, bias, end, *last).add_(1)
    )
    with pytest.raises(UserError, match=r"differ on this machine, by .* is right"):
        check()
