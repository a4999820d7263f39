from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from autoquant.nn.converted import converted_of, install
from autoquant.nn.modules import QUANTIZED
from autoquant.nn.runtime import Multiply, Rows

INPUTS, HIDDEN, PROJECTED = 3, 4, 2


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


def on_grid(x: Tensor, grid: float) -> Tensor:
    return x if grid == 0 else (x / grid).round() * grid


def convert(layer: nn.Module, grid: float = 0.0) -> Any:
    clone: Any = copy.deepcopy(layer)
    sites = {
        n: Spy(p, grid) for n, p in clone.named_parameters(recurse=False) if n.startswith("weight")
    }
    install(clone, "", sites, QUANTIZED[type(layer)], None)
    return clone


def sites_of(layer: nn.Module) -> Any:
    converted = converted_of(layer)
    assert converted is not None
    return converted.sites


def build(kind: type[nn.Module], **options: Any) -> Any:
    layer = kind(INPUTS, HIDDEN, dtype=torch.float64, **options)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.8, 0.8)
    return layer


def states_for(layer: Any, batch: int | None) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    lead = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*lead, layer.proj_size or HIDDEN, dtype=torch.float64)
    return (h, torch.randn(*lead, HIDDEN, dtype=torch.float64)) if layer.mode == "LSTM" else h


def tensors(result: Any) -> list[Tensor]:
    """Every tensor of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


def assert_same(actual: Any, expected: Any) -> None:
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """A layer, its input in any of the forms torch takes, and its initial state or None."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.4]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from([0, PROJECTED]))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    layer = build(kind, **options).train(draw(st.booleans()))
    form = draw(st.sampled_from(["batch", "unbatched", "sorted", "unsorted"]))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    batch = len(lengths)
    if form == "unbatched":
        x: Any = torch.randn(lengths[0], INPUTS, dtype=torch.float64)
    else:
        shape = (batch, max(lengths)) if options["batch_first"] else (max(lengths), batch)
        x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    if form in ("sorted", "unsorted"):
        lengths = sorted(lengths, reverse=True) if form == "sorted" else lengths
        x = pack_padded_sequence(
            x, torch.tensor(lengths), options["batch_first"], enforce_sorted=form == "sorted"
        )
    given_state = draw(st.booleans())
    state = states_for(layer, None if form == "unbatched" else batch) if given_state else None
    return layer, x, state


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@settings(max_examples=150, deadline=None)
@given(cases())
def test_without_quantization_a_layer_computes_what_torch_does(case: tuple[Any, Any, Any]) -> None:
    layer, x, state = case
    torch.manual_seed(7)  # dropout draws the same numbers
    expected = layer(x, state)
    torch.manual_seed(7)
    quantized = convert(layer)
    actual = quantized(x, state)
    assert_same(actual, expected)
    if isinstance(x, PackedSequence):
        assert isinstance(actual[0], PackedSequence)
        assert (actual[0].unsorted_indices is None) == (expected[0].unsorted_indices is None)
    assert all(spy.reads == 1 for spy in sites_of(quantized).values())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@settings(max_examples=40, deadline=None)
