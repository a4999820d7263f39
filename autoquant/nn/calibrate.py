"""One pass over the calibration data: all that every choice of every site needs to know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from autoquant.spec.needs import EVERYTHING, Need, output_error_need

GRAM_BUDGET = 1 << 30
"""Bytes that all second-moment matrices together may take; beyond, their diagonals serve."""
GRAM_COLUMNS = 4096
"""Widest input of which the whole second-moment matrix is kept."""
GRAM_ROWS = 2048
"""Most rows (tokens, positions) of one call that enter the second moments, evenly spread."""


class MissingStatistics(LookupError):
    """Something was asked of calibration that it did not collect, or did not keep."""


@dataclass(frozen=True)
class SiteStatistics:
    """What the calibration pass saw at one site.

    ``inputs`` describes the activation, None where none meets the weight. ``spread`` is the mean of
    (x − c)·(x − c)ᵀ over rows of the input as the weight sees it: float32 [groups, n, n], or its
    diagonal [groups, n], where n is the number of weights of an output channel; None without
    activation. c, ``centers`` [groups, n], is the mean of those very rows, None for 0.
    ``means`` are those of x, [groups, n], where the layer has (or could have) a bias to correct,
    over all rows, of which ``spread`` may have fewer.
    Tensors are on the device of the site's weight, where whatever they are multiplied with is.

    ``has`` says what of it was collected and kept: asking for anything else raises
    MissingStatistics. ``errors`` are what was made of the moments, by whether they are about the
    mean. ``reached`` says whether an activation has met the weight: None is none at all,
    False none but empty ones.
    """

    inputs: TensorStatistics | None
    spread: Tensor | None
    means: Tensor | None = None
    has: frozenset[Need] = EVERYTHING
    errors: dict[bool, OutputError | None] = field(default_factory=dict, repr=False)
    reached: bool | None = True
    centers: Tensor | None = None

    @property
    def moments(self) -> Tensor | None:
        """The mean of x·xᵀ, of the shape of ``spread``."""
        if self.spread is None or self.centers is None:
            return self.spread
        if self.spread.dim() == 2:
            return self.spread + self.centers.square()
        return self.spread + self.centers[:, :, None] * self.centers[:, None, :]

    def distribution(self) -> TensorStatistics | None:
        """Return what the activation's numbers are like; None where none meets the weight."""
        self._check(Need.RANGE)
        return self.inputs

    def mean_input(self) -> Tensor | None:
        """Return ``means``; None where the layer has no bias to correct."""
        self._check(Need.MEANS)
        return self.means

    def second_moments(self, *, centered: bool) -> Tensor | None:
        """Return the moments, or those about the mean: all that errs where the bias is corrected.

        None where no activation meets the weight, whose rows are read one by one.
        """
        self._check(Need.MOMENTS)
        if not centered or self.spread is None:
            return self.moments
        if self.centers is None:
            raise MissingStatistics("moments about the mean of a layer without a mean")
        return self.spread

    def output_error(self, *, corrected: bool) -> OutputError | None:
        """Return what an error of the weight does to the output; ``corrected`` takes off the mean.

        None where no activation meets the weight.
        """
        if corrected not in self.errors:
            self._check(output_error_need(corrected))
            moments = self.second_moments(centered=corrected)
            self.errors[corrected] = None if moments is None else OutputError.of(moments)
        return self.errors[corrected]

    def keep(self, needs: frozenset[Need]) -> SiteStatistics:
        """Return what ``needs`` ask for, and nothing else: moments may take a gigabyte."""
        missing = needs - self.has
        if missing:
            raise MissingStatistics(", ".join(sorted(need.value for need in missing)))
        wanted = [c for c in (False, True) if output_error_need(c) in needs]
        return SiteStatistics(
            self.inputs if Need.RANGE in needs else None,
            self.spread if Need.MOMENTS in needs else None,
            self.means if Need.MEANS in needs else None,
            needs,
            {c: self.output_error(corrected=c) for c in wanted},
            self.reached,
            self.centers if Need.MOMENTS in needs else None,
        )

    def _check(self, need: Need) -> None:
        if need not in self.has:
            raise MissingStatistics(need.value)


_OF_MOMENTS = frozenset({Need.OUTPUT_ERROR, Need.CENTERED_OUTPUT_ERROR, Need.MOMENTS})


