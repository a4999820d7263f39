"""Small models of every kind of layer, and sessions to train them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

W3A8 = SiteRecipe(WeightScheme(3), ActivationScheme(8))
W2A4 = SiteRecipe(WeightScheme(2), ActivationScheme(4))
ZEROS_IN_GROUPS = SiteRecipe(
    WeightScheme(3, "per_group_8", "asymmetric"), ActivationScheme(8, "per_token")
)


class Mlp(nn.Sequential):
    """Three linear layers, the last without a bias."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4, bias=False)
        )


class Images(nn.Module):
    """Convolutions with a BatchNorm, depthwise, beside a residual, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x.reshape(-1, 1, 4, 4))).relu()
        x = x + self.depthwise(x).relu()
        return self.head(self.up(x).mean((2, 3)))


class Sequence(nn.Module):
    """An embedding, a GRU, attention, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 5).long().clamp(max=15)
        states, _ = self.gru(self.embedding(ids))
        mixed, _ = self.attention(states, states, states, need_weights=False)
        return self.head(self.two(self.one(mixed).relu()).mean(1))


KINDS: dict[str, type[nn.Module]] = {"mlp": Mlp, "images": Images, "sequence": Sequence}


def model_of(kind: str) -> nn.Module:
    """Return a model of a kind, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        return model.eval()


def inputs(samples: int = 600, seed: int = 0) -> Tensor:
    """Return samples whose numbers go together: what one layer gets wrong another can mend."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, generator=draw) @ torch.randn(4, 16, generator=draw)


def task_of(model: nn.Module, **words: Any) -> Task:
    """Return the task to answer as the model does."""
    x = inputs()
    with torch.no_grad():
        y = model(x).argmax(1)
    pairs = list(zip(x.split(50), y.split(50), strict=True))
    given = {
        "calibration_data": lambda: [a for a, _ in pairs[:4]],
        "evaluation_data": lambda: pairs[4:],
        "metric": "accuracy",
    }
    return Task(**(given | words))


def opened(kind: str = "mlp", model: nn.Module | None = None, **words: Any) -> Session:
    """Return a session of a model of a kind, or of ``model``."""
    model = model_of(kind) if model is None else model
    words.setdefault("task", task_of(model))
    loaded = LoadedModel(model, "module", "m", "0" * 64)
    return open_session(loaded, words.pop("task"), torch.device("cpu"), **words)


def everywhere(session: Session, recipe: SiteRecipe = W3A8) -> dict[str, SiteRecipe]:
    """Return the same recipe for all sites."""
    return dict.fromkeys(session.prepared.slots, recipe)
