"""What stays in float in bfloat16: what layers compute, and what is rounded where."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import Prepared, prepare
from autoquant.nn.converted import converted_modules
from autoquant.nn.rest import PRODUCTS, check_float32, in_dtype
from autoquant.nn.transforms import transform_as
from autoquant.quant.activation import fake_quantize_activation
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.techniques import CORRECTIONS

BF16 = torch.bfloat16
W, A = WeightScheme(8), ActivationScheme(8)
RECIPES = (SiteRecipe(W, A), SiteRecipe(WeightScheme(4), None), SiteRecipe(None, A), FLOAT_SITE)
KINDS = (nn.Embedding, nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rounded(x: Tensor) -> Tensor:
    """Return ``x`` as bfloat16 has it, in float32."""
    return x.to(BF16).to(torch.float32)


def lowered(model: nn.Module, run: Any, engine: Any = None) -> Applier:
    prepared = prepare(model, run, engine=engine).lowered("bf16")
    return Applier(prepared, calibrate(prepared, [None], lambda m, _: run(m)))


def by_turns(prepared: Prepared, start: int) -> dict[str, SiteRecipe]:
    """Return a recipe in which sites take turns with all that a site can be."""
    return {s.name: RECIPES[(start + i) % 4] for i, s in enumerate(prepared.sites)}


# --- whole models --------------------------------------------------------------------------------


def test_a_model_without_a_recipe_computes_as_torch_does_in_bfloat16(case, equal):
    exact = case.run(copy.deepcopy(case.model))
    applier = lowered(copy.deepcopy(case.model), case.run)
    found = case.run(applier.prepared.model)
    assert {y.dtype for y in found if y.is_floating_point()} == {torch.float32}
    scale = max(float(y.abs().max()) for y in exact)
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).abs().max()) <= 0.06 * scale
    assert not equal(found, exact)
    plain = copy.deepcopy(case.model)
    folds = any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    kinds = {
        type(m) for m in plain.modules() if next(m.parameters(recurse=False), None) is not None
    }
    if not folds and all(issubclass(kind, KINDS) for kind in kinds):
        args, kwargs = in_dtype((case.args, case.kwargs), BF16)
        with torch.no_grad():
            theirs = plain.to(BF16)(*args, **kwargs)
        leaves = [y.float() for y in torch.utils._pytree.tree_leaves(theirs) if y is not None]
        assert equal(found, leaves)


@pytest.mark.parametrize("start", range(4))
def test_a_saved_model_gives_what_was_measured_bit_for_bit(case, start, equal, tmp_path):
    applier = lowered(copy.deepcopy(case.model), case.run)
    prepared = applier.prepared
    before = case.run(prepared.model)
    assert equal(case.run(applier.deploy({})), before)
    done = applier.apply(by_turns(prepared, start))
    expected = case.run(prepared.model)
    assert not equal(expected, before)
    deployed = applier.deploy(done)
    assert equal(case.run(deployed), expected)
    path = Path(tmp_path) / "model.safetensors"
    recipe = Recipe(done, folded=prepared.folded, rest="bf16")
    save_archive(deployed, recipe, path)
    architecture = copy.deepcopy(case.model)
    for parameter in architecture.parameters():
        nn.init.zeros_(parameter)
    assert equal(case.run(load_archive(path, architecture)), expected)
    assert equal(case.run(prepared.model), before)


def test_in_float32_the_model_is_what_it_was_bit_for_bit(case, equal):
    prepared = case.prepared()
    before = case.run(prepared.model)
    state = copy.deepcopy(prepared.model.state_dict())
    prepared = prepared.lowered("bf16")
    low = case.run(prepared.model)
    with prepared.in_float32():
        assert equal(case.run(prepared.model), before)
        assert equal(list(prepared.model.state_dict().values()), list(state.values()))
    assert equal(case.run(prepared.model), low)
    assert {p.dtype for p in prepared.model.parameters() if p.dim() > 1} == {BF16}


def test_weights_are_quantized_from_what_they_were(case):
    plain, low = case.applier(), lowered(copy.deepcopy(case.model), case.run)
    for site in plain.prepared.sites:
        one, other = (a.weight(site, SiteRecipe(W)) for a in (plain, low))
        assert torch.equal(one.q, other.q)
        assert torch.equal(one.qparams.scale, other.qparams.scale)


def test_the_fast_kernels_round_as_the_reference_does(case):
    engine = make_engine(torch.device("cpu"))
    applier = lowered(copy.deepcopy(case.model), case.run, engine)
    for layer in converted_modules(applier.prepared.model):  # nothing is handed on unrounded
        assert layer.after is layer.reader is layer.plan is None
    applier.apply({s.name: RECIPES[0] for s in applier.prepared.sites})
    found = case.run(applier.prepared.model)
    with engine.reference():
        expected = case.run(applier.prepared.model)
    # Sums in another order fall to the other side of a middle now and then.
    scale = max(float(y.abs().max()) for y in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 0.04 * scale


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_rounds_its_output_once(bias, correction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias)).eval()
    x = torch.randn(50, 24) + 2.0  # far from 0, so that biases are corrected by much
    weight, own = model[0].weight.detach().clone(), model[0].bias
    own = None if own is None else own.detach().clone()
    applier = lowered(model, lambda m: m(x))
    coarse = WeightScheme(4)
    site = SiteRecipe(coarse, A)
    if correction:
        site = SiteRecipe(coarse, A, CORRECTIONS.get("bias")())
    done = applier.apply({"0": site})["0"]
    held = applier.held("0", done)
    assert held is not None
    seen = fake_quantize_activation(rounded(x), done.activation, "linear")
    if held.shift is not None:
        own = held.shift if own is None else rounded(own) + held.shift
    own = None if own is None else rounded(own)
    expected = rounded(F.linear(seen, held.quantized.dequantize(), own))
    assert torch.equal(model(x), expected)
    nearest = (weight / held.quantized.qparams.scale).round().clamp(-7, 7)
    assert torch.equal(held.quantized.q.float(), nearest)
    assert torch.equal(applier.deploy({"0": site})(x), expected)


def test_a_layer_in_float_computes_in_bfloat16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    x = torch.randn(5, 24)
    expected = F.linear(x.to(BF16), model[0].weight.to(BF16), model[0].bias.to(BF16)).float()
    applier = lowered(model, lambda m: m(x))
    assert torch.equal(model(x), expected)
    assert torch.equal(applier.deploy({})(x), expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_recurrent_layer_is_rounded_where_it_begins_and_ends(quantized):
    torch.manual_seed(0)
    model = nn.LSTM(6, 8).eval()
    x = torch.randn(5, 3, 6)
    plain = copy.deepcopy(model)
    applier = lowered(model, lambda m: m(x))
    sites = {s.name: SiteRecipe(W if quantized else None) for s in applier.prepared.sites}
    applier.apply(sites)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            held = applier.held(name, sites[name]) if name in sites else None
            parameter.copy_(rounded(parameter) if held is None else held.quantized.dequantize())
    y, (h, c) = model(x)
    expected, (last, cell) = plain(rounded(x))
    torch.testing.assert_close(y, rounded(expected), atol=1e-2, rtol=0)
    assert float((y == rounded(expected)).float().mean()) > 0.98
    assert torch.equal(y, rounded(y))
    torch.testing.assert_close((h, c), (rounded(last), rounded(cell)), atol=1e-2, rtol=0)


# --- the user's code -----------------------------------------------------------------------------


class Rotary(nn.Module):
    """Makes float32 of its own all over, as code that was only ever run in float32 does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("places", torch.linspace(0, 1, 8), persistent=False)
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.linspace(0, 1, x.shape[1])[:, None])
        q, k, v = self.qkv(x.float()).chunk(3, -1)
        turns = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * self.places
        q, k = q * turns.cos(), k * turns.cos()
        seen = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        scores = (q @ k.transpose(1, 2)).float().softmax(-1)
        y = torch.zeros(x.shape)
        y[:, ::2] = (scores @ v)[:, ::2]
        y = self.norm(y + seen) * self.scale
        return F.linear(y, self.head.weight, self.head.bias) + torch.einsum(
            "bti,oi->bto", y, self.head.weight
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_code_that_mixes_formats_goes_on_working(recipe, equal):
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 6, 8)
    exact = model(x)
    applier = lowered(copy.deepcopy(model), lambda m: m(x))
    sites = {s.name: recipe for s in applier.prepared.sites if s.activation}
    applier.apply(sites)
    found = applier.prepared.model(x)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) <= 0.25 * float(exact.abs().max())
    deployed = applier.deploy(sites)
    assert torch.equal(deployed(x), found)
    program = torch.export.export(deployed, (x,), strict=False).module()
    assert torch.equal(program(x), found)


