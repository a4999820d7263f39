"""``autoquant studies``."""

from __future__ import annotations

import sys

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
    from autoquant.study.header import Header
    from autoquant.study.ledger import Ledger, names
    from autoquant.study.storage import Storage
    from autoquant.study.trials import best_trial

    rows = []
    place = Storage.parse(storage)
    for name in names(place):
        try:
            ledger = Ledger.open(name, place, write=False)
            header, trials = Header.read(ledger.header, name), ledger.trials()
        except StudyError as error:
            print(f"note: {error}", file=sys.stderr)
            continue
        row = {
            "study": name,
            "model": header.model.name,
            "space": header.space.name,
            "trials": len(trials),
            "created": header.created.replace("T", " "),
        }
        rows.append(row | best_columns(best_trial(trials)))
    if as_json:
        emit(rows)
    elif not rows:
        print(f"no study in {place.shown}; start one: autoquant search")
    else:
        console().print(studies_table(rows))
