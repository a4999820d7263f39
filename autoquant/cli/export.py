"""``autoquant export``."""

from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli.options import RECIPES, OutputFile, storage_option


@click.command(epilog="Example: autoquant export mobilenet --bits 5 -o recipe5.yaml")
@click.argument("study", required=False)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="recipe.yaml",
    show_default=True,
    type=OutputFile(*RECIPES),
    help="Where the recipe goes: a .yaml.",
)
@click.option("--trial", type=int, metavar="N", help="The recipe of this trial.")
@click.option("--bits", type=float, metavar="B", help="The best one of at most B average bits.")
@click.option("--size", metavar="N%", help="The best one of at most this size (25%, 4MB).")
@storage_option
def command(
    study: str | None,
    output: str,
    trial: int | None,
    bits: float | None,
    size: str | None,
    storage: str | None,
) -> None:
    """Write a recipe out of STUDY (default: the newest): its best one, or another.

    --bits and --size cut the Pareto front of the trials at another budget; no new trial is run.
    Their numbers are those of the search's data; `autoquant evaluate` measures the rest.
    """
    from autoquant.errors import UserError
    from autoquant.report.tables import describe_bits
    from autoquant.spec.outputs import check_target, is_signed
    from autoquant.spec.recipe_file import save
    from autoquant.study.extract import extract
    from autoquant.study.ledger import Ledger
    from autoquant.study.tuned import take_along

    if sum(x is not None for x in (trial, bits, size)) > 1:
        raise UserError("--trial, --bits and --size each choose a recipe; give one")
    check_target(Path(output), is_signed)
    ledger = Ledger.open(study, storage, write=False)
    recipe, chosen = extract(ledger, trial=trial, bits=bits, size=size)
    save(take_along(recipe, Path(output)), Path(output))
    evidence = recipe.evidence
    assert evidence is not None
    print(
        f"{output}: trial {chosen}, drop {evidence.reported.drop:.4g}, "
        f"{describe_bits(evidence.average_weight_bits, evidence.of_layers)}"
    )
