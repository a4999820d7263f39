from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.nn.attention import QuantizedMultiheadAttention, disable_fast_path
from autoquant.nn.converted import Converted, converted_of, install
from autoquant.nn.runtime import Multiply, Rows

EMBED, HEADS = 8, 2


class Spy:
    """A site that counts its reads, keeps its inputs, and rounds to a grid (0: not at all)."""

    def __init__(self, parameter: Tensor, grid: float = 0.0) -> None:
        self.parameter = parameter
        self.grid = grid
        self.reads = 0
        self.seen: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        self.reads += 1
        return on_grid(self.parameter, self.grid)

    def bias(self, own: Tensor | None) -> Tensor | None:
        return own

    def quantize_input(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return on_grid(x, self.grid)

    def linear(self, *parts: Rows) -> tuple[Multiply, ...]:
        weight = self.weight

        def product(rows: Rows) -> Multiply:
            part = weight if rows is None else weight[slice(*rows)]
            return lambda x, bias: nn.functional.linear(self.quantize_input(x), part, bias)

        return tuple(map(product, parts))


class SpiedLinear:
    """One call of a converted linear layer."""

    def __init__(self, converted: Converted) -> None:
        self.layer, self.site = converted.module, converted.sites["weight"]

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.site.quantize_input(x), self.site.weight, self.layer.bias)


def on_grid(x: Tensor, grid: float) -> Tensor:
    return x if grid == 0 else (x / grid).round() * grid


def convert(model: nn.Module, grid: float = 0.0) -> Any:
    """Convert every attention and linear layer of a copy of ``model``."""
    model = copy.deepcopy(model)
    kinds = {nn.MultiheadAttention: QuantizedMultiheadAttention, nn.Linear: SpiedLinear}
    for path, module in list(model.named_modules()):
        kind = next((k for base, k in kinds.items() if isinstance(module, base)), None)
        if kind is not None:
            own = module.named_parameters(recurse=False)
            install(module, path, {n: Spy(p, grid) for n, p in own if "weight" in n}, kind, None)
    disable_fast_path(model)
    return model


def sites_of(module: nn.Module) -> Any:
    converted = converted_of(module)
    return {} if converted is None else converted.sites


