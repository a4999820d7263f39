"""One pass over the calibration data, against loops over every position and token."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.nn import calibrate as module
from autoquant.nn.calibrate import MissingStatistics, SiteStatistics, calibrate
from autoquant.nn.convert import prepare
from autoquant.observers.output_error import exact_output_error
from autoquant.quant.blocks import to_matrix
from autoquant.spec.needs import EVERYTHING, Need


def statistics_of(layer: nn.Module, *batches: Tensor) -> Any:
    prepared = prepare(nn.Sequential(copy.deepcopy(layer)).eval(), lambda m: m(batches[0]))
    found = calibrate(prepared, batches, lambda m, batch: m(batch))
    return found[prepared.sites[0].name]


def windows(layer: Any, x: Tensor) -> np.ndarray:
    """Return what each group's weights meet, [groups, positions, n], one window at a time."""
    dims = x.dim() - 2
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, pads, mode=mode).numpy()
    channels = padded.shape[1] // layer.groups
    spans = [
        range(0, n - d * (k - 1), s)
        for n, k, s, d in zip(
            padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    ]
    rows: list[list[np.ndarray]] = [[] for _ in range(layer.groups)]
    for sample, place in itertools.product(padded, itertools.product(*spans)):
        cut = tuple(
            slice(place[i], place[i] + layer.dilation[i] * (layer.kernel_size[i] - 1) + 1, d)
            for i, d in zip(range(dims), layer.dilation, strict=True)
        )
        for group in range(layer.groups):
            part = sample[group * channels : (group + 1) * channels]
            rows[group].append(part[:, *cut].ravel())
    return np.array(rows, dtype=np.float64)


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    (nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 2, groups=4, stride=2), (2, 4, 6, 6)),
    (nn.Conv2d(2, 2, 4, padding="same", padding_mode="reflect"), (1, 2, 6, 6)),
    (nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="circular"), (1, 2, 6, 6)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"), (1, 2, 4, 5)),
    (nn.Conv1d(3, 4, 3, padding=1, stride=2), (2, 3, 8)),
    (nn.Conv1d(4, 4, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"), (2, 4, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_the_moments_of_a_convolution_are_those_of_its_windows(layer, shape):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) + 0.2 for _ in range(2)]
    rows = np.concatenate([windows(layer, x) for x in batches], 1)
    expected = np.einsum("gpi,gpj->gij", rows, rows) / rows.shape[1]
    found = statistics_of(layer, *batches)
    assert np.allclose(found.moments, expected, rtol=1e-4, atol=1e-5)
    means = rows.mean(1)
    assert np.allclose(found.means, means, rtol=1e-4, atol=1e-6)
    about = expected - means[:, :, None] * means[:, None]
    assert np.allclose(found.second_moments(centered=True), about, rtol=1e-3, atol=1e-5)


def test_the_mean_of_a_large_batch_is_that_of_all_its_windows(monkeypatch):
    layer, x = nn.Conv2d(2, 3, 3, padding=1, stride=2), torch.randn(5, 2, 9, 8) + 1.0
    whole = statistics_of(layer, x)
    monkeypatch.setattr(module, "GRAM_ROWS", 16)
    few = statistics_of(layer, x)
    assert torch.allclose(few.means, whole.means)
    assert not torch.allclose(few.moments, whole.moments)
    assert torch.allclose(few.moments, whole.moments, atol=2.0)


def test_a_volume_has_means_too():
    layer, x = nn.Conv3d(1, 2, (1, 2, 2), dilation=(1, 2, 1)), torch.randn(2, 1, 2, 4, 3)
    # Two rows and two columns of outputs, with rows two apart in the kernel.
    columns = [x[:, 0, :, 2 * i : 2 * i + 2, j : j + 2].mean() for i in (0, 1) for j in (0, 1)]
    found = statistics_of(layer, x).means
    assert torch.allclose(found[0], torch.stack(columns), atol=1e-6)


@pytest.mark.parametrize("size", [(7, 100), (401408, 2048)])
def test_places_are_one_of_each_part_and_fall_on_all_columns(size):
    count, most = size
    found = module._scattered(count, most, torch.device("cpu"))
    assert len(found) == min(size)
    assert len(set(found.tolist())) == len(found)
    part = torch.arange(len(found)) * (count / len(found))
    assert bool(((found >= part.long()) & (found <= part + count / len(found))).all())
    if count > most:
        assert len(set((found % 112).tolist())) == 112


def test_the_moments_of_a_linear_layer_are_those_of_its_tokens():
    x = torch.randn(2, 3, 5)
    expected = np.einsum("pi,pj->ij", *[x.reshape(-1, 5).double().numpy()] * 2) / 6
    assert np.allclose(statistics_of(nn.Linear(5, 2), x).moments[0], expected, rtol=1e-4)


def test_the_moments_of_a_recurrent_weight_are_those_of_all_its_steps():
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    prepared = prepare(layer.eval(), lambda m: m(x))
    found = calibrate(prepared, [x], lambda m, batch: m(batch))
    with torch.no_grad():
        outputs, _ = layer(x)
    states = torch.cat([torch.zeros(2, 1, 4), outputs[:, :-1]], 1).reshape(-1, 4)
    inputs = x.reshape(-1, 3)
    for name, rows in (("weight_ih_l0", inputs), ("weight_hh_l0", states)):
        assert torch.allclose(found[name].moments[0], rows.T @ rows / 10, atol=1e-6)
        assert found[name].inputs.count == rows.numel()


def test_what_meets_no_weight_has_no_statistics_and_wide_inputs_have_a_diagonal(monkeypatch):
    found = statistics_of(nn.Embedding(4, 3), torch.tensor([1, 2]))
    assert (found.inputs, found.moments) == (None, None)
    assert found.keep(EVERYTHING).output_error(corrected=False) is None
    x = torch.randn(7, 5)
    full = statistics_of(nn.Linear(5, 2), x).moments
    monkeypatch.setattr(module, "GRAM_COLUMNS", 4)
    diagonal = statistics_of(nn.Linear(5, 2), x).moments
    assert torch.allclose(diagonal[0], full[0].diagonal(), atol=1e-6)


TRANSPOSED = [
    (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 6)),
    (nn.ConvTranspose1d(4, 6, 4, groups=2, stride=3, dilation=2), (2, 4, 5)),
    (nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1)), (2, 3, 5, 4)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2, dilation=(1, 2)), (2, 4, 3, 4)),
    (nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=(1, 2, 2), padding=(0, 0, 1)), (1, 2, 3, 2, 3)),
]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *CONVOLUTIONS,
        *TRANSPOSED,
        (nn.Conv3d(2, 4, 2, groups=2, stride=2), (2, 2, 4, 3, 4)),
        (nn.Linear(5, 3), (2, 4, 5)),
    ],
)
def test_moments_say_what_an_error_of_the_weight_adds_to_the_output(layer, shape):
    """The mean square of the layer's output on the error alone, without moments."""
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.3
    found = statistics_of(layer, x)
    error = copy.deepcopy(layer)
    error.weight.data, error.bias = torch.randn_like(error.weight), None
    with torch.no_grad():
        y = error(x)
    channels = y.shape[-1 if isinstance(layer, nn.Linear) else 1]
    axis = 1 if isinstance(layer, tuple(type(t) for t, _ in TRANSPOSED)) else 0
    delta = to_matrix(error.weight.detach(), axis)
    expected = y.double().square().mean() * channels
    whole = exact_output_error(delta, found.moments)
    assert float(whole) == pytest.approx(float(expected), rel=1e-3)
    about = found.output_error(corrected=False)
    assert float(about.of_blocks(delta, 1).sum()) == pytest.approx(float(expected), rel=1e-3)


