"""One pass over the calibration data: all that every choice of every site needs to know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.observers.output_error import OutputError
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics
from autoquant.quant.activation import token_dims

GRAM_BUDGET = 1 << 30
"""Bytes that all second-moment matrices together may take; beyond, their diagonals serve."""
GRAM_COLUMNS = 4096
"""Widest input of which the whole second-moment matrix is kept."""
GRAM_ROWS = 2048
"""Most rows (tokens, positions) of one call that enter the second moments, evenly spread."""


@dataclass(frozen=True)
class SiteStatistics:
    """What the calibration pass saw at one site.

    ``inputs`` describes the activation, None where none meets the weight. ``moments`` is the mean
    of x·xᵀ over rows of the input as the weight sees it: float32 [groups, n, n], or its diagonal
    [groups, n], where n is the number of weights of an output channel; None without activation.
    ``means`` are those of x, [groups, n], where the layer has (or could have) a bias to correct.
    Tensors are on the device of the site's weight, where whatever they are multiplied with is.
    """

    inputs: TensorStatistics | None
    moments: Tensor | None
    means: Tensor | None = None

    @property
    def covariance(self) -> Tensor | None:
        """The moments about the mean: what is left to err where the bias is corrected."""
        if self.moments is None or self.means is None:
            return self.moments
        if self.moments.dim() == 2:
            return (self.moments - self.means.square()).clamp(min=0.0)
        return self.moments - self.means[:, :, None] * self.means[:, None, :]

    def output_error(self, *, corrected: bool) -> OutputError | None:
        """Return what an error of the weight does to the output; None where nothing is known.

        ``corrected`` says that the bias makes up for the mean.
        """
        return self._about_mean if corrected else self._about_zero

    @cached_property
    def _about_mean(self) -> OutputError | None:
        return None if self.covariance is None else OutputError.of(self.covariance)

    @cached_property
    def _about_zero(self) -> OutputError | None:
        return None if self.moments is None else OutputError.of(self.moments)


class _Recorder:
    def __init__(self, site: Site, module: nn.Module, *, full: bool) -> None:
        self.site = site
        self.module = module
        self.full = full
        self.collector = StatisticsCollector(token_dim=-1)
        self.total: Tensor | None = None
        self.rows = 0
        self.sum: Tensor | None = None
        self.windows = 0

    @torch.inference_mode(False)  # the user's code may be in it, but sums must stay writable
    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        dims = token_dims(self.site.kind, x.dim())
        # Tokens are rows: the collector takes its last axis for the features of one. Their order
        # does not matter, and in that of memory nothing is copied.
        last = x.dim() == 4 and len(dims) == 3 and not x.is_contiguous()
        tokens = x.permute(0, 2, 3, 1) if last else x
        self.collector.update(tokens.flatten(-len(dims)))
        if self.site.corrects:
            summed, count = input_sums(x, self.site, self.module)
            self.windows += count
            self.sum = summed if self.sum is None else self.sum.add_(summed)
        rows = input_rows(x, self.site, self.module)
        if rows is None:
            return
        self.rows += rows.shape[1]
        part = rows.mT @ rows if self.full else rows.square().sum(1)
        self.total = part if self.total is None else self.total.add_(part)

    def finish(self) -> SiteStatistics:
        inputs = self.collector.finish()
        if not inputs.finite:
            raise TrialError(f"{self.site.name}: its input holds NaN or Inf on calibration data")
        if self.collector.empty:
            return SiteStatistics(None, None)
        moments = None if self.total is None else self.total / max(self.rows, 1)
        means = None if self.sum is None else (self.sum / max(self.windows, 1)).float()
        return SiteStatistics(inputs, moments, means)


def input_sums(x: Tensor, site: Site, module: nn.Module) -> tuple[Tensor, int]:
    """Return the sum of all rows of the input as the weights see it, and how many there are.

    float64 [groups, n]; for linear layers and for convolutions of one to three dimensions. Samples
    are added up before they are cut into windows, so it costs one pass over the input.
    """
    if site.kind == "linear":
        flat = x.reshape(-1, x.shape[-1])
        return flat.sum(0, dtype=torch.float64)[None], flat.shape[0]
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    axes = len(module.kernel_size)
    x = x.reshape(-1, *x.shape[-axes - 1 :]).to(torch.float32)
    image = _windows(x.sum(0, keepdim=True), module)[0]  # [channels, *positions, *kernel]
    positions = tuple(range(1, axes + 1))
    summed = image.sum(positions, dtype=torch.float64)
    count = x.shape[0] * math.prod(image.shape[1 : axes + 1])
    return summed.reshape(module.groups, -1), count


def _windows(x: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Return what each output position sees of ``x``: a view of the padded input.

    [batch, channels, *positions, *kernel].
    """
    pads = list(module._reversed_padding_repeated_twice)
    if any(pads):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, pads, mode=mode)
    axes = len(module.kernel_size)
    for axis in range(axes):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        # The newest axis is the last one.
        x = x.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    return x


