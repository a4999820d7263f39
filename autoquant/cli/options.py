"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from autoquant.cli.output import reserve

F = TypeVar("F", bound=Callable[..., Any])
RECIPES = (".yaml", ".yml")
"""Suffixes of a recipe's file."""


class Trials(click.ParamType):
    """A number of trials, or auto."""

    name = "trials"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return the number, or the word."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


class OutputFile(click.ParamType):
    """A file to be written, whose name says what is written."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; fail on a suffix that isn't one of what is written."""
        path = Path(value)
        if path.suffix not in self.suffixes:
            self.fail(
                f"{value!r}: what is written ends in {' or '.join(self.suffixes)}", param, ctx
            )
        return str(value)


class OutputFolder(click.ParamType):
    """A folder to write to, which is made where it is missing."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; fail on one that was meant for a file."""
        path = Path(value)
        if path.suffix in RECIPES and not path.is_dir():
            self.fail(
                f"{value!r} is the name of a file: give the folder of recipe.yaml", param, ctx
            )
        return str(value)


def task_options(command: F) -> F:
    """Add --task, --data, --metric and --trust-pickle."""
    for option in (
        click.option(
            "--trust-pickle",
            is_flag=True,
            help="Load a pickled module, which runs the code in it. Only for files you trust.",
        ),
        click.option(
            "--metric", metavar="NAME", help="Metric for --data (accuracy, mse, spearman ...)."
        ),
        click.option(
            "--data",
            metavar="FILE",
            type=click.Path(),
            help="Data instead of a task file: .npz, .safetensors or tensor-only .pt with "
            "'inputs' and, for a metric, 'targets'.",
        ),
        click.option(
            "--task",
            metavar="TASK.py",
            type=click.Path(),
            help="Python file with the data and the metric.",
        ),
    ):
        command = option(command)
    return command


def device_option(command: F) -> F:
    """Add --device."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the model runs.",
    )(command)


def backend_option(default: str) -> Callable[[F], F]:
    """Return what adds --backend."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", "eager", "reference"]),
        default=default,
        show_default=True,
        help="auto: real low-bit arithmetic wherever it is exact, which is fastest; on a GPU the "
        "model is recorded as CUDA graphs. eager: the same, layer by layer. reference: float "
        "arithmetic on quantized values, as a saved model computes, number for number.",
    )


def storage_option(command: F) -> F:
    """Add --storage."""
    return click.option(
        "--storage",
        metavar="URL",
        help="Where studies are kept: a database URL or a .journal file. "
        "Default: a journal file for each study under .autoquant/.",
    )(command)


def memory_option(command: F) -> F:
    """Add --memory."""
    return click.option(
        "--memory",
        metavar="SIZE",
        help="Memory for results of layers, so that what candidates share is computed once (512MB, "
        "2GB; 0 for none). Default: 2GiB, or a quarter of what is free where that is less.",
    )(command)


def log_option(command: F) -> F:
    """Add --log."""
    return click.option(
        "--log",
        metavar="DIR",
        type=click.Path(),
        help="Write how training goes to DIR as TensorBoard scalars: losses, metric, rates of each "
        "layer, what was found. Needs the package tensorboard.",
    )(command)


def log_folder(log: str | None) -> Path | None:
    """Return the folder of --log, absolute: the task may change where we are.

    Raises UserError where the package that it needs is missing, or nothing can be written there.
    """
    if log is None:
        return None
    from autoquant.report.scalars import check_scalars
    from autoquant.spec.outputs import check_folder

    folder = Path(os.path.abspath(log))
    check_scalars()
    check_folder(folder)
    return folder


def json_option(command: F) -> F:
    """Add --json."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=_reserve,
        help="Print one JSON object on standard output, and nothing else: what the task prints "
        "goes to standard error.",
    )(command)


def _reserve(context: click.Context, _: click.Parameter, as_json: bool) -> bool:
    if as_json:
        reserve(context)
    return as_json


def seconds(text: str | None) -> float | None:
    """Return the seconds of a --timeout."""
    from autoquant.spec.options import parse_duration

    return None if text is None else parse_duration(text)