class _Recorder:
    def __init__(
        self, site: Site, module: nn.Module, needs: frozenset[Need], *, full: bool
    ) -> None:
        self.site = site
        self.module = module
        self.full = full
        if Need.CENTERED_OUTPUT_ERROR in needs:
            needs |= {Need.MEANS}
        if needs & _OF_MOMENTS:
            needs |= {Need.MOMENTS, Need.OUTPUT_ERROR}
        self.needs = needs
        self.collector = StatisticsCollector(token_dim=-1)
        self.total: Tensor | None = None
        self.rows = 0
        self.sum: Tensor | None = None
        self.windows = 0
        self.off_sum: Tensor | None = None
        self.origin: Tensor | None = None
        self.reached: bool | None = None

    @torch.inference_mode(False)  # the user's code may be in it, but sums must stay writable
    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        self.reached = bool(self.reached) or x.numel() > 0
        if x.numel() == 0:
            return
        dims = token_dims(self.site.kind, x.dim())
        # Tokens are rows: the collector takes its last axis for the features of one. Their order
        # does not matter, and in that of memory nothing is copied.
        last = x.dim() == 4 and len(dims) == 3 and not x.is_contiguous()
        tokens = x.permute(0, 2, 3, 1) if last else x
        if Need.RANGE in self.needs:
            self.collector.update(tokens.flatten(-len(dims)))
        if Need.MEANS in self.needs and self.site.corrects:
            summed, count = input_sums(x, self.site, self.module)
            self.windows += count
            self.sum = summed if self.sum is None else self.sum.add_(summed)
        if Need.MOMENTS not in self.needs:
            return
        rows = input_rows(x, self.site, self.module)
        self.rows += rows.shape[1]
        if self.origin is None:
            # Near the mean, so that what is left of inputs far from 0 is not lost in float32.
            self.origin = rows.mean(1)
            self.off_sum = torch.zeros_like(self.origin, dtype=torch.float64)
        assert self.off_sum is not None
        rows = rows - self.origin[:, None]
        self.off_sum += rows.sum(1)
        part = rows.mT @ rows if self.full else rows.square().sum(1)
        self.total = part if self.total is None else self.total.add_(part)

    def finish(self) -> SiteStatistics:
        inputs = self.collector.finish()
        spread, centers = self._spread()
        means = None if self.sum is None else (self.sum / max(self.windows, 1)).float()
        numbers = [t for t in (spread, centers, means) if t is not None]
        if not (inputs.finite and all(bool(t.isfinite().all()) for t in numbers)):
            raise TrialError(f"{self.site.name}: its input holds NaN or Inf on calibration data")
        seen = None if self.collector.empty else inputs
        return SiteStatistics(
            seen, spread, means, self.needs, reached=self.reached, centers=centers
        )

    def _spread(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the moments about the rows' mean, and that; about 0 where no mean is taken off."""
        if self.total is None or self.origin is None or self.off_sum is None:
            return None, None
        off = (self.off_sum / self.rows).float()
        mean = self.origin + self.off_sum / self.rows
        beyond = off.square() if self.total.dim() == 2 else off[:, :, None] * off[:, None, :]
        about = SiteStatistics(None, self.total / self.rows - beyond, centers=mean.float())
        if self.site.corrects:
            return about.spread, about.centers
        assert about.moments is not None
        return apart(about.moments, self.site), None


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
    image = _padded(_over_samples(x)[None].double(), module)[0]  # [channels, *spatial]
    count = x.shape[0]
    for axis in range(axes):
        image = _unfolded(image, 1, axis, module)  # the axis that is next, its kernel's behind
        count *= image.shape[1]
        image = image.sum(1)
    return image.reshape(module.groups, -1), count


def _over_samples(x: Tensor) -> Tensor:
    """Return the sum over samples; torch takes 20 times as long where channels are last."""
    if x.dim() == 4 and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).sum(0).permute(2, 0, 1)
    return x.sum(0)


def _windows(x: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Return what each output position sees of ``x``: a view of the padded input.

    [batch, channels, *positions, *kernel].
    """
    x = _padded(x, module)
    for axis in range(len(module.kernel_size)):
        x = _unfolded(x, 2 + axis, axis, module)
    return x


def _padded(x: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Return images as a convolution pads them."""
    pads = list(module._reversed_padding_repeated_twice)
    if not any(pads):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pads, mode=mode)


