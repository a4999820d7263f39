"""Tables of recipes, trials and studies, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from autoquant.search.ledger import REASON
from autoquant.search.trials import measured
from autoquant.spec.recipe import Recipe, SiteRecipe

if TYPE_CHECKING:
    from autoquant.search.preflight import Preflight

FEWEST_SHARE = 0.0005
"""Float parts below this share of the parameters are summed up in one line."""


def megabytes(size: float) -> str:
    """Return a size in MB or kB."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def plain_number(value: float) -> str:
    """Return a metric's number, short."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def describe_weight(site: SiteRecipe) -> tuple[str, str]:
    """Return (bits, how) of a weight."""
    w = site.weight
    if w is None:
        return "16", "float"
    return str(w.bits), f"{w.granularity} {w.scheme} {w.calibration}"


def describe_activation(site: SiteRecipe) -> tuple[str, str]:
    """Return (bits, how) of an activation."""
    a = site.activation
    if a is None:
        return "16", "float"
    if a.dynamic:
        return str(a.bits), f"{a.granularity} {a.scheme}"
    return str(a.bits), f"{a.granularity} {a.scheme} {a.calibration}"


def layers_table(recipe: Recipe) -> Table:
    """Return what was chosen for each layer."""
    table = Table(title="recipe", title_justify="left")
    for name in ("layer", "W", "weight", "A", "activation", "learning rate"):
        table.add_column(name, no_wrap=name == "layer")
    for name, site in recipe.sites.items():
        rate = "" if site.learning_rate is None else f"{site.learning_rate:.3g}"
        table.add_row(name, *describe_weight(site), *describe_activation(site), rate)
    return table


def trials_table(trials: Sequence[FrozenTrial], title: str) -> Table:
    """Return a table of trials: what each measured, or why it failed."""
    table = Table(title=title, title_justify="left")
    for name in ("trial", "state", "metric", "drop", "bits", "size", "feasible", "seconds"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for trial in trials:
        m = trial.user_attrs.get("measured")
        state = trial.state.name.lower()
        if m is None:
            reason = trial.user_attrs.get(REASON, "")
            table.add_row(str(trial.number), f"{state}: {reason}", *[""] * 6)
            continue
        table.add_row(
            str(trial.number),
            state,
            plain_number(m["value"]),
            plain_number(m["drop"]),
            f"{m['average_weight_bits']:.3f}",
            megabytes(m["size_bytes"]),
            "yes" if m["feasible"] and trial.state == TrialState.COMPLETE else "no",
            f"{m['seconds']:.2f}",
        )
    return table


def studies_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the list of studies."""
    table = Table()
    for name in ("study", "model", "space", "trials", "best drop", "best bits", "begun"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("study", "model", "space", "trials")),
            *(str(row[key]) for key in ("drop", "bits", "created")),
        )
    return table


def best_columns(trial: FrozenTrial | None) -> dict[str, str]:
    """Return the columns of a study's best trial."""
    m = None if trial is None else measured(trial)
    if m is None:
        return {"drop": "–", "bits": "–"}
    return {"drop": plain_number(m["drop"]), "bits": f"{m['average_weight_bits']:.3f}"}


def preflight_lines(found: Preflight) -> Iterator[str]:
    """Yield what the preflight found: the float metric, the layers, and what stays in float."""
    samples = ", ".join(f"{n} to {what}" for what, n in found.samples.items() if n)
    yield f"float {found.metric} {plain_number(found.value)} ({samples or 'measured by the task'})"
    kinds: dict[str, int] = {}
    for site in found.sites:
        kinds[site.layer] = kinds.get(site.layer, 0) + 1
    weights = sum(site.numel for site in found.sites)
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    yield (
        f"{len(found.sites)} layers to quantize ({listed}): {weights:,} of {found.parameters:,} "
        f"parameters, {weights / max(found.parameters, 1):.1%}"
    )
    small: list[Any] = []
    for part in found.float_parts:
        if found.share(part) < FEWEST_SHARE:
            small.append(part)
            continue
        yield f"  stays in float: {part.name}: {part.reason} ({found.share(part):.2%})"
    reasons: dict[str, list[Any]] = {}
    for part in small:
        reasons.setdefault(part.reason, []).append(part)
    for reason, parts in reasons.items():
        share = sum(p.parameters for p in parts) / max(found.parameters, 1)
        named = ", ".join(p.name for p in parts[:3]) + (", …" if len(parts) > 3 else "")
        yield f"  stays in float: {len(parts)}× {reason} ({share:.3%} in all): {named}"
    yield from (f"note: {note}" for note in found.notes)
