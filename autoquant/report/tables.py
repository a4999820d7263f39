"""Tables of recipes, trials and studies, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from autoquant.libraries import unchanged
from autoquant.models.direction import in_words
from autoquant.spec.costs import LatencyEvidence, describe_seconds
from autoquant.spec.recipe import FLOAT32, Recipe, SiteRecipe
from autoquant.spec.techniques import NEAREST
from autoquant.spec.transforms import describe_transform
from autoquant.study.ledger import REASON
from autoquant.study.trials import measured
from autoquant.study.tuned import TUNED

with unchanged():
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

if TYPE_CHECKING:
    from autoquant.nn.float_parts import FloatPart
    from autoquant.session.costs import LatencyCheck
    from autoquant.session.preflight import Preflight
    from autoquant.study.explanation import Why


OPTIONAL = {"latency": "latency", "bit_operations": "bit operations"}
"""Costs that a trial has where its search asked for them → their column."""
BIAS = "biases are added in float"
"""The reason that needs no list of names: every layer has one."""
WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where nothing tells the width."""


def console() -> Console:
    """Return where tables are printed: standard output, wide where it is no terminal."""
    found = Console(highlight=False, soft_wrap=True)
    return found if found.is_terminal else Console(highlight=False, soft_wrap=True, width=WIDTH)


def _table(title: str | None, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), show_edge=False
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def megabytes(size: float) -> str:
    """Return a size in MB or kB."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def plain_number(value: float) -> str:
    """Return a metric's number, short."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def describe_bits(average: float, layers: float) -> str:
    """Return the average width of all weights, and that of the layers alone where it differs."""
    said = f"{average:.3f} average weight bits"
    if math.isclose(average, layers):
        return said
    return f"{said} ({layers:.3f} in the recipe's layers; other weights stay in float)"


def describe_weight(site: SiteRecipe) -> str:
    """Return the bits and the scheme of a weight, in a few words."""
    w = site.weight
    if w is None:
        return "float"
    how = "" if w.rounding == NEAREST else f", {w.rounding}"
    how = ", learned" if site.learned else how
    return f"{w.bits} bits {w.granularity} {w.scheme} {w.calibration}{how}"


def describe_activation(site: SiteRecipe) -> str:
    """Return the bits and the scheme of an activation, in a few words."""
    a = site.activation
    if a is None:
        return "float"
    how = "" if a.dynamic else f" {a.calibration}"
    return f"{a.bits} bits {a.granularity} {a.scheme}{how}"


def layers_table(recipe: Recipe) -> Table:
    """Return what was chosen for each layer."""
    title = "recipe" if recipe.rest == FLOAT32 else f"recipe, the rest in {recipe.rest}"
    table = _table(title, "layer", "weight", "activation")
    for name, site in recipe.sites.items():
        text = recipe.transforms.get(name)
        how = "" if text is None else f", {describe_transform(text)}"
        table.add_row(name, describe_weight(site), describe_activation(site) + how)
    return table


def why_table(found: Why) -> Table:
    """Return the profile of one layer: what each choice is expected to cost."""
    of = f"gradients on {found.samples} samples" if found.samples else "noise at the layer"
    table = _table(f"{found.layer}: estimated loss, by {of}", "of", "bits", "choice", "loss", "")
    for half, rows in (("weight", found.weights), ("activation", found.activations)):
        for row in rows:
            loss = f"{row.loss:.2e}" + ("" if row.error is None else f" ± {row.error:.0e}")
            table.add_row(half, str(row.bits), row.label, loss, "chosen" if row.chosen else "")
    return table


MOST_SHARES = 5
"""Layers that are named as holding the budget back."""


def why_lines(found: Why, losses: Mapping[str, float]) -> Iterator[str]:
    """Yield how much one layer loses beside the others, and which lose most."""
    total = sum(losses.values())
    if not total:
        yield "the study has no recipe yet"
        return
    if found.rank is not None and found.share is not None:
        yield (
            f"{found.layer}: {found.share:.1%} of the recipe's estimated loss, number "
            f"{found.rank} of {found.layers} layers; {found.numel:,} weights"
        )
    worst = sorted(losses, key=lambda name: -losses[name])[:MOST_SHARES]
    listed = ", ".join(f"{name} {losses[name] / total:.1%}" for name in worst)
    yield f"most of the loss: {listed}"


