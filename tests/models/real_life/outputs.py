"""Models that return something else than one tensor of finite numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.models.real_life.case import Case, images, sequences, vectors, words


class Masked(nn.Module):
    """Actions that are not allowed have a score of −∞."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(F.relu(self.body(x)))
        allowed = torch.arange(6) <= 2 + (x[:, :1] > 0).long() * 3
        return scores.masked_fill(~allowed, float("-inf"))


class Pose(NamedTuple):
    rotation: Tensor
    translation: Tensor


class Poses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.turn, self.move = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Pose:
        x = F.relu(self.body(x))
        return Pose(F.normalize(self.turn(x), dim=-1), self.move(x))


@dataclass
class Found:
    classes: Tensor
    boxes: Tensor
    aux: dict[str, Tensor] | None = None


class Finds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.boxes = nn.Linear(16, 16), nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Found:
        x = F.relu(self.body(x))
        return Found(self.classes(x), self.boxes(x).sigmoid(), {"features": x})


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.near, self.far = nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.body(x))
        return {"depth": {"near": self.near(x), "far": self.far(x)}, "features": [x, None]}


class Cache:
    """Keys and values of past tokens, an object that torch's pytree does not know."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return key, value


@dataclass
class Decoded:
    logits: Tensor
    past_key_values: Cache


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor) -> Decoded:
        cache, x = Cache(), self.words(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = cache.update(k, v)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return Decoded(self.head(x), cache)


class Detections(nn.Module):
    """A list with one table a sample, each of as many rows as were found (torchvision)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score, self.box = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        hidden = F.relu(self.body(x))
        scores, boxes = self.score(hidden)[..., 0], self.box(hidden)
        return [
            {"scores": s[k], "boxes": b[k]}
            for s, b, k in zip(scores, boxes, x[..., 0] > 0, strict=True)
        ]


def total(outputs: list[dict[str, Tensor]], targets: Any) -> float:
    """Return a number that depends on all detections, as a user's own metric does."""
    return float(sum(float(row["scores"].sum() + row["boxes"].sum()) for row in outputs))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 16, batch_first=True, bidirectional=True), nn.Linear(32, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=6)
        return self.head(out)


class Pyramid(nn.Module):
    """A tuple of maps, one of them None."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        one = F.relu(self.one(x))
        return one, None, self.two(one)


class Graph(nn.Module):
    """Message passing over edges: gather, add by index (PyG's GINConv, as one file)."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        count = torch.arange(len(x))[:, None] * x.shape[1]
        source, target = (edges.movedim(-1, 0) + count).reshape(2, -1)
        gathered = torch.zeros_like(flat).index_add(0, target, F.relu(self.message(flat))[source])
        return self.update(flat + gathered).reshape(*x.shape[:2], 5)


def graphs() -> list[tuple[Tensor, Tensor]]:
    """Return batches of twelve graphs of six nodes and nine edges."""
    return [(x, torch.randint(6, (12, 9, 2))) for x in sequences()]


class SparseGraph(nn.Module):
    """A sparse adjacency matrix, kept as a buffer (recommender graphs)."""

    def __init__(self) -> None:
        super().__init__()
        dense = (torch.rand(16, 16) < 0.2).float()
        self.register_buffer("adjacency", dense.to_sparse())
        self.lift, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(self.adjacency, F.relu(self.lift(x)).t()).t())


class Greedy(nn.Module):
    """Returns decisions, not scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids)).argmax(-1)


CASES = (
    Case("masked_scores", Masked, vectors, "−∞ − −∞ is NaN", quick=True),
    Case(
        "named_tuple",
        Poses,
        vectors,
        "a named tuple is rebuilt as a tuple",
        saved="archive",
    ),
    Case(
        "dataclass",
        Finds,
        vectors,
        "'Found' object is not iterable",
        saved="archive",
        quick=True,
    ),
    Case("nested_dictionary", Nested, vectors, "only the first level is compared"),
    Case(
        "decoder_with_cache",
        Decoder,
        words,
        "the cache is compared by identity",
        saved="archive",
    ),
    Case(
        "detections",
        Detections,
        sequences,
        "lists of dicts can't be compared",
        metric=total,
        saved="archive",
    ),
    Case(
        "packed_sequences",
        Packed,
        lambda: [(x, torch.randint(1, 7, (12,))) for x in sequences()],
        "a PackedSequence is no tensor",
        saved="archive",
    ),
    Case("maps_and_none", Pyramid, images, "None has no shape"),
    Case("message_passing", Graph, graphs, "integer inputs are quantized", saved="archive"),
    Case("sparse_buffer", SparseGraph, vectors, "sparse tensors have no strides", saved="archive"),
    Case("decisions", Greedy, words, "integers have no noise", refused="no floating-point tensors"),
)
