"""How large a quantized model is, counted exactly as it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoquant.nn.convert import Prepared
from autoquant.nn.fold import without_norms
from autoquant.nn.sites import Site
from autoquant.quant.packing import packed_columns
from autoquant.spec.costs import average_bits
from autoquant.spec.granularity import block_size
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe, WeightScheme


def weight_bytes(site: Site, scheme: WeightScheme) -> int:
    """Return the bytes of a packed weight: integers, float32 scales, int8 zero points."""
    rows, columns = site.matrix
    block = math.prod(block_size(scheme.granularity, site.matrix))
    blocks = rows * columns // block
    zero_points = 0 if scheme.symmetric else blocks
    return rows * packed_columns(columns, scheme.bits) + 4 * blocks + zero_points


def float_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes(t) for t in tensors.values())


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of what a tensor holds; of a sparse one those of indices and values."""
    if tensor.layout is not torch.strided:
        coordinates = tensor.detach().to_sparse_coo().coalesce()
        return coordinates.indices().nbytes + coordinates.values().nbytes
    return tensor.numel() * tensor.element_size()


class SizeModel:
    """Sizes of recipes of one prepared model, from its shapes alone.

    ``rest_weights`` are the weights among what no recipe changes.
    """

    def __init__(self, prepared: Prepared, float_size_bytes: int) -> None:
        self.float_size_bytes = float_size_bytes
        self.sites = prepared.sites
        self._float = {
            s.name: s.numel * prepared.slots[s.name].parameter.element_size()
            for s in prepared.sites
        }
        with without_norms(prepared.model):
            self._rest = float_bytes(prepared.model) - sum(self._float.values())
        self._slots = prepared.slots
        self.rest_weights = sum(part.weights for part in prepared.float_parts)

    @property
    def rest(self) -> int:
        """The bytes of all that no recipe changes; what transforms inputs is in every recipe."""
        return self._rest + sum(self._transform(site) for site in self.sites)

    def bytes(self, sites: Mapping[str, SiteRecipe]) -> int:
        """Return the bytes of the model as it is saved with this recipe."""
        total = self._rest
        for site in self.sites:
            recipe = sites.get(site.name, FLOAT_SITE)
            scheme = recipe.weight
            total += self._float[site.name] if scheme is None else weight_bytes(site, scheme)
            if scheme is not None or recipe.activation is not None:
                total += self._transform(site)
        return total

    def _transform(self, site: Site) -> int:
        """Return the bytes of what transforms the input of a site."""
        transform = self._slots[site.name].transform
        return 0 if transform is None else transform.nbytes

    def average_bits(self, sites: Mapping[str, SiteRecipe]) -> float:
        """Return the average width of all weights of the model; one left in float counts 16."""
        return average_bits(self._widths(sites), self.rest_weights)

    def layer_bits(self, sites: Mapping[str, SiteRecipe]) -> float:
        """Return the average width of the layers that a recipe can change, and of nothing else."""
        return average_bits(self._widths(sites), 0)

    def _widths(self, sites: Mapping[str, SiteRecipe]) -> list[tuple[int, int]]:
        return [(s.numel, sites.get(s.name, FLOAT_SITE).weight_bits) for s in self.sites]