def test_a_tied_embedding_is_calibrated_as_the_layer_that_multiplies_it():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.tensor([[0, 3, 6, 6]])
    rows = model.embed(ids)[0].detach()
    prepared = prepare(model, lambda m: m(ids))
    (found,) = calibrate(prepared, [ids], lambda m, batch: m(batch)).values()
    assert torch.allclose(found.moments[0], rows.T @ rows / 4, atol=1e-6)


NEEDS = [frozenset({need}) for need in Need]


@pytest.mark.parametrize("needs", [frozenset(), *NEEDS, EVERYTHING])
@pytest.mark.parametrize("layer", [nn.Linear(5, 2), nn.Conv2d(2, 3, 2)])
def test_what_is_asked_for_is_what_everything_would_have_given(layer, needs):
    x = torch.randn(6, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 4, 4)
    prepared = prepare(nn.Sequential(copy.deepcopy(layer)).eval(), lambda m: m(x))
    runs: list[None] = []

    def run(model: nn.Module, batch: Tensor) -> None:
        runs.append(None)
        model(batch)

    whole = calibrate(prepared, [x], run)["0"]
    del runs[:]
    for some in (calibrate(prepared, [x], run, {"0": needs})["0"], whole.keep(needs)):
        same(some, whole, needs)
    assert bool(runs) == bool(needs)


