"""Sites that give their numbers by operators: the same ones; what ONNX can't say is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.export.qdq import dequantized, quantized_dequantized, unfit, with_operators
from autoquant.session.session import Session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.training.models import inputs, opened, task_of

SCHEMES = [
    WeightScheme(bits, granularity, scheme)
    for bits in (2, 3, 4, 5, 8)
    for granularity in ("per_tensor", "per_channel")
    for scheme in ("symmetric", "asymmetric")
]
ACTIVATIONS = [
    None,
    ActivationScheme(8),
    ActivationScheme(4, scheme="asymmetric"),
    ActivationScheme(6, "per_token"),
]


class Attentive(nn.Module):
    """An embedding, attention, and linear layers on 3-D inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm, self.one = nn.LayerNorm(32), nn.Linear(32, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        states = self.embedding((x.abs() * 5).long().clamp(max=15))
        mixed, _ = self.attention(states, states, states, need_weights=False)
        return self.head(nn.functional.gelu(self.one(self.norm(mixed)))).mean(1)


def session_of(kind: str) -> Session:
    if kind != "attentive":
        return opened(kind)
    torch.manual_seed(0)
    model = Attentive().eval()
    return opened(model=model, task=task_of(model))


def deployed(session: Session, recipe: SiteRecipe) -> nn.Module:
    """Return the deployed model of one recipe for all sites, as far as they have activations."""
    sites = {
        site.name: recipe if site.activation else SiteRecipe(recipe.weight)
        for site in session.prepared.sites
    }
    return session.applier.deploy(session.applier.apply(sites))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "images", "attentive"])
def test_a_model_gives_the_same_numbers_by_operators(
    kind: str, activation: ActivationScheme | None
) -> None:
    session = session_of(kind)
    x = inputs(40, seed=5)
    for scheme in SCHEMES:
        model = deployed(session, SiteRecipe(scheme, activation))
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(with_operators(model)(x), expected)
            assert torch.equal(model(x), expected)  # which is left as it was


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_groups_of_a_matrix_are_blocks(scheme: Any) -> None:
    session = session_of("attentive")
    model = deployed(session, SiteRecipe(WeightScheme(4, "per_group_32", scheme)))
    x = inputs(40, seed=5)
    assert unfit(model) == []
    with torch.no_grad():
        assert torch.equal(with_operators(model)(x), model(x))


def test_what_it_can_not_express_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(16, 32, batch_first=True)
            self.conv = nn.Conv1d(32, 32, 3, padding=1)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.gru(x[:, None].expand(-1, 3, -1))
            return self.head(self.conv(states.transpose(1, 2)).mean(2))

    torch.manual_seed(0)
    model = Both().eval()
    session = opened(model=model, task=task_of(model))
    sites = {
        site.name: SiteRecipe(
            WeightScheme(4, "per_group_32" if site.name == "conv" else "per_channel")
        )
        for site in session.prepared.sites
    }
    found = unfit(session.applier.deploy(session.applier.apply(sites)))
    assert [line.partition(":")[0] for line in found] == ["gru", "conv"]
    assert "recurrent" in found[0]
    assert "groups of a convolution's weight [32, 32, 3]" in found[1]


def test_operators_are_right_for_torch() -> None:
    x, scale = torch.randn(3, 8), torch.tensor(0.1)
    zero = torch.tensor(130, dtype=torch.uint8)
    torch.library.opcheck(quantized_dequantized, (x, scale, zero, 100, 160))
    expected = torch.fake_quantize_per_tensor_affine(x, 0.1, 130, 100, 160)
    assert torch.equal(quantized_dequantized(x, scale, zero, 100, 160), expected)
    q = torch.randint(-8, 8, (4, 6), dtype=torch.int8)
    scales, zeros = torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.int8)
    torch.library.opcheck(dequantized, (q, scales, zeros, 1, 2))
    assert torch.equal(
        dequantized(q, scales, zeros, 1, 2),
        (q.reshape(4, 3, 2).float() * scales[..., None]).reshape(4, 6),
    )