def spies(model: nn.Module) -> Iterator[tuple[str, Spy]]:
    for path, module in model.named_modules():
        for name, spy in sites_of(module).items():
            yield f"{path}.{name}", spy


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """An attention layer, its query, key and value, and its other arguments."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    flag = st.booleans()
    other = draw(st.sampled_from([None, (5, 6), (EMBED, 6)]))
    k_dim, v_dim = other or (EMBED, EMBED)
    layer = nn.MultiheadAttention(
        EMBED,
        HEADS,
        dropout=draw(st.sampled_from([0.0, 0.3])),
        bias=draw(flag),
        add_bias_kv=draw(flag),
        add_zero_attn=draw(flag),
        kdim=k_dim,
        vdim=v_dim,
        batch_first=draw(flag),
        dtype=torch.float64,
    ).train(draw(flag))
    for p in layer.parameters():
        nn.init.normal_(p)
    batch = draw(st.integers(1, 3))
    batched = draw(flag)
    n = batch if batched else 1

    def inputs(length: int, size: int) -> Tensor:
        if not batched:
            return randn(length, size)
        return randn(*((batch, length) if layer.batch_first else (length, batch)), size)

    shared = draw(st.sampled_from(["none", "key=value", "query=value", "all"]))
    length = draw(st.integers(1, 5))
    causal = draw(flag)
    if other is not None and shared != "key=value":
        shared = "none"
    if (other is not None and k_dim != v_dim) and shared == "key=value":
        shared = "none"
    keys = length if shared in ("all", "query=value") or causal else draw(st.integers(1, 5))
    query = inputs(length, EMBED)
    key = query if shared == "all" else inputs(keys, k_dim)
    value = key if shared in ("all", "key=value") else inputs(keys, v_dim)
    value = query if shared == "query=value" else value
    form = draw(st.sampled_from(["none", "bool", "float"]))
    arguments: dict[str, Any] = {
        "need_weights": draw(flag),
        "average_attn_weights": draw(flag),
        "is_causal": causal,
    }
    shape = draw(st.sampled_from([(length, keys), (n * HEADS, length, keys)]))
    if causal:
        form = "float"
        mask = torch.full((length, keys), -math.inf, dtype=torch.float64).triu(1)
        arguments["attn_mask"] = mask
    elif form != "none" and draw(flag):
        arguments["attn_mask"] = randn(*shape) if form == "float" else some(shape)
    if form != "none" and draw(flag):
        padding = randn(n, keys) if form == "float" else some((n, keys))
        arguments["key_padding_mask"] = padding if batched else padding[0]
    return layer, (query, key, value), arguments


def some(shape: tuple[int, ...]) -> Tensor:
    """A random Boolean mask that leaves every query a key to see."""
    mask = torch.rand(shape) > 0.6
    mask[..., 0] = False
    return mask


@settings(max_examples=250, deadline=None)
@given(cases())
def test_without_quantization_attention_computes_what_torch_does(case: Any) -> None:
    layer, inputs, arguments = case
    torch.manual_seed(3)  # dropout draws the same numbers
    want, want_weights = layer(*inputs, **arguments)
    quantized = convert(layer)
    torch.manual_seed(3)
    got, got_weights = quantized(*inputs, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_weights, want_weights, rtol=1e-9, atol=1e-10)
    q, k, v = map(id, inputs)
    runs = 1 + (k != q) + (v != k)  # what is the same in a row is quantized once
    for name, spy in spies(quantized):
        assert spy.reads == 1, name
        assert len(spy.seen) == (runs if "in_proj_weight" in name else 1), name


@settings(max_examples=40, deadline=None)
@given(cases())
def test_gradients_are_those_of_torch(case: Any) -> None:
    layer, inputs, arguments = case
    quantized = convert(layer)
    for module in (layer, quantized):
        torch.manual_seed(3)
        output, weights = module(*inputs, **arguments)
        (output.square().sum() + (0 if weights is None else weights.square().sum())).backward()
    for (name, p), q in zip(layer.named_parameters(), quantized.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-8, msg=name)


def naive(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, grid: float) -> Tensor:
    """One sequence: queries [L, E], keys and values [S, E], additive mask [heads, L, S]."""

    def weight(name: str, index: int) -> Tensor:
        packed = layer.in_proj_weight
        own = getattr(layer, name) if packed is None else packed[index * EMBED :][:EMBED]
        return on_grid(own, grid)

    bias = layer.in_proj_bias.view(3, EMBED)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    projected = [
        torch.stack([weight(name, i) @ on_grid(row, grid) + bias[i] for row in x])
        for i, (name, x) in enumerate(zip(names, (q, k, v), strict=True))
    ]
    size = EMBED // HEADS
    out = torch.zeros(len(q), EMBED, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        hq, hk, hv = (x[:, part] for x in projected)
        for row in range(len(q)):
            scores = torch.stack([hq[row] @ key for key in hk]) / math.sqrt(size) + mask[head, row]
            out[row, part] = (scores.exp() / scores.exp().sum()) @ hv
    final = on_grid(layer.out_proj.weight, grid)
    return torch.stack([final @ on_grid(row, grid) + layer.out_proj.bias for row in out])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_with_rounding_attention_computes_what_explicit_loops_do(
    need_weights: bool, batch_first: bool, separate: bool
) -> None:
    torch.manual_seed(0)
    k_dim = 5 if separate else EMBED
    layer = nn.MultiheadAttention(
        EMBED, HEADS, kdim=k_dim, batch_first=batch_first, dtype=torch.float64
    )
    for p in layer.parameters():
        nn.init.normal_(p)
    q, k, v = randn(3, 4, EMBED), randn(3, 6, k_dim), randn(3, 6, EMBED)
    attn_mask, padding = randn(3 * HEADS, 4, 6), randn(3, 6)
    given = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    output, _ = convert(layer, grid=0.13).eval()(
        *given, attn_mask=attn_mask, key_padding_mask=padding, need_weights=need_weights
    )
    output = output if batch_first else output.transpose(0, 1)
    for row in range(3):
        mask = attn_mask.view(3, HEADS, 4, 6)[row] + padding[row]
        want = naive(layer, q[row], k[row], v[row], mask, 0.13)
        torch.testing.assert_close(output[row], want, rtol=1e-9, atol=1e-10)


def test_a_weight_without_a_site_stays_in_float_and_out_proj_is_called() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    quantized = convert(layer, grid=0.5)
    sites_of(quantized).clear()
    x = torch.randn(2, 3, EMBED)
    with torch.no_grad():
        assert not torch.allclose(quantized(x, x, x)[0], layer(x, x, x)[0])
        sites_of(quantized.out_proj)["weight"].grid = 0.0
        torch.testing.assert_close(quantized(x, x, x)[0], layer(x, x, x)[0])
    assert len(sites_of(quantized.out_proj)["weight"].seen) == 2


def test_what_attention_cannot_compute_is_refused() -> None:
    quantized = convert(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    x = torch.randn(2, 3, EMBED)
    with pytest.raises(RuntimeError, match="no attn_mask"):
        quantized(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        quantized(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_refused() -> None:
    quantized = convert(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(2, EMBED), torch.randn(3, EMBED)])
    with pytest.raises(UserError, match="takes no nested tensors"):
        quantized(nested, nested, nested)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_can_be_exported(need_weights: bool) -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = convert(nn.MultiheadAttention(EMBED, HEADS, batch_first=True), 0.1)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out, weights = self.attention(x, x, x, padding, need_weights=need_weights)
            return out if weights is None else out + weights.sum()

    model = Model().eval()
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    example = (torch.randn(3, 4, EMBED), torch.zeros(3, 4, dtype=torch.bool))
    program = torch.export.export(model, example, dynamic_shapes=(dims, dims))
    assert not any("native" in str(node.target) for node in program.graph.nodes)
    x, padding = torch.randn(2, 7, EMBED), some((2, 7))
    torch.testing.assert_close(program.module()(x, padding), model(x, padding))


# --- the fused paths of the transformer encoder ----------------------------------------------


def encoder(norm: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, **options}
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options)
    last = nn.LayerNorm(EMBED, dtype=torch.float64) if norm else None
    model = nn.TransformerEncoder(layer, 2, norm=last)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


PADDING = {
    "none": None,
    "nothing": torch.zeros(3, 4, dtype=torch.bool),
    "at the end": torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool(),
    "at the start": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool(),
}
NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage"
UNUSED = "ignore:enable_nested_tensor is True, but"


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_site_of_an_encoder_is_used_in_evaluation(
    mode: type[AbstractContextManager[None]], padding: Tensor | None
) -> None:
    model = convert(encoder())
    with mode():
        model(randn(3, 4, EMBED), src_key_padding_mask=padding)
    found = dict(spies(model))
    assert len(found) == 2 * 4
    for name, spy in found.items():
        assert (spy.reads, len(spy.seen)) == (1, 1), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_spies_would_notice_the_fused_path(mode: type[AbstractContextManager[None]]) -> None:
    model = convert(encoder())
    for layer in model.layers:
        layer.activation_relu_or_gelu = 1
    with mode():
        model(randn(3, 4, EMBED))
    assert all(not spy.seen for _, spy in spies(model))


@pytest.mark.filterwarnings(NESTED, UNUSED)
@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu"},
        {"activation": nn.ReLU()},
        {"activation": torch.tanh},
        {"norm_first": True},
        {"bias": False},
        {"batch_first": False},
    ],
    ids=["plain", "gelu", "a ReLU", "tanh", "norm first", "no bias", "time first"],
)
def test_an_encoder_gives_the_same_results_without_the_fused_path(
    options: dict[str, Any], norm: bool, additive: bool, padding: Tensor | None
) -> None:
    model = encoder(norm, **options)
    x = randn(3, 4, EMBED)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    if additive and padding is not None:
        padding = torch.zeros(3, 4, dtype=torch.float64).masked_fill_(padding, -math.inf)
    with torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
        got = convert(model)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings(NESTED)
def test_an_encoder_with_a_mask_or_in_training_keeps_its_padding() -> None:
    model, x, padding = encoder(), randn(3, 4, EMBED), PADDING["at the end"]
    mask = some((4, 4))
    with torch.no_grad():
        want = model(x, mask, padding)
        torch.testing.assert_close(convert(model)(x, mask, padding), want)
    want = model.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(convert(model)(x, src_key_padding_mask=padding), want)


def test_switching_the_fused_path_off_twice_is_as_once_and_an_encoder_can_be_exported() -> None:
    model = convert(encoder(), grid=0.1)
    disable_fast_path(model)
    assert len(model._forward_hooks) == 1
    x, padding = randn(3, 4, EMBED), PADDING["at the end"]
    program = torch.export.export(model, (x,), {"src_key_padding_mask": padding})
    got = program.module()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got, model(x, src_key_padding_mask=padding))
    assert not any("native" in str(node.target) for node in program.graph.nodes)


def test_a_whole_transformer_uses_every_site() -> None:
    torch.manual_seed(0)
    model = convert(nn.Transformer(EMBED, HEADS, 1, 1, 16, batch_first=True).eval())
    with torch.inference_mode():
        model(torch.randn(2, 4, EMBED), torch.randn(2, 3, EMBED))
    assert all(spy.reads == 1 for _, spy in spies(model))
