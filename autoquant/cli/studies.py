"""``autoquant studies``."""

from __future__ import annotations

import click

from autoquant.cli.options import json_option, storage_option
from autoquant.cli.output import emit


@click.command(epilog="Example: autoquant studies")
@storage_option
@json_option
def command(storage: str | None, as_json: bool) -> None:
    """List the studies, the newest first."""
    from autoquant.errors import StudyError
    from autoquant.report.tables import best_columns, console, studies_table
    from autoquant.search.ledger import FOLDER, Ledger, names
    from autoquant.search.trials import best_trial

    rows = []
    for name in names(storage):
        try:
            ledger = Ledger.open(name, storage)
        except StudyError as error:
            click.echo(f"note: {error}", err=True)
            continue
        trials = ledger.trials()
        header = ledger.header
        row = {
            "study": name,
            "model": header["model"]["name"],
            "space": header["space"]["name"],
            "trials": len(trials),
            "created": header["created"].replace("T", " "),
        }
        rows.append(row | best_columns(best_trial(trials)))
    if as_json:
        emit(rows)
    elif not rows:
        print(f"no study in {storage or FOLDER}; start one: autoquant search")
    else:
        console().print(studies_table(rows))
