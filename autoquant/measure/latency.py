"""How long a recipe takes, predicted from the times of its layers.

The model's time is what remains of the float model without its layers, plus the layers' times
(``layers`` measures both). Layers that are timed one by one find caches and memory in another state
than in the model; what that makes of their sum is fitted to one quantized model as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoquant.measure.speed import FLOAT, choices_of, seconds_of
from autoquant.nn.convert import Prepared
from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe
from autoquant.spec.space import SiteSpace

SLOPES = (0.5, 2.0)
"""Least and largest factor between layers timed one by one and in the model."""
TELLING = 0.1
"""Least share of the float model's time by which two models must differ to fit that factor."""


@dataclass(frozen=True)
class LayerTimes:
    """Seconds that one unit takes in one batch, for each speed class; ``shares`` by site.

    A site's choice accounts for its share of the time that the unit takes where all its sites take
    that choice: exact for one site, and for the same choice at all.
    """

    name: str
    shares: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the seconds that a recipe takes for one batch of ``samples`` (0: not known).

    ``float_seconds`` is the float model's measured time, ``rest`` the part of it that no layer
    accounts for; ``slope`` is how much longer layers take in the model than by themselves.
    """

    device: str
    samples: int
    float_seconds: float
    layers: tuple[LayerTimes, ...]
    slope: float = 1.0
    _by_site: dict[str, list[tuple[float, dict[str, float]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for layer in self.layers:
            times = dict(layer.seconds)
            for site, share in layer.shares.items():
                self._by_site.setdefault(site, []).append((share, times))

    @property
    def rest(self) -> float:
        """The float model's time without its layers; never negative."""
        layers = sum(row.seconds[FLOAT] for row in self.layers)
        return max(self.float_seconds - self.slope * layers, 0.0)

    def site_seconds(self, name: str, recipe: SiteRecipe) -> float:
        """Return what a site adds to the time under ``recipe``."""
        rows = self._by_site.get(name, ())
        return self.slope * sum(share * seconds_of(times, recipe) for share, times in rows)

    def fitted(self, sites: Mapping[str, SiteRecipe], measured: float) -> LatencyModel:
        """Return the model whose predictions are right for float and, nearly, for ``sites``.

        ``measured`` are the seconds that these take. Where the two hardly differ it stays as it is.
        """
        plain = replace(self, slope=1.0)
        gained = sum(
            plain.site_seconds(name, FLOAT_SITE) - plain.site_seconds(name, sites[name])
            for name in self._by_site
            if name in sites
        )
        if abs(gained) < TELLING * self.float_seconds:
            return plain
        low, high = SLOPES
        return replace(self, slope=min(max((self.float_seconds - measured) / gained, low), high))

    def seconds(self, sites: Mapping[str, SiteRecipe]) -> float:
        """Return the predicted time of a recipe."""
        return self.rest + sum(
            self.site_seconds(name, sites.get(name, FLOAT_SITE)) for name in self._by_site
        )

    def fastest(self, choices: Mapping[str, list[SiteRecipe]]) -> float:
        """Return the time of the fastest recipe of the space."""
        return self.rest + sum(
            min(self.site_seconds(name, recipe) for recipe in choices[name])
            for name in self._by_site
        )

    def evidence(self, predicted: float, measured: float | None = None) -> LatencyEvidence:
        """Return what a recipe says of its latency."""
        return LatencyEvidence(predicted, measured, self.float_seconds, self.samples, self.device)

    def plain(self) -> dict[str, Any]:
        """Return the table as a study keeps it."""
        rows = [
            {"name": row.name, "shares": dict(row.shares), "seconds": dict(row.seconds)}
            for row in self.layers
        ]
        head = {"device": self.device, "samples": self.samples}
        whole = {"float_seconds": self.float_seconds, "slope": self.slope}
        return {**head, **whole, "layers": rows}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> LatencyModel:
        """Return the table that ``plain`` wrote."""
        layers = tuple(LayerTimes(**row) for row in plain["layers"])
        head = plain["device"], plain["samples"], plain["float_seconds"]
        return cls(*head, layers, plain.get("slope", 1.0))


def site_choices(
    prepared: Prepared, spaces: Mapping[str, SiteSpace]
) -> dict[str, list[SiteRecipe]]:
    """Return one recipe for each speed class of each site."""
    return {s.name: choices_of(spaces[s.name], s.activation, s.matrix) for s in prepared.sites}