@given(cases())
def test_gradients_are_those_of_torch(case: tuple[Any, Any, Any]) -> None:
    layer, x, state = case
    quantized = convert(layer)
    for module in (layer, quantized):
        torch.manual_seed(7)
        sum(t.square().sum() for t in tensors(module(x, state)) if t.is_floating_point()).backward()
    for (name, p), q in zip(layer.named_parameters(), quantized.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_gradients_reach_the_input_and_the_initial_state() -> None:
    torch.manual_seed(0)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        quantized = convert(build(kind, bidirectional=True))
        x = torch.randn(3, 2, INPUTS, dtype=torch.float64, requires_grad=True)
        state = [s.requires_grad_() for s in tensors(states_for(quantized, 2))]

        def run(x: Tensor, *state: Tensor, q: Any = quantized) -> Tensor:
            return q(x, tuple(state) if len(state) > 1 else state[0])[0]

        assert torch.autograd.gradcheck(run, (x, *state))


# --- against a re-implementation that loops over sequences and time ---------------------------


def naive_step(layer: Any, suffix: str, grid: float, x: Tensor, h: Tensor, c: Tensor) -> Any:
    def product(name: str, v: Tensor) -> Tensor:
        # Next to the middle between two points, the last bit of a sum decides.
        assume(not v.numel() or float(((v / grid) % 1.0 - 0.5).abs().min()) > 1e-9)
        return on_grid(getattr(layer, f"{name}_{suffix}"), grid) @ on_grid(v, grid)

    zero = torch.zeros((), dtype=torch.float64)
    b_ih = getattr(layer, f"bias_ih_{suffix}", zero)
    b_hh = getattr(layer, f"bias_hh_{suffix}", zero)
    a, b = product("weight_ih", x) + b_ih, product("weight_hh", h) + b_hh
    if layer.mode == "LSTM":
        i, f, g, o = (a + b).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (product("weight_hr", h) if layer.proj_size else h), c
    if layer.mode == "GRU":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        return (1 - z) * torch.tanh(a_n + r * b_n) + z * h, c
    return (torch.tanh if layer.mode == "RNN_TANH" else torch.relu)(a + b), c


def naive(layer: Any, x: Tensor, hx: Any, grid: float) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence [time, features] and its state [rows, features] → output, h and c at the end."""
    h0, c0 = hx if isinstance(hx, tuple) else (hx, torch.zeros(len(hx), 0, dtype=torch.float64))
    finals = []
    for index in range(layer.num_layers):
        directions = []
        for reverse in range(2 if layer.bidirectional else 1):
            h, c = h0[len(finals)], c0[len(finals)]
            outputs = {}
            order = range(len(x))[::-1] if reverse else range(len(x))
            for t in order:
                suffix = f"l{index}" + "_reverse" * reverse
                h, c = naive_step(layer, suffix, grid, x[t], h, c)
                outputs[t] = h
            finals.append((h, c))
            directions.append(torch.stack([outputs[t] for t in range(len(x))]))
        x = torch.cat(directions, -1)
    h, c = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return x, h, c


@settings(max_examples=120, deadline=None)
@given(cases())
def test_with_rounding_a_layer_computes_what_explicit_loops_do(case: tuple[Any, Any, Any]) -> None:
    layer, x, state = case
    layer.eval()
    grid = 0.11
    output, final = convert(layer, grid)(x, state)
    unbatched = not isinstance(x, PackedSequence) and x.dim() == 2
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        output, _ = pad_packed_sequence(output)
    else:
        swap = layer.batch_first and not unbatched
        padded = x.transpose(0, 1) if swap else x.unsqueeze(1) if unbatched else x
        output = output.transpose(0, 1) if swap else output.unsqueeze(1) if unbatched else output
        lengths = torch.full((padded.size(1),), padded.size(0))
    if state is None:
        state = states_for(layer, padded.size(1))
        state = tuple(s * 0 for s in state) if isinstance(state, tuple) else state * 0
        unbatched_state = False
    else:
        unbatched_state = unbatched
    for row in range(padded.size(1)):
        own: Any = tuple(s if unbatched_state else s[:, row] for s in tensors(state))
        length = int(lengths[row])
        want, h, c = naive(layer, padded[:length, row], own if len(own) > 1 else own[0], grid)
        assert_same(output[:length, row], want)
        got = [s if unbatched else s[:, row] for s in tensors(final)]
        assert_same(got, [h, c][: len(got)])


# --- what the quantizers see ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_no_quantizer_sees_padding(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    lengths = [2, 5, 1, 4]
    x = torch.full((5, 4, INPUTS), torch.nan, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[:length, row] = torch.randn(length, INPUTS, dtype=torch.float64)
    quantized = convert(build(kind, num_layers=2, bidirectional=True))
    quantized(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    for name, spy in sites_of(quantized).items():
        seen = torch.cat(spy.seen)
        assert not seen.isnan().any(), name
        assert len(seen) == sum(lengths), name
        assert len(spy.seen) == (1 if "weight_ih" in name else max(lengths)), name


def test_the_projection_of_an_lstm_sees_the_hidden_state_before_it() -> None:
    torch.manual_seed(0)
    quantized = convert(build(nn.LSTM, proj_size=PROJECTED))
    quantized(torch.randn(3, 2, INPUTS, dtype=torch.float64))
    assert [s.shape for s in sites_of(quantized)["weight_hr_l0"].seen] == [(2, HIDDEN)] * 3
    assert [s.shape for s in sites_of(quantized)["weight_hh_l0"].seen] == [(2, PROJECTED)] * 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_weight_without_a_site_stays_in_float(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = build(kind, num_layers=2)
    quantized = convert(layer)
    sites_of(quantized).clear()
    x = torch.randn(3, 2, INPUTS, dtype=torch.float64)
    assert_same(quantized(x), layer(x))
    sites_of(quantized)["weight_hh_l1"] = Spy(quantized.weight_hh_l1, grid=0.5)
    assert not torch.allclose(quantized(x)[0], layer(x)[0])


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q: q(torch.zeros(3, 2, 9).double()), "expected 3 input features, got 9"),
        (lambda q: q(torch.zeros(3).double()), "2-D or 3-D input, got 1-D"),
        (lambda q: q(torch.zeros(3, 2, 3).double(), states_for(q, 5)), "expected hidden size"),
        (lambda q: q(torch.zeros(3, 2, 3).double(), states_for(q, None)), "must both have a batch"),
    ],
)
def test_wrong_shapes_are_refused(
    kind: type[nn.Module], wrong: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        wrong(convert(build(kind)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_may_change_the_type_between_input_and_state(kind: type[nn.Module]) -> None:
    layer = kind(INPUTS, HIDDEN)
    x = torch.randn(3, 2, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = convert(layer)(x)
    torch.testing.assert_close(output.float(), layer(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_can_be_exported(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    quantized = convert(build(kind, num_layers=2, bidirectional=True, batch_first=True), 0.1).eval()
    x = torch.randn(3, 4, INPUTS, dtype=torch.float64)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(quantized, (x,), dynamic_shapes=(batch,))
    other = torch.randn(5, 4, INPUTS, dtype=torch.float64)
    assert_same(program.module()(other), quantized(other))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("start", [True, False])
def test_a_cell_computes_what_torch_does(
    kind: type[nn.Module], bias: bool, batch: tuple[int, ...], start: bool
) -> None:
    torch.manual_seed(0)
    cell = build(kind, bias=bias)
    x = torch.randn(*batch, INPUTS, dtype=torch.float64)
    h, c = torch.randn(2, *batch, HIDDEN, dtype=torch.float64).unbind(0)
    state = None if not start else (h, c) if kind is nn.LSTMCell else h
    quantized = convert(cell)
    assert_same(quantized(x, state), cell(x, state))
    assert all(spy.reads == 1 for spy in sites_of(quantized).values())
    assert not torch.allclose(
        tensors(convert(cell, grid=0.5)(x, state))[0], tensors(cell(x, state))[0]
    )


def test_a_relu_cell_computes_what_torch_does() -> None:
    cell = build(nn.RNNCell, nonlinearity="relu")
    x = torch.randn(2, INPUTS, dtype=torch.float64)
    assert_same(convert(cell)(x), cell(x))


def test_a_cell_refuses_a_state_of_another_rank() -> None:
    with pytest.raises(ValueError, match="1-D or 2-D"):
        convert(build(nn.GRUCell))(torch.zeros(2, INPUTS).double(), torch.zeros(HIDDEN).double())
