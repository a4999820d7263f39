"""Models of published shapes with random weights, for benchmarks that need no network and no data.

BERT-base (Devlin et al. 2019, arXiv 1810.04805), ResNet-50 (He et al. 2016, arXiv 1512.03385, with
the stride in the 3 × 3 convolution) and MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381). Each
also comes small, so that a CPU runs what a GPU is timed with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.conftest import task_module

WORDS = 30522
POSITIONS = 512


class SelfAttention(nn.Module):
    """Attention of a sequence [batch, tokens, width] to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output(y.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """One layer of an encoder, normalized after each half."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.outer(F.gelu(self.inner(x))))


class Encoder(nn.Module):
    """Token ids [batch, tokens] to states [batch, tokens, width]: BERT, of base size by default."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.positions = nn.Embedding(POSITIONS, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.layers(self.norm(self.words(ids) + self.positions(places)))


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Images [batch, 3, height, width] to scores of classes: ResNet-50 by default."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            inner = width << stage
            for i in range(count):
                stages.append(Bottleneck(inputs, inner, 2 if stage and not i else 1))
                inputs = 4 * inner
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.head(self.stages(x).mean((2, 3)))


class HuggingFaceBert(nn.Module):
    """BERT as transformers has it: token ids to the last hidden state."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            attn_implementation="sdpa",
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state


def mobilenet() -> nn.Module:
    """Return MobileNetV2 as the zoo has it."""
    model: nn.Module = task_module("mobilenet_v2").MobileNetV2()
    return model


def tokens(batch: int, length: int) -> Tensor:
    """Return ids of random words [batch, length]."""
    return torch.randint(1000, 20_000, (batch, length))


def images(batch: int, size: int) -> Tensor:
    """Return random images [batch, 3, size, size], channels last."""
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Sized:
    """A model and its inputs, whole and small; ``thin`` is as deep as the whole."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    thin: Callable[[], nn.Module]
    inputs: Callable[..., Tensor]
    sizes: tuple[int, int]
    small_sizes: tuple[int, int]
    target: float
    """Milliseconds that one candidate's forward on an H200 is to stay below."""

    def made(self, *, small: bool = False, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """Return the model, as a training step leaves its norms, and one batch."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = (self.small if small else self.build)()
            x = self.inputs(*(self.small_sizes if small else self.sizes))
            if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                with torch.no_grad():
                    model.train()(x[:4])
        return model.eval(), x


MODELS = {
    case.name: case
    for case in (
        Sized(
            name="encoder",
            title="BERT-base, 32 × 128 tokens",
            build=Encoder,
            small=lambda: Encoder(2, 32, 2),
            thin=lambda: Encoder(width=32, heads=2),
            inputs=tokens,
            sizes=(32, 128),
            small_sizes=(2, 8),
            target=2.0,
        ),
        Sized(
            name="bert",
            title="BERT-base of transformers, 32 × 128 tokens",
            build=HuggingFaceBert,
            small=lambda: HuggingFaceBert(2, 32, 2),
            thin=lambda: HuggingFaceBert(width=32, heads=2),
            inputs=tokens,
            sizes=(32, 128),
            small_sizes=(2, 8),
            target=2.0,
        ),
        Sized(
            name="resnet50",
            title="ResNet-50, 64 photos of 224²",
            build=ResNet,
            small=lambda: ResNet((1, 2), 8),
            thin=lambda: ResNet(width=8),
            inputs=images,
            sizes=(64, 224),
            small_sizes=(4, 32),
            target=1.6,
        ),
        Sized(
            name="mobilenet_v2",
            title="MobileNetV2, 256 photos of 224²",
            build=mobilenet,
            small=mobilenet,
            thin=mobilenet,
            inputs=images,
            sizes=(256, 224),
            small_sizes=(4, 32),
            target=3.0,
        ),
    )
}


def has_transformers() -> bool:
    """Return whether transformers is there."""
    return importlib.util.find_spec("transformers") is not None