def trials_table(trials: Sequence[FrozenTrial], title: str) -> Table:
    """Return a table of trials: what each measured, or why it failed."""
    found = [m for t in trials if (m := t.user_attrs.get("measured")) is not None]
    asked = [name for name in OPTIONAL if any(name in m for m in found)]
    costs = (OPTIONAL[name] for name in asked)
    columns = ("trial", "state", "metric", "drop", "bits", "size", *costs, "feasible", "seconds")
    table = _table(title, *columns)
    for trial in trials:
        m = trial.user_attrs.get("measured")
        state = trial.state.name.lower() + (", tuned" if TUNED in trial.user_attrs else "")
        if m is None:
            reason = trial.user_attrs.get(REASON, "")
            table.add_row(str(trial.number), f"{state}: {reason}", *[""] * (len(columns) - 2))
            continue
        table.add_row(
            str(trial.number),
            state,
            plain_number(m["value"]),
            plain_number(m["drop"]),
            f"{m['average_weight_bits']:.3f}",
            megabytes(m["size_bytes"]),
            *(_cost(name, m.get(name)) for name in asked),
            "yes" if m["feasible"] and trial.state == TrialState.COMPLETE else "no",
            f"{m['seconds']:.2f}",
        )
    return table


def front_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Return the front that a study foretells: recipes that it did not measure."""
    title = "foretold at other budgets, from the profile and all trials: not measured"
    table = _table(title, "bits", "size", "loss", "drop, about")
    for point in points:
        drop = point["drop"]
        table.add_row(
            f"{point['average_weight_bits']:.3f}",
            megabytes(point["size_bytes"]),
            f"{point['loss']:.2e}",
            "" if drop is None else f"{drop:+.4f}",
        )
    return table


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return describe_seconds(value) if name == "latency" else f"{value:.3g}"


def latency_lines(
    evidence: LatencyEvidence, checks: Sequence[LatencyCheck], limit: float | None
) -> Iterator[str]:
    """Yield how long the result takes, and how well that was predicted."""
    of = evidence.float_seconds
    batch = f"a batch of {evidence.samples}" if evidence.samples else "evaluate(model)"
    found = evidence.predicted if evidence.measured is None else evidence.measured
    how = "predicted" if evidence.measured is None else "measured"
    yield (
        f"{describe_seconds(found)} for {batch} ({how}; predicted "
        f"{describe_seconds(evidence.predicted)}), {found / max(of, 1e-12):.1%} of the float "
        f"model's {describe_seconds(of)}, on {evidence.device}"
    )
    yield from map(check_line, checks)
    if limit is not None and found > limit:
        yield f"note: that is more than the {describe_seconds(limit)} asked for"


def check_line(check: LatencyCheck) -> str:
    """Return one prediction beside its measurement."""
    return (
        f"  {check.recipe}: predicted {describe_seconds(check.predicted)}, measured "
        f"{describe_seconds(check.measured)} ({check.error:+.1%})"
    )


def studies_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the list of studies."""
    columns = ("study", "model", "space", "trials", "best drop", "best bits", "begun")
    table = _table(None, *columns)
    for row in rows:
        keys = ("study", "model", "space", "trials", "drop", "bits", "created")
        table.add_row(*(str(row[key]) for key in keys))
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
    yield (
        f"float {found.metric} {plain_number(found.value)}, {in_words(found.higher_is_better)} "
        f"({samples or 'measured by the task'})"
    )
    yield from (f"warning: {warning}" for warning in found.warnings)
    kinds: dict[str, int] = {}
    for site in found.sites:
        kinds[site.layer] = kinds.get(site.layer, 0) + 1
    weights = sum(site.numel for site in found.sites)
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    yield (
        f"{len(found.sites)} layers to quantize ({listed}): {weights:,} of {found.parameters:,} "
        f"parameters, {weights / max(found.parameters, 1):.1%}"
    )
    reasons: dict[str, list[FloatPart]] = {}
    for part in found.float_parts:
        reasons.setdefault(part.reason, []).append(part)
    for reason, parts in reasons.items():
        share = sum(part.parameters for part in parts) / max(found.parameters, 1)
        named = ", ".join(part.name for part in parts)
        if reason == BIAS:
            named = f"the biases of {len(parts)} layers"
        yield f"  stays in float, {share:.2%} of the parameters: {named}: {reason}"
    latency = found.latency
    if latency is not None:
        batch = f"a batch of {latency.samples}" if latency.samples else "evaluate(model)"
        yield (
            f"latency for {batch} on {latency.device}: float "
            f"{describe_seconds(latency.float_seconds)}, fastest recipe "
            f"{describe_seconds(latency.fastest)} (predicted)"
        )
        yield from map(check_line, latency.checks)
    yield from (f"note: {note}" for note in found.notes)
