"""``python -m tests.benchmarks.challenges``: the problems of training, measured one by one.

Each section is a question about training through quantizers, asked of models of the zoo. Rows are
kept in ``reports/training.jsonl`` as they are made, and only those that are missing are measured,
so that seeds may be added; ``--again`` measures the named sections anew. ``reports/training.md``
has the sections after the table of ``tests.benchmarks.training``.
"""

from __future__ import annotations

import click

from autoquant.heap import keep_freed_memory
from tests.benchmarks.challenges import (
    convergence,
    estimators,
    labels,
    language,
    layer_rates,
    mismatch,
    normalization,
    quantized_gradients,
    signs,
    small_weights,
)
from tests.benchmarks.challenges.rows import MACHINE, Rows, ordered
from tests.benchmarks.training import REPORT, RULE

SECTIONS = {
    "language": (language, "Accuracy of BERT-like models"),
    "convergence": (convergence, "Rates at which quantized weights converge"),
    "estimators": (estimators, "Gradients through discrete values"),
    "small-weights": (small_weights, "Ranges that lose the many tiny weights"),
    "mismatch": (mismatch, "Gradient mismatch"),
    "gradients": (quantized_gradients, "Quantized gradients"),
    "signs": (signs, "Sign and magnitude together"),
    "layer-rates": (layer_rates, "Rates of layers"),
    "normalization": (normalization, "BatchNorm: learned, or set anew"),
    "labels": (labels, "Labels beside distillation"),
}


def sections(rows: Rows) -> str:
    """Return the text of all sections that have rows."""
    lines: list[str] = []
    for module, title in SECTIONS.values():
        own = rows.of_section(module.SECTION)
        if own:
            lines += ["", f"## {title}", ""]
            lines += [*module.text(own), *ordered(own, MACHINE)]
    return "\n".join(lines).rstrip() + "\n"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(tuple(SECTIONS)))
@click.option("--seeds", default=5, show_default=True, help="How often what is random is done.")
@click.option("--again", is_flag=True, help="Measure NAMES anew.")
def main(names: tuple[str, ...], seeds: int, again: bool) -> None:
    """Measure the sections NAMES (default: all) and write the report."""
    keep_freed_memory()
    rows = Rows.of(REPORT.with_suffix(".jsonl"))
    chosen = names or tuple(SECTIONS)
    if again:
        rows.forget(SECTIONS[name][0].SECTION for name in chosen)
    try:
        for name in chosen:
            print(f"== {name}", flush=True)
            SECTIONS[name][0].measure(rows, seeds)
    finally:
        before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
        head = before.split(RULE)[0].rstrip() + "\n"
        REPORT.write_text(head + sections(rows), encoding="utf-8")
        convergence.plot(rows.of_section(convergence.SECTION), REPORT.with_name("training"))


if __name__ == "__main__":
    main()