LEAST = torch.finfo(torch.float32).min


class Calls(nn.Module):
    """A layer, and one call of torch with what it gives and with float32."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.call = nn.Linear(8, 8), nn.LayerNorm(8), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.layer(x), torch.linspace(-1, 1, 24).reshape(3, 8))


def _written(_: Any, y: Tensor, c: Tensor) -> Tensor:
    c[c[:, 0] < 2] = y
    return c


CALLS: dict[str, Any] = {
    "a mask": lambda _, y, c: y.masked_fill(c > 0, LEAST).softmax(-1),
    "an addend": lambda _, y, c: (y + torch.where(c > 0, LEAST, 0.0)).softmax(-1),
    "a norm": lambda m, y, c: m.norm(y + c),
    "written into": _written,
    "scattered": lambda _, y, c: c.scatter_add(1, torch.zeros(3, 8, dtype=torch.int64), y),
    "scattered in place": lambda _, y, c: c.index_add_(0, torch.tensor([2, 0, 1]), y),
    "a product": lambda _, y, c: y @ c.T,
    "a product into": lambda _, y, c: torch.matmul(y, c.T, out=torch.empty(3, 3)),
    "attention": lambda _, y, c: F.scaled_dot_product_attention(y, c, value=y, attn_mask=c[:, :3]),
    "by a list": lambda _, y, c: torch.einsum("ij,kj->ik", [y, c]),
    "between": lambda _, y, c: torch.lerp(y, c, 0.5),
    "cast": lambda _, y, c: torch.view_as_real(torch.fft.rfft(y.float() + c)),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_mixes_formats_gives_nearly_what_float32_does(what):
    model, x = Calls(CALLS[what]).eval(), torch.randn(3, 8)
    exact = model(x)
    prepared = prepare(model, lambda m: m(x)).lowered("bf16")
    found = prepared.model(x)
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).abs().max()) <= 0.02 * float(exact.abs().max())


def test_a_copy_of_a_graph_has_its_door_again():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval())
    x = torch.randn(3, 8)
    applier = lowered(model, lambda m: m(x))
    sites = {"0": SiteRecipe(W, A)}
    applier.apply(sites)
    found = applier.prepared.model(x)
    assert found.dtype == torch.float32
    assert torch.equal(applier.deploy(sites)(x), found)


@pytest.mark.parametrize("text", ["hadamard_8", "mmmmaaaaffffbbbb"])
def test_a_transformed_input_is_transformed_in_float32(text):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(5, 16)
    weight = model[0].weight.detach().clone()
    applier = lowered(model, lambda m: m(x))
    transform_as(applier.prepared, {"0": text})
    transform = applier.prepared.slots["0"].transform
    assert transform is not None
    scheme = ActivationScheme(8, scale=0.02, zero_point=0)
    made = applier.weight(applier.prepared.sites[0], SiteRecipe(W))
    assert made is not None
    near = made.dequantize() - transform.of_weight(weight)
    assert float((near.abs() / made.qparams.scale).max()) <= 0.5001
    applier.apply({"0": SiteRecipe(W, scheme)})
    found = model(x)
    seen = transform.input_back(
        fake_quantize_activation(transform.of_input(rounded(x)), scheme, "linear")
    )
    expected = F.linear(seen, transform.weight_back(made.dequantize()), rounded(model[0].bias))
    torch.testing.assert_close(found, rounded(expected), atol=1e-2, rtol=2**-7)
    assert float((found == rounded(expected)).float().mean()) > 0.9
    assert torch.equal(applier.deploy({"0": SiteRecipe(W, scheme)})(x), found)


def test_integers_are_not_touched_and_what_is_raised_leaves_nothing_behind():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(300, 4)
            self.layer = nn.Linear(4, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
            if ids[0] == 7:
                raise ValueError("seven")
            return self.layer(self.words(ids)), ids + 0

    model, mask = Picky().eval(), torch.tensor([True])
    lowered(model, lambda m: m(torch.tensor([257]), mask))
    with pytest.raises(ValueError, match="seven"):
        model(torch.tensor([7]), mask)
    # Outside of the model nothing is mended any more.
    with pytest.raises(RuntimeError):
        torch.ones(2, 2) @ torch.ones(2, 2, dtype=BF16)
    y, ids = model(torch.tensor([257]), mask)
    assert (y.dtype, int(ids[0])) == (torch.float32, 257)


def test_what_takes_no_mix_is_known():
    """torch refuses each of these a mix; what it computes of a mix itself needs no mention."""
    x, low = torch.ones(2, 2), torch.ones(2, 2, dtype=BF16)
    for func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, F.linear):
        assert func in PRODUCTS
        with pytest.raises(RuntimeError):
            func(x, low)


def test_a_model_of_another_format_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    with pytest.raises(UserError) as raised:
        check_float32(model, "bf16")
    assert str(raised.value) == (
        "--rest bf16 takes a model in float32, and 1.weight is float16: without --rest its own "
        "formats stay"
    )