def _unfolded(
    x: Tensor, where: int, axis: int, module: nn.Conv1d | nn.Conv2d | nn.Conv3d
) -> Tensor:
    """Return a view in which a spatial axis, the one at ``where``, is of positions.

    What the kernel sees from each of them along that axis is last.
    """
    span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
    return x.unfold(where, span, module.stride[axis])[..., :: module.dilation[axis]]


def _transposed_windows(
    x: Tensor, module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
) -> Tensor:
    """Return what each output position of a transposed convolution sees of ``x``, the same way.

    It is a convolution, by the flipped kernel, of the input with stride − 1 zeros between numbers.
    """
    axes = len(module.kernel_size)
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    grid = tuple(slice(None, None, s) for s in module.stride)
    spread[:, :, *grid] = x
    pads: list[int] = []
    for axis in reversed(range(axes)):
        left = module.dilation[axis] * (module.kernel_size[axis] - 1) - int(module.padding[axis])
        pads += [left, left + module.output_padding[axis]]
    x = F.pad(spread, pads)
    for axis in range(axes):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, 1)[..., :: module.dilation[axis]]
    return x.flip(tuple(range(-axes, 0)))


def input_rows(x: Tensor, site: Site, module: nn.Module, most: int | None = None) -> Tensor:
    """Return rows of the input as an output channel's weights see it: [groups, rows, n], float32.

    At most ``most`` rows (None: GRAM_ROWS), evenly spread, and the same ones of inputs of the same
    shape. An output channel's weights of a transposed convolution
    are those of all its groups, so that it counts as one group (see ``apart``).
    """
    x = x.to(torch.float32)
    most = GRAM_ROWS if most is None else most
    if not site.kind.startswith("conv"):
        flat = x.reshape(-1, x.shape[-1])
        return flat[_spread(flat.shape[0], most, flat.device)][None]
    axes = len(module.kernel_size)  # type: ignore[arg-type]
    x = x.reshape(-1, *x.shape[-axes - 1 :])
    groups = 1
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        windows = _transposed_windows(x, module)
    else:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        windows, groups = _windows(x, module), module.groups
    count = windows.shape[0] * math.prod(windows.shape[2 : axes + 2])
    index = _scattered(count, most, x.device)
    picked: list[Tensor] = []
    for size in reversed(windows.shape[2 : axes + 2]):
        picked.insert(0, index % size)
        index = index // size
    # Channels go last among the axes that stay, so that one index picks every window.
    rows = windows.movedim(1, axes + 1)[(index, *picked)].flatten(1)  # [rows, channels · kernel]
    return rows.unflatten(1, (groups, -1)).movedim(1, 0)


def count_rows(x: Tensor, site: Site, module: nn.Module) -> int:
    """Return how many rows the whole input has, as an output channel's weights see it."""
    if not site.kind.startswith("conv"):
        return x.numel() // x.shape[-1]
    axes = len(module.kernel_size)  # type: ignore[arg-type]
    one = x.reshape(-1, *x.shape[-axes - 1 :])
    windows = _windows(one[:1], module)  # type: ignore[arg-type]
    return one.shape[0] * math.prod(windows.shape[2 : axes + 2])


def apart(moments: Tensor, site: Site) -> Tensor:
    """Return moments [1, n, n] of a transposed convolution without those of different groups.

    What two groups add goes to different outputs.
    """
    if site.kind != "conv_transpose" or site.groups == 1 or moments.dim() == 2:
        return moments
    size = moments.shape[-1] // site.groups
    mask = torch.block_diag(*[moments.new_ones(size, size)] * site.groups)
    return moments * mask


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
    needs: Mapping[str, frozenset[Need]] | None = None,
) -> Mapping[str, SiteStatistics]:
    """Run ``batches`` through the float model and return what every site saw.

    ``needs`` says what has to be known of each site, None all of every one; where nothing has,
    nothing is run. What is found does not depend on what else is asked for. Raises TrialError
    where an activation is NaN or Inf.
    """
    prepared.reset()
    wide = _full_moments(prepared.sites)
    recorders = {}
    for site in prepared.sites:
        asked = EVERYTHING if needs is None else needs.get(site.name, frozenset())
        path, _ = site.users[-1]
        module = prepared.model.get_submodule(path)
        recorders[site.name] = _Recorder(site, module, asked, full=site.name in wide)
    if not any(recorder.needs for recorder in recorders.values()):
        return {name: recorder.finish() for name, recorder in recorders.items()}
    for name, recorder in recorders.items():
        prepared.slots[name].observe = recorder
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
