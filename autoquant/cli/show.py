"""``autoquant show``."""

from __future__ import annotations

import click

from autoquant.cli.options import json_option, storage_option


@click.command(epilog="Example: autoquant show mobilenet")
@click.argument("study", required=False)
@storage_option
@json_option
def command(study: str | None, storage: str | None, as_json: bool) -> None:
    """Print the trials of STUDY (default: the newest), its Pareto front and its recipe.

    The front is of metric against size: what no other trial beats in both.
    """
    import json

    from autoquant.report.tables import console, layers_table, trials_table
    from autoquant.search.ledger import MEASURED, REASON, Ledger
    from autoquant.search.trials import best_trial, front
    from autoquant.spec.recipe_file import loads

    ledger = Ledger.open(study, storage)
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
            }
            for t in trials
        ]
        found = {
            "study": ledger.name,
            "trials": rows,
            "front": [t.number for t in edge],
            "best": None if best is None else best.number,
        }
        print(json.dumps(found))
        return
    out = console()
    out.print(trials_table(trials, f"study {ledger.name}: {len(trials)} trials"))
    out.print(trials_table(edge, "Pareto front, smallest first"))
    if "recipe" in ledger.header:
        out.print(layers_table(loads(ledger.header["recipe"], f"study {ledger.name}")))
    if best is not None:
        out.print(f"best trial: {best.number}")
