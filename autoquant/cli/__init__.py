"""The command line: parses and prints, decides nothing.

Commands are imported when they are called, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from typing import Any

import click

from autoquant.cli.failures import report_failure
from autoquant.cli.output import given_back
from autoquant.cli.started import process_start
from autoquant.cli.terminal import set_encoding
from autoquant.heap import keep_freed_memory
from autoquant.models.usercode import interruptible

COMMANDS = {
    "search": "Find the best recipe for a model.",
    "resume": "Go on with a study.",
    "studies": "List the studies.",
    "show": "Print a study's trials and its Pareto front.",
    "export": "Write a recipe out of a study, also at another budget.",
    "tune": "Fit the layers of a recipe to each other, without labels.",
    "apply": "Write the quantized model that a recipe describes.",
    "evaluate": "Measure a model, or a recipe on it.",
    "demo": "Train a small model and search it, to see how it goes.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"autoquant.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


SPINS = "20000"
"""Rounds that an idle thread waits for work: some hundred microseconds."""


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: autoquant search model.pt --task task.py --max-drop 1%   "
    "Every command takes --debug, which shows the traceback of an error.",
)
@click.version_option(package_name="autoquant")
def group() -> None:
    """Find the best quantization recipe for a PyTorch model, layer by layer."""


def set_waiting() -> None:
    """Say how idle threads of OpenMP wait; it must be said before torch is loaded.

    They spin for long unless told otherwise, which makes a machine with other work several times
    slower; where they sleep at once, products of small matrices take twice as long, waiting to be
    woken. So they spin for about as long as waking up takes, which costs at most twice what the
    better of the two would have (Karlin et al. 1990, Competitive randomized algorithms for
    non-uniform problems). What the user's environment says comes first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        os.environ["OMP_WAIT_POLICY"] = "passive"  # OpenMP libraries other than GNU's know this one


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with a status; see ``autoquant.cli.failures`` for which.

    Without ``argv`` the process is ours: it began with the command, and ends with it.
    """
    set_encoding()
    set_waiting()
    keep_freed_memory()  # this process is ours, and evaluates one candidate after another
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    began = process_start() if argv is None else time.monotonic()
    try:
        with interruptible(), contextlib.nullcontext() if argv is None else given_back():
            result: Any = group(words, prog_name="autoquant", standalone_mode=False, obj=began)
            if sys.stdout is not None:  # closed from the start
                sys.stdout.flush()  # here it is seen whether anybody reads it
    except BaseException as error:
        sys.exit(report_failure(error, debug=debug))
    sys.exit(result if isinstance(result, int) else 0)
