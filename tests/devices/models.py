"""A small model of each kind, with a task: what devices can be mixed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import autoquant

SAMPLES = 72
BATCH = 24


class Convolutional(nn.Module):
    """Convolutions, one of them depthwise and one transposed, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.ConvTranspose2d(8, 4, 2, 2),
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Transformer(nn.Module):
    """Embeddings, an encoder layer of torch's and attention of its own, with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1, enable_nested_tensor=False
        )
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        x = self.encoder(self.words(ids), src_key_padding_mask=padding)
        x, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.head(x[:, 0])


class Recurrent(nn.Module):
    """An LSTM and a GRU over embeddings, and a cell in a loop of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.gru(self.lstm(self.words(ids))[0])
        h = x.new_zeros(x.shape[0], 6)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Decoder(nn.Module):
    """Decodes greedily from packed sequences: what it returns are tokens, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.encoder = nn.GRU(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1).cpu()
        packed = pack_padded_sequence(self.words(ids), lengths, True, enforce_sorted=False)
        h = self.encoder(packed)[1][0]
        token = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        found = []
        for _ in range(4):
            h = self.cell(self.words(token), h)
            token = self.head(h).argmax(-1)
            found.append(token)
        return torch.stack(found, 1)


def plain() -> nn.Module:
    """Return linear layers, for numbers."""
    return nn.Sequential(
        nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )


@dataclass(frozen=True)
class Kind:
    """A model, its inputs, its metric, and what becomes of it: no program packs sequences."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    metric: str | None
    written: str = "pt2"


def _ids(draw: torch.Generator) -> Tensor:
    ids = torch.randint(1, 12, (SAMPLES, 6), generator=draw)
    ids[::3, 4:] = 0
    return ids


KINDS = {
    "convolutional": Kind(
        Convolutional, lambda draw: torch.randn(SAMPLES, 2, 6, 6, generator=draw), "accuracy"
    ),
    "transformer": Kind(Transformer, _ids, "accuracy"),
    "recurrent": Kind(Recurrent, _ids, "accuracy"),
    "decoder": Kind(Decoder, _ids, "token_error_rate", "archive"),
    "plain": Kind(plain, lambda draw: torch.randn(SAMPLES, 10, generator=draw), None),
}


@dataclass(frozen=True)
class Case:
    """A float model on the CPU, its task, and one batch of its inputs."""

    model: nn.Module
    task: autoquant.Task
    example: Tensor
    written: str


def _targets(outputs: Tensor) -> Any:
    return outputs.argmax(1) if outputs.is_floating_point() else outputs.tolist()


def make(name: str) -> Case:
    """Return a model with random weights, and a task whose targets are what it says itself."""
    kind = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
                module.running_mean.normal_()  # type: ignore[operator, union-attr]
    batches = kind.inputs(torch.Generator().manual_seed(1)).split(BATCH)
    pairs: list[Any] = list(batches)
    if kind.metric is not None:
        with torch.no_grad():
            pairs = [(x, _targets(model(x))) for x in batches]
    calibrate = list(kind.inputs(torch.Generator().manual_seed(2)).split(BATCH))[:1]
    task = autoquant.Task(
        calibration_data=lambda: calibrate, evaluation_data=lambda: pairs, metric=kind.metric
    )
    return Case(model, task, batches[0], kind.written)
