"""Models whose weights are no plain parameters of plain layers."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.models.real_life.case import Case, images, lively, sequences, vectors, words


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.words(ids))))


class TiedByList(nn.Module):
    """Heads in a plain list, one of them the embedding's weight: torch does not see the list."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)
        head = nn.Linear(16, 20, bias=False)
        head.weight = self.words.weight
        self.heads = [head]

    def forward(self, ids: Tensor) -> Tensor:
        return self.heads[0](F.gelu(self.body(self.words(ids))))


class TiedAutoencoder(nn.Module):
    """One weight, in a convolution and in the transposed one that undoes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 3, 2, 2)
        self.decode.weight = self.encode.weight
        self.mid = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.mid(self.encode(x))))


def transposed() -> nn.Module:
    """Return linear layers as a checkpoint of another framework leaves them: [in, out]."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return model


def channels_last() -> nn.Module:
    """Return a model that its owner moved to channels-last memory."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    return model.to(memory_format=torch.channels_last)


class FunctionalWeight(nn.Module):
    """Uses layers by their weights alone (FSDP wrappers, fairseq, LoRA merges)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.one.weight, self.one.bias))
        return x @ self.two.weight.t() + self.two.bias


class Buffered(nn.Module):
    """A frozen layer's weight is a buffer, so that no optimizer finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        for name in ("weight", "bias"):
            value = getattr(self.frozen, name).detach().clone()
            delattr(self.frozen, name)
            self.frozen.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.frozen(x)))


def buffered_bias() -> nn.Module:
    """Return a network one layer of which keeps its bias as a buffer, and one has it pruned."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    bias = model[0].bias.detach().clone()
    del model[0].bias
    model[0].register_buffer("bias", bias)
    prune.l1_unstructured(model[2], "bias", amount=0.5)
    return model.append(nn.Linear(16, 5))


class RandomFeatures(nn.Module):
    """A matrix of random features, a buffer of the model itself (Performer, Fourier features)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", torch.randn(16, 32))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.directions
        return self.head(torch.cat([x.sin(), x.cos()], -1))


def pruned() -> nn.Module:
    """Return a pruned model whose masks were never made permanent."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def normed(function: object) -> nn.Module:
    """Return a network one layer of which has its weight from ``function``."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in every vocoder
        function(model[0])  # type: ignore[operator]
    return model


class Dynamic(nn.Module):
    """A part was quantized before, by torch.ao's dynamic quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.done = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.done = torch.ao.quantization.quantize_dynamic(self.done.eval(), {nn.Linear})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.done(x))


class Capped(nn.Module):
    """Embeddings that are renormalized when they are looked up, and a bag of them."""

    def __init__(self) -> None:
        super().__init__()
        self.capped = nn.Embedding(20, 16, max_norm=1.0)
        self.bag = nn.EmbeddingBag(20, 16)
        self.padded = nn.Embedding(20, 16, padding_idx=0)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.capped(ids).mean(1) + self.bag(ids) + self.padded(ids).sum(1)
        return self.head(x)


class Spectral(nn.Module):
    """A Fourier layer, whose weight is complex, and a filter whose output is."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(16, 16)
        self.modes = nn.Parameter(0.3 * torch.randn(5, dtype=torch.complex64))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x))
        low = torch.zeros_like(spectrum)
        low[:, :5] = spectrum[:, :5] * self.modes
        return self.head(torch.fft.irfft(low, 16))


class ComplexLinear(nn.Module):
    """A linear layer of complex numbers beside a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(16, 16, dtype=torch.complex64)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turn(x.to(torch.complex64)).abs())


def small(dtype: torch.dtype) -> nn.Module:
    """Return a small network whose numbers are of ``dtype``."""
    norm = lively(nn.BatchNorm2d(8))
    body = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    return body.to(dtype)


class MixedPrecision(nn.Module):
    """A bfloat16 body with a float32 head and norm, as they are served."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x.bfloat16()).float()))


class Standardized(nn.Conv2d):
    """timm's StdConv2d: the weight that it computes with is another one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Conditional(nn.Module):
    """CondConv: each sample mixes its own kernel of several (timm)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(0.3 * torch.randn(3, 8, 3, 3, 3))
        self.route, self.head = nn.Linear(3, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        share = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = torch.einsum("be,eoikl->boikl", share, self.kernels).reshape(-1, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b).reshape(b, 8, h - 2, w - 2)
        return self.head(F.relu(y).mean((2, 3)))


class LowRank(nn.Linear):
    """A linear layer that adds to what it inherits, as LoRA layers by inheritance do."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Empty(nn.Module):
    """Parts that hold nothing: layers of no width, empty containers, None for a layer."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # initializing nothing does nothing
            self.nothing = nn.Linear(16, 0)
        self.sequence, self.skip = nn.Sequential(), nn.Identity()
        self.register_module("maybe", None)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.sequence(self.skip(x)), self.nothing(x)], -1))


def weight_normed() -> nn.Module:
    """Return a network with torch's old weight_norm."""
    return normed(nn.utils.weight_norm)


