"""``autoquant show``."""

from __future__ import annotations

import click

from autoquant.cli.options import json_option, storage_option
from autoquant.cli.output import emit


@click.command(
    epilog="Example: autoquant show mobilenet; autoquant show mobilenet --why features.0.0"
)
@click.argument("study", required=False)
@click.option(
    "--why",
    metavar="LAYER",
    help="Instead: why this layer got what it got, and which layers hold the budget back.",
)
@storage_option
@json_option
def command(study: str | None, why: str | None, storage: str | None, as_json: bool) -> None:
    """Print the trials of STUDY (default: the newest), its Pareto front and its recipe.

    The front is of metric against size: what no other trial beats in both. What the study foretells
    at other budgets, from its profile and all trials, is beside it; a search with --bits makes it
    true.
    """
    if why is not None:
        _show_why(study, why, storage, as_json)
        return

    from autoquant.report.tables import console, front_table, layers_table, trials_table
    from autoquant.spec.recipe_file import loads
    from autoquant.study.ledger import MEASURED, REASON, Ledger
    from autoquant.study.trials import FRONT, RECIPE, best_trial, front
    from autoquant.study.tuned import tuning_of

    ledger = Ledger.open(study, storage, write=False)
    trials = ledger.trials()
    best = best_trial(trials)
    edge = front(trials)
    if as_json:
        rows = [
            {
                "trial": t.number,
                "state": t.state.name.lower(),
                "measured": t.user_attrs.get(MEASURED),
                "reason": t.user_attrs.get(REASON),
                "tuned": None if (how := tuning_of(t)) is None else how.technique.plain(),
            }
            for t in trials
        ]
        found = {
            "study": ledger.name,
            "trials": rows,
            "front": [t.number for t in edge],
            "best": None if best is None else best.number,
            "foretold": ledger.header.get(FRONT, []),
        }
        emit(found)
        return
    out = console()
    out.print(trials_table(trials, f"study {ledger.name}: {len(trials)} trials"))
    out.print(trials_table(edge, "Pareto front, smallest first"))
    if ledger.header.get(FRONT):
        out.print(front_table(ledger.header[FRONT]))
    if RECIPE in ledger.header:
        out.print(layers_table(loads(ledger.header[RECIPE]["text"], f"study {ledger.name}")))
    if best is not None:
        out.print(f"best trial: {best.number}")


def _show_why(study: str | None, layer: str, storage: str | None, as_json: bool) -> None:
    """Print what is known of one layer."""
    import dataclasses

    from autoquant.report.tables import console, why_lines, why_table
    from autoquant.study.explanation import shares, why
    from autoquant.study.ledger import Ledger

    ledger = Ledger.open(study, storage, write=False)
    found = why(ledger, layer)
    if as_json:
        emit(dataclasses.asdict(found))
        return
    out = console()
    out.print(why_table(found))
    for line in why_lines(found, shares(ledger)):
        out.print(line, markup=False)