def input_rows(x: Tensor, site: Site, module: nn.Module) -> Tensor | None:
    """Return rows of the input as an output channel's weights see it: [groups, rows, n], float32.

    At most GRAM_ROWS rows, evenly spread. None where that view is not computed (3-d convolutions
    and transposed ones).
    """
    x = x.to(torch.float32)
    if site.kind in ("linear", "rnn", "attention"):
        flat = x.reshape(-1, x.shape[-1])
        return flat[_spread(flat.shape[0], GRAM_ROWS, flat.device)][None]
    if site.kind != "conv" or isinstance(module, nn.Conv3d):
        return None
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    axes = len(module.kernel_size)
    windows = _windows(x.reshape(-1, *x.shape[-axes - 1 :]), module)
    count = windows.shape[0] * math.prod(windows.shape[2 : axes + 2])
    index = _scattered(count, GRAM_ROWS, x.device)
    picked: list[Tensor] = []
    for size in reversed(windows.shape[2 : axes + 2]):
        picked.insert(0, index % size)
        index = index // size
    # Channels go last among the axes that stay, so that one index picks every window.
    rows = windows.movedim(1, axes + 1)[(index, *picked)].flatten(1)  # [rows, channels · kernel]
    return rows.unflatten(1, (module.groups, -1)).movedim(1, 0)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` indices, evenly spread over range(count)."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.arange(most, device=device) * count // most


def _scattered(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` indices of range(count), one of each equal part, at varied places.

    Steps of one size would fall on the same few columns of an image. Places follow the golden
    ratio: evenly spread, and the same every time.
    """
    if count <= most:
        return torch.arange(count, device=device)
    k = torch.arange(most, dtype=torch.float64)
    place = (k * 0.6180339887498949) % 1.0
    return ((k + place) * (count / most)).long().clamp_(max=count - 1).to(device)


def calibrate(
    prepared: Prepared,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
) -> Mapping[str, SiteStatistics]:
    """Run ``batches`` through the float model and return what every site saw.

    Raises TrialError where an activation is NaN or Inf.
    """
    prepared.reset()
    wide = _full_moments(prepared.sites)
    recorders = {}
    for site in prepared.sites:
        path, _ = site.users[-1]
        module = prepared.model.get_submodule(path)
        recorders[site.name] = _Recorder(site, module, full=site.name in wide)
        prepared.slots[site.name].observe = recorders[site.name]
    try:
        with torch.no_grad():
            for batch in batches:
                run(prepared.model, batch)
    finally:
        for slot in prepared.slots.values():
            slot.observe = None
    return {name: recorder.finish() for name, recorder in recorders.items()}


def _full_moments(sites: Iterable[Site]) -> set[str]:
    """Return the sites whose whole second-moment matrix fits the budget, narrow ones first."""
    chosen: set[str] = set()
    left = GRAM_BUDGET
    for site in sorted(sites, key=lambda s: s.matrix[1]):
        size = 4 * site.groups * site.matrix[1] ** 2
        if site.matrix[1] <= GRAM_COLUMNS and size <= left:
            chosen.add(site.name)
            left -= size
    return chosen