def spectral_normed() -> nn.Module:
    """Return a network with torch's old spectral_norm."""
    return normed(nn.utils.spectral_norm)


def parametrized() -> nn.Module:
    """Return a network with torch's new weight_norm, a parametrization."""
    return normed(parametrizations.weight_norm)


CASES = (
    Case("tied_embedding", Tied, words, "two copies are quantized apart, or the tie is lost"),
    Case(
        "tied_by_list",
        TiedByList,
        words,
        "a tie that torch can't see is lost: a loaded model is off by 2 of full scale",
        floats={"words": "also held by heads[0].weight, which the model does not register"},
        quick=True,
    ),
    Case(
        "tied_autoencoder",
        TiedAutoencoder,
        images,
        "channels of a shared weight lie along another axis in each of its layers",
        floats={"encode": "which lays it out differently"},
    ),
    Case("transposed_weights", transposed, vectors, "a kernel takes strided memory for dense"),
    Case("channels_last_model", channels_last, images, "memory formats are lost or mixed"),
    Case("functional_weights", FunctionalWeight, vectors, "the layer is never called: no range"),
    Case(
        "weights_as_buffers",
        Buffered,
        vectors,
        "what is no parameter is neither quantized nor reported",
        floats={"frozen": "buffer"},
        quick=True,
    ),
    Case(
        "biases_as_buffers",
        buffered_bias,
        vectors,
        "KeyError: 'bias'",
        floats={"0.weight": "its bias is not a parameter", "2.weight": "prune.remove"},
        quick=True,
    ),
    Case(
        "random_features",
        RandomFeatures,
        vectors,
        "a matrix that is a buffer of the model itself is not reported",
        floats={"directions": "buffer"},
    ),
    Case(
        "prune_masks",
        pruned,
        vectors,
        "weight_orig is quantized, or the mask is lost",
        floats={"0": "prune.remove"},
        quick=True,
    ),
    Case(
        "old_weight_norm",
        weight_normed,
        vectors,
        "the hook writes over the quantized weight",
        floats={"0": "remove_weight_norm"},
        quick=True,
    ),
    Case(
        "old_spectral_norm",
        spectral_normed,
        vectors,
        "the hook writes over the quantized weight",
        floats={"0": "remove_spectral_norm"},
    ),
    Case(
        "parametrized_weight_norm",
        parametrized,
        vectors,
        "'ParametrizedLinear' can't be swapped",
        floats={"0": "parametriz"},
    ),
    Case(
        "quantized_before",
        Dynamic,
        vectors,
        "'method' object has no attribute 'dtype': weight() of a packed layer is a function",
        refused=r"done\.0: quantized already",
        quick=True,
    ),
    Case(
        "capped_embeddings",
        Capped,
        words,
        "max_norm writes into the quantized table",
        floats={"capped": "max_norm", "bag": "not a layer type"},
    ),
    Case(
        "complex_parameters",
        Spectral,
        vectors,
        "complex numbers are cast to real ones",
        floats={"modes": "of Spectral itself"},
        quick=True,
    ),
    Case(
        "complex_linear",
        ComplexLinear,
        vectors,
        "complex numbers are cast to real ones",
        floats={"turn": "complex"},
    ),
    Case(
        "half_model",
        lambda: small(torch.float16),
        lambda: [x.half() for x in images()],
        "scales overflow in half precision",
    ),
    Case(
        "bfloat16_model",
        lambda: small(torch.bfloat16),
        lambda: [x.bfloat16() for x in images()],
        "dtypes of weight and activation differ",
        quick=True,
    ),
    Case(
        "float64_model",
        lambda: small(torch.float64),
        lambda: [x.double() for x in images()],
        "expected m1 and m2 to have the same dtype",
    ),
    Case("mixed_precision", MixedPrecision, vectors, "one dtype is taken for that of all layers"),
    Case(
        "standardized_convolution",
        lambda: nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)),
        images,
        "the weight that is quantized is not the one that is multiplied",
        floats={"0": "forward of its own"},
    ),
    Case(
        "conditional_convolution",
        Conditional,
        images,
        "mixed kernels are not seen",
        floats={"kernels": "of Conditional itself"},
    ),
    Case(
        "low_rank_by_inheritance",
        lambda: nn.Sequential(LowRank(16), nn.ReLU(), nn.Linear(16, 5)),
        vectors,
        "a subclass is swapped for a plain layer, and what it adds is gone",
        floats={"0": "forward of its own"},
    ),
    Case("empty_parts", Empty, vectors, "max() of an empty tensor", floats={"nothing": "empty"}),
    Case(
        "sequence_features",
        lambda: nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
        sequences,
        "per-token scales over a wrong axis",
    ),
)
