"""Blocks of the families that people bring most, as their libraries write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.real_life.case import Case, images, lively, sequences, words


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers.pytorch_utils has it: its weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"  # which is how it is known without transformers


class GPT2(nn.Module):
    """One block of GPT-2 with its tied head."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(20, width), nn.Embedding(8, width)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(width) for _ in range(3))
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.mlp_proj = Conv1D(4 * width, width), Conv1D(width, 4 * width)
        self.lm_head = nn.Linear(width, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        x = x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


class ViT(nn.Module):
    """A vision transformer: patches, a class token, LayerScale, relative positions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token, self.place = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Parameter(torch.randn(1, 5, width)),
        )
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 48),
            nn.Linear(16, 16),
        )
        self.gamma, self.bias = (
            nn.Parameter(torch.full((width,), 0.5)),
            nn.Parameter(torch.randn(2, 5, 5)),
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(8) + self.bias).softmax(-1)
        x = x + self.gamma * self.proj((attention @ v).transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


class Encoder(nn.Module):
    """torch's own encoder layer, whose fast path reads weights instead of calling layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.words(ids), src_key_padding_mask=ids == 0)
        return self.head(x.mean(1))


class MobileNet(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False), lively(nn.BatchNorm2d(8)), nn.Hardswish()
        )
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), lively(nn.BatchNorm2d(8)), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.expand(x))
        scale = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head((x * F.hardsigmoid(scale)).mean((2, 3)))


class Speech(nn.Module):
    """A strided convolution over samples, an LSTM, and scores a frame (fairseq, wav2vec)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 4, 2, bias=False)
        self.norm = nn.GroupNorm(8, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x[:, None])))
        return self.head(self.lstm(x.transpose(1, 2))[0]).log_softmax(-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Llama(nn.Module):
    """Gated units and rotary positions; no biases anywhere."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(20, width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 32, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(32, width, bias=False), nn.Linear(width, 20, bias=False)
        angles = torch.outer(torch.arange(6.0), 10000 ** -(torch.arange(0, width, 2) / width))
        self.register_buffer(
            "turns", torch.polar(torch.ones_like(angles), angles), persistent=False
        )

    def turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        y = self.norm(x)
        q, k = self.turn(self.q(y)), self.turn(self.k(y))
        x = x + self.o(F.scaled_dot_product_attention(q, k, self.v(y), is_causal=True))
        y = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


CASES = (
    Case(
        "gpt2_conv1d",
        GPT2,
        words,
        "Conv1D is no nn.Linear: GPT-2 stays in float but for its embeddings",
        layers=("wte", "c_attn", "c_proj", "c_fc", "mlp_proj"),
        quick=True,
    ),
    Case(
        "vision_transformer",
        ViT,
        lambda: images(size=8),
        "parameters of the model itself",
        floats={"gamma": "of ViT itself"},
    ),
    Case("encoder_fast_path", Encoder, words, "the fast path reads float weights: no effect"),
    Case("mobilenet", MobileNet, images, "ReLU6 and gates are fused into the wrong layer"),
    Case(
        "speech",
        Speech,
        lambda: [torch.randn(12, 20) for _ in range(4)],
        "weights of an LSTM in a flat list are not replaced",
    ),
    Case("llama", Llama, words, "complex buffers that are not saved are lost"),
    Case(
        "positions_in_sequence",
        lambda: nn.Sequential(nn.Linear(16, 16), nn.Unflatten(-1, (2, 8)), nn.Flatten(-2)),
        sequences,
        "a model that ends without a layer has no last layer",
    ),
)
