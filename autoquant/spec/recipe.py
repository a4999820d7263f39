"""A recipe: what every layer of one model becomes, as an immutable value.

It is the only thing that carries configuration about a layer: samplers make recipes, conversion
applies them, YAML stores them, reports read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Correction, Reconstruction, Rounding
from autoquant.spec.verdict import Verdict

VERSION = 2
"""Version of the YAML format that is written."""
READABLE = (1, 2)
"""Versions that are read; a file of another one is refused."""

FLOAT32 = "float32"
RESTS = (FLOAT32, "bf16")
"""What stays in float may be computed in: as the model is, or bfloat16."""


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How one weight is quantized: its grid, and how it is brought there. ``bits`` is 2 … 8."""

    bits: int
    granularity: str = "per_channel"
    scheme: str = "symmetric"
    calibration: str = "max"
    rounding: Rounding = NEAREST

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.scheme == "symmetric"


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How the activation that meets a weight is quantized. ``bits`` is 2 … 8.

    ``scale`` and ``zero_point`` are the calibrated numbers of a static quantizer; None where they
    are computed at run time (per token) or not calibrated yet.
    """

    bits: int
    granularity: str = "per_tensor"
    scheme: str = "asymmetric"
    calibration: str = "max"
    scale: float | None = None
    zero_point: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.scheme == "symmetric"

    @property
    def dynamic(self) -> bool:
        """Whether the scale is computed at run time, for each token."""
        return self.granularity == "per_token"

    def uncalibrated(self) -> ActivationScheme:
        """Return the same scheme without its numbers: what a search chose, not what it measured."""
        if self.scale is None and self.zero_point is None:
            return self  # studies of many layers ask this thousands of times a trial
        return replace(self, scale=None, zero_point=None)


@dataclass(frozen=True, slots=True)
class SiteRecipe:
    """What one site becomes; None means that it stays in float (16 bits).

    ``correction`` is what is done to the rest of the layer for the errors of its rounded weight.
    ``learned`` is the digest of tensors in the recipe's learned file, where the weight and the bias
    were learned together with other layers and can't be made anew from one alone; "" for none.
    """

    weight: WeightScheme | None = None
    activation: ActivationScheme | None = None
    correction: Correction = UNCORRECTED
    learned: str = ""

    @property
    def weight_bits(self) -> int:
        """Bits a weight takes, without its scales."""
        return self.weight.bits if self.weight else FLOAT_BITS

    def canonical(self) -> SiteRecipe:
        """Return the same recipe in its one spelling, with what has no effect left out.

        A per-token scale is computed from the token's own range, so its calibration is ``max``;
        there is nothing to correct where the weight stays in float.
        """
        activation = self.activation
        if activation is not None and activation.dynamic:
            activation = replace(activation, calibration="max", scale=None, zero_point=None)
        correction = self.correction if self.weight is not None else UNCORRECTED
        learned = self.learned if self.weight is not None else ""
        same = (self.activation, self.correction, self.learned)
        if (activation, correction, learned) == same:
            return self
        return SiteRecipe(self.weight, activation, correction, learned)

    def uncalibrated(self) -> SiteRecipe:
        """Return the same choices without calibrated numbers."""
        activation = None if self.activation is None else self.activation.uncalibrated()
        return self if activation is self.activation else replace(self, activation=activation)


FLOAT_SITE = SiteRecipe()


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a recipe is for."""

    name: str
    sha256: str


@dataclass(frozen=True)
class SplitResult:
    """The metric of the float and the quantized model on one split of the data."""

    samples: int
    baseline: float
    quantized: float
    drop: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Evidence:
    """What was measured of a recipe: the metric, the split each number came from, the size.

    ``confirm`` is None where the task could not be split; then the drop was measured on the data
    that the search saw. ``latency`` and the bit operations of one batch are None where the search
    was not asked for them. ``verdict`` is on the claim that the reported drop is within the
    maximum, None where nobody claimed it. ``average_weight_bits`` is of all weights of the model,
    ``layer_weight_bits`` of the recipe's layers alone, None where that is the same.
    """

    metric: str
    higher_is_better: bool
    search: SplitResult
    confirm: SplitResult | None
    average_weight_bits: float
    size_bytes: int
    float_size_bytes: int
    latency: LatencyEvidence | None = None
    bit_operations: float | None = None
    float_bit_operations: float | None = None
    verdict: Verdict | None = None
    layer_weight_bits: float | None = None

    @property
    def reported(self) -> SplitResult:
        """The result to report: the confirmed one where there is one."""
        return self.confirm or self.search

    @property
    def of_layers(self) -> float:
        """The average width of the weights of the recipe's layers."""
        if self.layer_weight_bits is None:
            return self.average_weight_bits
        return self.layer_weight_bits


@dataclass(frozen=True)
class LearnedFile:
    """The file beside a recipe that holds what was learned, and the digest of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """Site name → SiteRecipe, with the model it is for and what was measured.

    ``folded`` maps each BatchNorm that conversion folds to the layer that takes it in;
    ``seed`` fixes what learning draws at random. ``reconstruction`` says how layers were learned
    together, and ``learned`` where the result is. ``transforms`` maps a layer to what its
    input is transformed by (``quant.transforms``): ``hadamard_64``, or factors, a letter for each
    input channel. ``rest`` is the format of all that stays in float, one of RESTS.
    """

    sites: Mapping[str, SiteRecipe]
    model: ModelIdentity | None = None
    evidence: Evidence | None = None
    folded: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    reconstruction: Reconstruction | None = None
    learned: LearnedFile | None = None
    transforms: Mapping[str, str] = field(default_factory=dict)
    rest: str = FLOAT32

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", MappingProxyType(dict(self.transforms)))
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "folded", MappingProxyType(dict(self.folded)))

    def __hash__(self) -> int:
        return hash(self.key())

    def key(self) -> str:
        """Return a digest of the choices alone: equal keys, equal models within one study."""
        return choices_key(self.sites)

    def with_sites(self, sites: Mapping[str, SiteRecipe]) -> Recipe:
        """Return the same recipe with other sites."""
        return replace(self, sites=sites)


def choices_key(sites: Mapping[str, SiteRecipe]) -> str:
    """Return a digest of per-site choices, whatever their order and calibrated numbers."""
    rows = {name: _plain(site.canonical().uncalibrated()) for name, site in sites.items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _plain(site: SiteRecipe) -> list[Any]:
    w, a = site.weight, site.activation
    return [
        None if w is None else [w.bits, w.granularity, w.scheme, w.calibration, w.rounding.plain()],
        None if a is None else [a.bits, a.granularity, a.scheme, a.calibration],
        site.correction.plain(),
        site.learned,
    ]
