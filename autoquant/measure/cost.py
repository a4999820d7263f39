"""What a recipe costs: size and bits, and on request latency and bit operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from autoquant.measure.latency import LatencyModel
from autoquant.measure.size import SizeModel
from autoquant.measure.units import Hook, Run, run_hooked
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.spec.costs import Costs
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe


@dataclass(frozen=True)
class BitOperations:
    """Multiplications × weight bits × activation bits of one batch; float counts 16 bits."""

    macs: Mapping[str, int]

    def site(self, name: str, recipe: SiteRecipe) -> float:
        """Return the bit operations of one site."""
        activation = FLOAT_BITS if recipe.activation is None else recipe.activation.bits
        return float(self.macs.get(name, 0)) * recipe.weight_bits * activation

    def total(self, sites: Mapping[str, SiteRecipe]) -> float:
        """Return the bit operations of a recipe."""
        return sum(self.site(name, sites.get(name, FLOAT_SITE)) for name in self.macs)


@dataclass(frozen=True)
class CostModel:
    """Costs of recipes by arithmetic alone; None where a search does not ask."""

    sizes: SizeModel
    latency: LatencyModel | None = None
    operations: BitOperations | None = None

    @property
    def indifferent(self) -> bool:
        """Whether nothing but the weights' width and scheme costs anything."""
        return self.latency is None and self.operations is None

    def price(self, kind: str, name: str, recipe: SiteRecipe) -> float:
        """Return what a site adds to the ``latency`` (seconds) or the ``bitops`` of a model."""
        if kind == "latency":
            assert self.latency is not None
            return self.latency.site_seconds(name, recipe)
        assert self.operations is not None
        return self.operations.site(name, recipe)

    def of(self, sites: Mapping[str, SiteRecipe]) -> Costs:
        """Return what a recipe costs."""
        return Costs(
            self.sizes.average_bits(sites),
            self.sizes.bytes(sites),
            None if self.latency is None else self.latency.seconds(sites),
            None if self.operations is None else self.operations.total(sites),
        )


def count_macs(prepared: Prepared, run: Run) -> BitOperations:
    """Count the multiplications that one batch makes with the weights of each site.

    A lookup makes none, and what the model's code multiplies outside a layer is not seen.
    """
    macs = {site.name: 0 for site in prepared.sites}
    hooks: dict[nn.Module, list[Hook]] = {}

    def counter(site: Site, name: str) -> Hook:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            macs[site.name] += _macs(site, name, module, args, kwargs)

        return count

    for site in prepared.sites:
        for path, name in site.users:
            hooks.setdefault(prepared.model.get_submodule(path), []).append(counter(site, name))

    def together(counters: list[Hook]) -> Hook:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for counter in counters:
                counter(module, args, kwargs)

        return count

    prepared.reset()
    run_hooked(prepared.model, run, {m: together(c) for m, c in hooks.items()})
    return BitOperations(macs)


def _macs(
    site: Site, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """Return the multiplications of one call of ``module`` with its parameter ``name``."""
    inputs = [*args, *kwargs.values()]
    if site.kind == "attention":
        keys = ("query", "key", "value")
        given = dict(zip(keys, args, strict=False)) | kwargs
        rows = [given[k].numel() // given[k].shape[-1] for k in keys]
        if name == "in_proj_weight":
            return site.numel // 3 * sum(rows)
        return site.numel * rows["qkv".index(name[0])]
    x = inputs[0]
    if isinstance(x, PackedSequence):
        x = x.data
    if site.kind == "embedding" or not isinstance(x, Tensor) or not x.numel():
        return 0
    if site.kind in ("conv", "conv_transpose"):
        assert isinstance(module, nn.modules.conv._ConvNd)
        spatial = len(module.kernel_size)
        samples = x.numel() // (module.in_channels * _product(x.shape[-spatial:]))
        if site.kind == "conv_transpose":  # each input meets each weight of its channel once
            return samples * _product(x.shape[-spatial:]) * site.numel
        return samples * _product(_conv_sizes(module, tuple(x.shape[-spatial:]))) * site.numel
    return x.numel() // x.shape[-1] * site.numel


def _conv_sizes(module: nn.modules.conv._ConvNd, sizes: tuple[int, ...]) -> list[int]:
    """Return the spatial sizes of a convolution's output."""
    pads = module._reversed_padding_repeated_twice[::-1]
    return [
        (n + pads[2 * i] + pads[2 * i + 1] - d * (k - 1) - 1) // s + 1
        for i, (n, k, s, d) in enumerate(
            zip(sizes, module.kernel_size, module.stride, module.dilation, strict=True)
        )
    ]


def _product(values: Any) -> int:
    result = 1
    for value in values:
        result *= int(value)
    return result
