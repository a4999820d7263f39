"""Models whose layers follow each other in another way from one batch to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.real_life.case import Case, images, lively, sequences, vectors


class DomainNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList(lively(nn.BatchNorm2d(8)) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.head(F.relu(self.norms[domain](self.conv(x))).mean((2, 3)))


class SwitchedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 5)
        self.relu, self.gelu = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor, kind: str) -> Tensor:
        x = self.one(x)
        x = self.relu(x) if kind == "relu" else self.gelu(x) if kind == "gelu" else x
        return self.two(x)


class RawForSome(nn.Module):
    """Returns what comes before the activation for some batches, as distillation code does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.relu = nn.ReLU()
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor, raw: bool) -> Tensor:
        y = self.stem(x)
        return y if raw else self.head(self.relu(y))


class Boxes(nn.Module):
    """A pre-activation block whose raw output is scored, beside boxes in pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = lively(nn.BatchNorm2d(8))
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        boxes = 640.0 * torch.sigmoid(self.boxes(F.relu(self.norm(raw))))
        return torch.cat([boxes, torch.sigmoid(self.scores(2.0 * raw))], 1)


class SharedTwice(nn.Module):
    """One layer, followed by a ReLU in one place and called past its hooks in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.head = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.fc(x)) + self.fc.forward(x))


class Hooked(nn.Module):
    """A hook of the user's changes what a layer gives, before its norm and its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), lively(nn.BatchNorm2d(8)), nn.ReLU()
        self.fc, self.gate, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        self.conv.register_forward_hook(lambda module, args, output: output * 1.5 - 0.2)
        self.fc.register_forward_hook(lambda module, args, output: output - 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.gate(self.fc(x)))


class Watched(nn.Module):
    """Keeps a layer's raw output by a hook, as Grad-CAM and feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.head = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        self.seen: list[Tensor] = []
        self.fc.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.clear()
        y = self.head(self.relu(self.fc(x)))
        return y, self.seen.pop()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)
        )
        with torch.no_grad():
            self.router.weight.zero_()
            self.router.weight[:, 0] = torch.tensor([0.0, 1.0, 5.0])
            self.router.weight[2, 0] = 5.0

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = torch.zeros_like(x), self.router(x).argmax(1)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero()[:, 0]
            y = y.index_add(0, mine, expert(x[mine]))
        return y + x


def routed(low: float, high: float) -> list[Tensor]:
    """Return batches whose first feature, by which experts are chosen, lies in a range."""
    drawn = vectors()
    for x in drawn:
        x[:, 0].uniform_(low, high)
    return drawn


class LaterLayer(nn.Module):
    """Only long inputs reach the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.short(x))
        if x.shape[1] > 6:
            x = F.relu(self.long(x))
        return self.head(x.mean(1))


def growing() -> list[Tensor]:
    """Return batches of sequences, short ones first."""
    return [torch.randn(12, length, 16) for length in (4, 5, 7, 9)]


class SharedDepth(nn.Module):
    """One block, run again and again, until the data say enough (ALBERT, LayerDrop, ACT)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        depth = 1 + int(x[0].abs().sum() > 12.0)
        for _ in range(depth):
            x = F.layer_norm(x + self.block(x), (16,))
        return self.head(x)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), lively(nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 8)

    def embed(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.embed(a) - self.embed(b)).abs()


class InPlace(nn.Module):
    """Adds in place to what a layer gave, then uses both (timm, torchvision residual blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.relu = lively(nn.BatchNorm2d(8)), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        y = self.norm(self.two(x))
        y += x
        return self.head(self.relu(y).flatten(2).mean(2))


class Views(nn.Module):
    """Takes a view that only contiguous memory allows (YOLO heads, pixel shuffles)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.conv(x).view(b, 3, 4, h, w)[:, :, 0]
        return self.shuffle(self.up(y)).view(b, -1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), lively(nn.BatchNorm2d(8)), nn.SiLU())
        self.mid = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.out = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.up(self.mid(self.down(x))), x], 1))


