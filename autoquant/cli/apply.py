"""``autoquant apply``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from autoquant.cli.options import OutputFile, device_option, json_option, task_options
from autoquant.cli.output import emit


@click.command(
    epilog="Example: autoquant apply recipe.yaml model.pt --task task.py -o quantized.pt2"
)
@click.argument("recipe", type=click.Path())
@click.argument("model", type=click.Path())
@task_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="quantized.pt2",
    show_default=True,
    type=OutputFile(".pt2", ".safetensors"),
    help="A .pt2 that plain torch loads; .safetensors for an archive that autoquant.load restores.",
)
@click.option(
    "--accept-changes", is_flag=True, help="Apply the recipe although it is for another model file."
)
@device_option
@json_option
def command(
    recipe: str,
    model: str,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    output: str,
    accept_changes: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write the quantized model that RECIPE makes of MODEL.

    Where the model can be exported it becomes a .pt2 of plain aten operators, with the weights as
    packed integers; otherwise a safe archive, and the reason is printed. On whichever device it is
    calibrated, the file is for the CPU.
    """
    from autoquant.spec.recipe_file import load

    loaded_recipe = load(Path(recipe))
    from autoquant.session.apply import check_model, check_output, quantize, write
    from autoquant.session.session import choose_device
    from autoquant.spec.outputs import check_folder
    from autoquant.study.source import Source

    target = Path(os.path.abspath(output))  # before the task runs, which may change the folder
    chosen = choose_device(device)
    source = Source(model, task, data, metric, trust_pickle)
    check_folder(target.parent)
    check_output(target, {"recipe": recipe, **source.files})
    loaded_task = source.load_task() if task or data else None
    loaded = source.load(loaded_task)
    check_model(loaded_recipe, loaded, accept=accept_changes)
    module, calibrated = quantize(loaded, loaded_recipe, loaded_task, chosen)
    written = write(module, calibrated, loaded_task, target)
    if as_json:
        row = {"path": str(written.path), "kind": written.kind, "reason": written.reason}
        emit(row | {"size_bytes": written.path.stat().st_size})
        return
    size = written.path.stat().st_size
    if written.kind == "pt2":
        print(f"{written.path}: {size:,} bytes; load it with torch.export.load(…).module()")
    else:
        why = f" ({written.reason})" if written.reason else ""
        print(
            f"{written.path}: {size:,} bytes, an archive{why}; restore it with "
            f"autoquant.load({str(written.path)!r}, model)"
        )
