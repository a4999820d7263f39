"""What a search found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.selection.confirmation import Finalist
from autoquant.session.costs import LatencyCheck
from autoquant.spec.recipe import Recipe
from autoquant.spec.verdict import Verdict
from autoquant.study.rank_correlation import Fidelity


@dataclass(frozen=True)
class Speed:
    """How fast candidates were measured: how many, in how many seconds, and what computed them.

    ``layers`` are the seconds that quantized layers took, or on an accelerator their calls, by
    backend.
    """

    candidates: int
    seconds: float
    layers: Mapping[str, float]

    @property
    def per_second(self) -> float:
        """Candidates a second, with all that a trial takes."""
        return self.candidates / max(self.seconds, 1e-9)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the layers' time that each backend computed."""
        total = sum(self.layers.values())
        return {name: seconds / total for name, seconds in self.layers.items() if total}


@dataclass(frozen=True)
class SearchResult:
    """What a search found. ``holds`` says whether the confirmed drop is within the maximum.

    ``max_latency`` is in seconds; ``latency_checks`` compare predictions with whole models.
    ``done`` says why a search ended of itself. ``verdict`` is on the maximum drop that was asked
    for (``verdict.outcome``: PASS, FAIL or NOT PROVEN), None for a search by a budget alone.
    ``skipped`` says what the timeout left no time for. ``tuned`` counts the trials whose layers
    were fitted to each other, and ``notes`` say why none, or no more, were.
    """

    study: str
    recipe: Recipe
    recipe_path: Path
    holds: bool
    max_drop: float
    trials: Mapping[str, int]
    finalists: tuple[Finalist, ...]
    seconds: float
    device: str
    speed: Speed
    max_latency: float | None = None
    latency_checks: tuple[LatencyCheck, ...] = ()
    done: str | None = None
    fidelity: Fidelity | None = None
    verdict: Verdict | None = None
    skipped: tuple[str, ...] = ()
    tuned: int = 0
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return the result as the JSON object of ``autoquant search --json``."""
        evidence = self.recipe.evidence
        assert evidence is not None
        result, how = evidence.reported, self.recipe.reconstruction
        return {
            "study": self.study,
            "recipe": str(self.recipe_path),
            "metric": {
                "name": evidence.metric,
                "float": result.baseline,
                "quantized": result.quantized,
                "drop": result.drop,
                "interval": list(result.interval) if result.interval else None,
                "higher_is_better": evidence.higher_is_better,
            },
            "searched": {
                "samples": evidence.search.samples,
                "float": evidence.search.baseline,
                "quantized": evidence.search.quantized,
                "drop": evidence.search.drop,
            },
            "verdict": None if evidence.verdict is None else evidence.verdict.plain(),
            "rest": self.recipe.rest,
            "average_weight_bits": evidence.average_weight_bits,
            "layer_weight_bits": evidence.of_layers,
            "size_bytes": evidence.size_bytes,
            "float_size_bytes": evidence.float_size_bytes,
            "trials": dict(self.trials),
            "tuning": {
                "trials": self.tuned,
                "chosen": None if how is None else how.plain(),
                "notes": list(self.notes),
            },
            "seconds": self.seconds,
            "device": self.device,
            "candidates_per_second": round(self.speed.per_second, 4),
            "layers_computed_by": {k: round(v, 4) for k, v in self.speed.shares.items()},
            **self._learned(),
            **self._costs(),
        }

    def _learned(self) -> dict[str, Any]:
        """Return why the search ended of itself, and how well the profile foretold its trials."""
        found: dict[str, Any] = {}
        if self.done is not None:
            found["done"] = self.done
        if self.skipped:
            found["skipped"] = list(self.skipped)
        if self.fidelity is not None:
            found["profile"] = dataclasses.asdict(self.fidelity)
        return found

    def _costs(self) -> dict[str, Any]:
        """Return latency and bit operations, where they were asked for."""
        evidence = self.recipe.evidence
        assert evidence is not None
        found: dict[str, Any] = {}
        if evidence.latency is not None:
            checks = [check.plain() for check in self.latency_checks]
            more = {"max_seconds": self.max_latency, "checks": checks}
            found["latency"] = evidence.latency.plain() | more
        if evidence.bit_operations is not None:
            found["bit_operations"] = evidence.bit_operations
            found["float_bit_operations"] = evidence.float_bit_operations
        return found
