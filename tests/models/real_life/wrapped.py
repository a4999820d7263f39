"""Models that come wrapped, scripted, unfinished, or with things that can't be copied."""

from __future__ import annotations

import tempfile
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.real_life.case import Case, images, vectors


def plain() -> nn.Sequential:
    """Return a small network."""
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


class Lazy(nn.Module):
    """A head that learns its width from its first input, which it has not seen yet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


class Meta(nn.Module):
    """Built under torch.device("meta"), and its weights never loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


class Tokenizer:
    """A helper that guards itself by a lock, as clients, queues and caches do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(16, 5)])
        self.body[0].helper = {"tokenizer": Tokenizer()}

    def forward(self, x: Tensor) -> Tensor:
        with self.body[0].helper["tokenizer"].lock:
            return self.body[0](x)


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)
        self.log = tempfile.TemporaryFile("w")  # noqa: SIM115

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def vocoder() -> nn.Module:
    """Return a network every layer of which has torch's old weight_norm (HiFi-GAN, WaveGlow)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layers = [nn.utils.weight_norm(nn.Conv1d(1, 4, 3)), nn.ReLU()]
        layers += [nn.utils.weight_norm(nn.ConvTranspose1d(4, 1, 3)), nn.Tanh()]
    return nn.Sequential(nn.Unflatten(1, (1, 16)), *layers)


def scripted() -> nn.Module:
    """Return a scripted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(plain().eval())


def half_scripted() -> nn.Module:
    """Return a model a part of which is scripted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(plain().eval()), nn.Linear(5, 3))


def compiled() -> nn.Module:
    """Return a compiled model: a wrapper around the model itself."""
    # Not by inductor, whose code for AVX2 may be wrong at some batch sizes (torch 2.13).
    return torch.compile(plain(), backend="eager")


def compiled_inside() -> nn.Module:
    """Return a model with a compiled part, and one that was compiled in place."""
    first, last = plain(), nn.Linear(5, 3)
    last.compile(backend="eager")
    return nn.Sequential(torch.compile(first, backend="eager"), nn.ReLU(), last)


class Sizes(nn.Module):
    """Nothing that a layer type holds: everything stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


CASES = (
    Case("single_layer", lambda: nn.Linear(16, 5), vectors, "a layer without a parent is skipped"),
    Case(
        "lazy_parameters",
        Lazy,
        vectors,
        "can't access the shape of an uninitialized parameter",
        refused=r"head\.weight.*(lazy|not initialized)",
        quick=True,
    ),
    Case(
        "meta_parameters",
        Meta,
        vectors,
        "Cannot copy out of meta tensor; no data!",
        refused=r"head\.weight.*meta",
        quick=True,
    ),
    Case(
        "lock_as_attribute",
        Locked,
        vectors,
        "cannot pickle '_thread.lock' object",
        refused=r"body\.0\.helper\['tokenizer'\]\.lock.*can't be copied",
        quick=True,
    ),
    Case(
        "open_file_as_attribute",
        Logging,
        vectors,
        "cannot pickle '_io.TextIOWrapper' object",
        refused=r"log.*can't be copied",
    ),
    Case(
        "scripted",
        scripted,
        vectors,
        "a scripted module has no layers",
        refused="TorchScript",
        quick=True,
    ),
    Case(
        "partly_scripted",
        half_scripted,
        vectors,
        "the class of a scripted layer can't be swapped",
        floats={"0": "TorchScript"},
        saved="archive",
    ),
    Case(
        "compiled",
        compiled,
        vectors,
        "names with _orig_mod; the compiled float code runs on",
        quick=True,
    ),
    Case("compiled_parts", compiled_inside, vectors, "the compiled float code runs on"),
    Case(
        "data_parallel",
        lambda: nn.DataParallel(plain()),
        vectors,
        "names with module.; replicas share what was swapped",
        refused=r"DataParallel.*\.module",
    ),
    Case(
        "vocoder",
        vocoder,
        vectors,
        "weight_g and weight_v are quantized, or the hook undoes it",
        refused=r"nothing to quantize.*remove_weight_norm",
    ),
    Case("nothing_to_quantize", Sizes, vectors, "an empty recipe", refused="nothing to quantize"),
    Case(
        "all_in_one_list",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)),
        images,
        "a sequence without activations",
    ),
)