def same(some: SiteStatistics, whole: SiteStatistics, needs: frozenset[Need]) -> None:
    """Check each thing that is asked for, digit for digit, and that the rest is not to be had."""
    asks: dict[Need, Callable[[SiteStatistics], Any]] = {
        Need.RANGE: lambda s: s.distribution().counts.tolist(),
        Need.MEANS: lambda s: s.mean_input().tolist(),
        Need.OUTPUT_ERROR: lambda s: s.output_error(corrected=False).basis.tolist(),
        Need.CENTERED_OUTPUT_ERROR: lambda s: s.output_error(corrected=True).diagonal.tolist(),
        Need.MOMENTS: lambda s: s.second_moments(centered=False).tolist(),
    }
    for need, ask in asks.items():
        if need in needs:
            assert ask(some) == ask(whole)
        elif need not in some.has:
            with pytest.raises(MissingStatistics):
                ask(some)
    assert needs <= some.has


def test_nothing_that_was_not_collected_can_be_kept():
    x = torch.randn(3, 4)
    prepared = prepare(nn.Sequential(nn.Linear(4, 2)).eval(), lambda m: m(x))
    (found,) = calibrate(
        prepared, [x], lambda m, batch: m(batch), {"0": frozenset({Need.MEANS})}
    ).values()
    with pytest.raises(MissingStatistics, match="output"):
        found.keep(frozenset({Need.MEANS, Need.OUTPUT_ERROR}))


def test_the_narrow_sites_come_first_where_the_budget_is_short(monkeypatch):
    monkeypatch.setattr(module, "GRAM_BUDGET", 4 * (3 * 3 + 5 * 5))
    model, x = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3), nn.Linear(3, 2)), torch.randn(4, 8)
    prepared = prepare(model.eval(), lambda m: m(x))
    found = calibrate(prepared, [x], lambda m, batch: m(batch))
    assert [found[name].moments.dim() for name in ("0", "1", "2")] == [2, 3, 3]


def test_only_some_rows_of_a_large_batch_enter_the_moments(monkeypatch):
    monkeypatch.setattr(module, "GRAM_ROWS", 4)
    x = torch.arange(16.0)[:, None]
    found = statistics_of(nn.Linear(1, 1), x)
    assert found.moments.item() == pytest.approx((0 + 16 + 64 + 144) / 4)
    assert found.inputs.count == 16
    image = torch.randn(6, 1, 4, 4)
    assert statistics_of(nn.Conv2d(1, 1, 1), image).moments.item() < image.square().max()


@pytest.mark.parametrize(
    ("layer", "shape", "tokens"),
    [
        (nn.Linear(5, 2), (2, 3, 5), 6),
        (nn.Linear(5, 2), (5,), 1),
        (nn.Conv2d(3, 2, 1), (4, 3, 2, 2), 4),
        (nn.Conv1d(3, 2, 1), (4, 3, 2), 4),
        (nn.Conv1d(3, 2, 1), (3, 2), 1),
        (nn.ConvTranspose2d(3, 2, 1), (4, 3, 2, 2), 4),
    ],
)
def test_tokens_are_vectors_or_samples(layer, shape, tokens):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows = x.reshape(tokens, -1).double()
    found = statistics_of(layer, x).inputs
    assert found.tokens == tokens
    assert found.token_absmax_square == pytest.approx(rows.abs().amax(1).square().mean().item())
    spread = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    assert found.token_range_square == pytest.approx(spread.square().mean().item())
    assert (found.minimum, found.maximum) == (x.min().item(), x.max().item())


