"""One pass over the calibration data: all that every choice of every site needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
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
    """

    inputs: TensorStatistics | None
    moments: Tensor | None


class _Recorder:
    def __init__(self, site: Site, module: nn.Module, *, full: bool) -> None:
        self.site = site
        self.module = module
        self.full = full
        self.collector = StatisticsCollector(token_dim=-1)
        self.total: Tensor | None = None
        self.rows = 0

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
        moments = None if self.total is None else (self.total / max(self.rows, 1)).cpu()
        return SiteStatistics(inputs, moments)


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
    if isinstance(module, nn.Conv1d):
        x = x.reshape(-1, *x.shape[-2:])[:, :, None]
        kernel, stride = (1, *module.kernel_size), (1, *module.stride)
        dilation = (1, *module.dilation)
    else:
        x = x.reshape(-1, *x.shape[-3:])
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    groups = module.groups
    if isinstance(module, nn.Conv2d) and _is_pointwise(module):
        flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        flat = flat[_spread(flat.shape[0], GRAM_ROWS, flat.device)]
        return flat.unflatten(1, (groups, -1)).movedim(1, 0)
    left, right, top, bottom = _padding(module)
    positions = x.shape[-1] * x.shape[-2] // (stride[0] * stride[1])
    x = x[_spread(x.shape[0], max(1, GRAM_ROWS // max(positions, 1)), x.device)]
    if any((left, right, top, bottom)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, (left, right, top, bottom), mode=mode)
    columns = F.unfold(x, kernel, dilation=dilation, padding=0, stride=stride)
    columns = columns[..., _spread(columns.shape[-1], GRAM_ROWS // x.shape[0] or 1, x.device)]
    n = columns.shape[1] // groups
    return columns.unflatten(1, (groups, n)).permute(1, 0, 3, 2).reshape(groups, -1, n)


def _is_pointwise(module: nn.Conv2d) -> bool:
    """Return whether every position of the input is one row of what the weights see."""
    ones = set(module.kernel_size) == {1} and set(module.stride) == {1}
    return ones and not any(module._reversed_padding_repeated_twice)


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) as F.pad takes them."""
    pads = list(module._reversed_padding_repeated_twice)
    return (*pads, 0, 0) if len(pads) == 2 else tuple(pads)  # type: ignore[return-value]


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` indices, evenly spread over range(count)."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.arange(most, device=device) * count // most


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