class RepVGG(nn.Module):
    """Three branches with a norm each, one of which has no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(lively(nn.BatchNorm2d(3)) for _ in range(3))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.three(x)) + self.norms[1](self.one(x)) + self.norms[2](x)
        return self.head(F.relu(y).mean((2, 3)))


class FrozenNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d: all four of its tensors are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.3), ("bias", 0.2), ("mean", 0.1), ("var", 0.8)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias - self.mean * scale.flatten()).reshape(1, -1, 1, 1)


class Detector(nn.Module):
    """A backbone with frozen norms and a pyramid: a list of maps, of another size each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = FrozenNorm(8)
        self.lateral = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = F.relu(self.norm(self.one(x)))
        two = F.relu(self.two(one))
        top = self.lateral[1](two)
        low = self.lateral[0](one) + F.interpolate(top, scale_factor=2.0)
        return {"logits": low.mean((2, 3)), "low": low, "top": top}


class NoStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
        self.instance, self.head = nn.InstanceNorm2d(8, affine=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.instance(self.norm(self.conv(x)))).amax((2, 3)))


class OneNormTwice(nn.Module):
    """One norm behind two convolutions, as shared detection heads have it (RetinaNet, FCOS)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1)
        self.norm, self.head = lively(nn.BatchNorm2d(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.norm(self.one(x)), self.norm(self.two(x))
        return self.head(F.relu(one).mean((2, 3)) + F.relu(two).mean((2, 3)))


CASES = (
    Case(
        "domain_norms",
        DomainNorms,
        lambda: images(0, 1),
        "folding takes the norm of the first batch for the norm of all",
        quick=True,
        saved="archive",
    ),
    Case(
        "activation_by_argument",
        SwitchedActivation,
        lambda: vectors("relu", "gelu", "none"),
        "fusing takes the activation of the traced call for that of all",
        saved="archive",
    ),
    Case(
        "raw_output_for_some",
        RawForSome,
        lambda: vectors(False, True),
        "a fused ReLU is in an output that was to be raw",
        saved="archive",
    ),
    Case(
        "boxes_in_pixels",
        Boxes,
        images,
        "a fold that moves small scores hides beside coordinates in pixels",
        column=1,
        quick=True,
    ),
    Case(
        "shared_in_two_places",
        SharedTwice,
        vectors,
        "a ReLU that follows in one place is put in both",
        quick=True,
    ),
    Case("hooks_that_change_outputs", Hooked, images, "hooks are lost when layers are swapped"),
    Case(
        "raw_output_by_hook",
        Watched,
        vectors,
        "a hook sees the clamped output of a fused layer, or is gone",
    ),
    Case(
        "unreached_expert",
        Experts,
        lambda: routed(-1.0, 1.0),
        "an expert that no calibration sample reaches has no range: an exception, or NaN",
        calibration=lambda: routed(0.5, 1.0),
        floats={"experts.0.0": "reached by no sample of the calibration data"},
        layers=("experts.2.0",),
        quick=True,
    ),
    Case(
        "layer_of_later_batches",
        LaterLayer,
        growing,
        "observers that saw one batch know nothing of a layer that it did not use",
        layers=("long",),
        quick=True,
        saved="archive",
    ),
    Case(
        "shared_depth",
        SharedDepth,
        vectors,
        "tracing unrolls the loop that the first batch took",
        saved="archive",
    ),
    Case(
        "siamese",
        Siamese,
        lambda: [(x, x.flip(0) + 0.1) for x in images()],
        "graph tools observe two calls of one layer as two layers",
    ),
    Case("in_place_residual", InPlace, images, "fusing breaks in-place adds"),
    Case("views_of_contiguous", Views, images, "channels-last layers break view()"),
    Case("unet", UNet, images, "transposed convolutions are skipped or quantized per wrong axis"),
    Case("repvgg", RepVGG, images, "a norm without a layer before it is folded into another"),
    Case("frozen_norms_and_pyramid", Detector, images, "buffers are lost; outputs are a dict"),
    Case("norms_without_statistics", NoStatistics, images, "None has no attribute 'sqrt'"),
    Case("one_norm_behind_two", OneNormTwice, images, "the norm is folded away behind one of two"),
    Case(
        "sequence_mean",
        lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(96, 3)),
        sequences,
        "a norm over another axis than the layer's channels is folded",
    ),
)