def test_every_batch_runs_once_in_float_and_nothing_is_left_behind(case, equal):
    prepared = case.prepared()
    before = case.run(prepared.model)
    calls, batches = [], iter(range(3))
    prepared.model.register_forward_hook(lambda *_: calls.append(1))

    def run(model, batch):
        assert torch.is_grad_enabled() is False
        return case.run(model)

    found = calibrate(prepared, batches, run)
    assert len(calls) == 3
    assert set(found) == {site.name for site in prepared.sites}
    for site in prepared.sites:
        assert (found[site.name].inputs is not None) == site.activation
    assert all(slot.observe is None for slot in prepared.slots.values())
    assert equal(case.run(prepared.model), before)


def test_code_that_fails_leaves_no_observer_behind():
    prepared = prepare(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError):
        calibrate(prepared, [0], lambda m, batch: 1 / batch)
    assert prepared.slots["weight"].observe is None


def test_statistics_taken_in_inference_mode_can_be_learned_from():
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)

    @torch.inference_mode()
    def fast(model, batch):
        return model(batch)

    prepared = prepare(layer, lambda m: m(x))
    moments = calibrate(prepared, [x, x], fast)["weight"].moments
    assert not moments.is_inference()
    same = calibrate(prepared, [x], lambda m, batch: m(batch))["weight"].moments
    assert torch.allclose(moments, same)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("everything", [True, False])
def test_an_activation_that_is_not_finite_is_a_failed_trial(bad, everything):
    x = torch.ones(2, 3)
    x[0, 0] = bad
    if everything:
        x[:] = bad
    with pytest.raises(TrialError, match="0: its input holds NaN or Inf"):
        statistics_of(nn.Linear(3, 2), x)


def test_empty_calls_are_no_calls():
    found = statistics_of(nn.Linear(3, 2), torch.ones(2, 3), torch.ones(0, 3))
    assert found.inputs.count == 6
    assert torch.equal(found.moments, torch.ones(1, 3, 3))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)])
def test_moments_of_some_rows_are_about_the_mean_of_those_rows(monkeypatch, layer):
    """Less the mean of all rows, they are of nothing that exists: eigenvalues below 0 come out."""
    monkeypatch.setattr(module, "GRAM_ROWS", 8)
    torch.manual_seed(0)
    x = 0.01 * torch.randn(500, 6) + 2.0
    pick = module._spread if isinstance(layer, nn.Linear) else module._scattered
    x[pick(500, 8, x.device)] -= 1.0  # rows that enter the moments are unlike the others
    if isinstance(layer, nn.Conv2d):
        x = x.T.reshape(1, 6, 20, 25).contiguous()
    found = statistics_of(layer, x)
    centered = found.second_moments(centered=True)[0].double()
    assert float(torch.linalg.eigvalsh(centered).min()) >= -1e-6 * float(centered.trace())
    assert torch.allclose(found.mean_input()[0], x.movedim(1, -1).reshape(-1, 6).mean(0), atol=1e-4)
    kept = found.keep(frozenset({Need.MOMENTS, Need.MEANS}))
    assert torch.equal(kept.second_moments(centered=True)[0].double(), centered)


@pytest.mark.parametrize("far", [0.0, 1e3, 3e4])
@pytest.mark.parametrize("wide", [False, True])
def test_inputs_far_from_0_keep_what_they_differ_by(monkeypatch, far, wide):
    """In float32, E[x·xᵀ] − μ·μᵀ of inputs about 30,000 holds nothing but rounding errors."""
    if wide:
        monkeypatch.setattr(module, "GRAM_COLUMNS", 4)
    torch.manual_seed(0)
    x = torch.randn(400, 6) + far * torch.rand(6)
    x[:, 0] = far  # and one that never differs
    found = statistics_of(nn.Linear(6, 2), x[:150], x[150:])
    exact = torch.cov(x.double().T, correction=0)
    expected = exact.diagonal() if wide else exact
    about = found.second_moments(centered=True)[0].double()
    assert torch.allclose(about, expected, rtol=1e-2, atol=2e-3)
    raw = x.double().T @ x.double() / 400
    whole = found.second_moments(centered=False)[0].double()
    assert torch.allclose(whole, raw.diagonal() if wide else raw, rtol=1e-4)
