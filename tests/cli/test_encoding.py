"""Terminals and files that can't encode a sign get ASCII; files that are written are UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autoquant.cli import COMMANDS
from autoquant.cli.terminal import ASCII, plain, says_ascii

ENVIRONMENTS = {
    "ascii, strict": {"PYTHONIOENCODING": "ascii:strict"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}
"""A search and all that follows takes half a minute in each."""
DROPPED = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LC_CTYPE", "LANG")


def run(folder, environment: dict[str, str], *words: object) -> tuple[int, bytes, bytes]:
    rest = {k: v for k, v in os.environ.items() if k not in DROPPED}
    child = subprocess.run(
        [sys.executable, "-m", "autoquant", *map(str, words)],
        cwd=folder,
        env=rest | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
    )
    return child.returncode, child.stdout, child.stderr


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_output_can_be_printed(project, name):
    environment = ENVIRONMENTS[name]
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    task = project / "task.py"
    # A layer and an output of the task's own that no such terminal knows.
    text = task.read_text().replace("def data():", "print('größer ≥ 4 🙂')\n\n\ndef data():")
    task.write_text(text, encoding="utf-8")
    words = ("--task", "task.py", "--trials", 3, "--study", "s")
    status, out, err = run(project, environment, "search", "model.pt", *words)
    assert status in (0, 3, 4), err
    shown = out.decode(encoding)
    err.decode(encoding)
    if encoding == "utf-8":
        assert "drop ≤ 1 point: " in shown
    else:
        assert "drop <= 1 point: " in shown or "drop ≤ 1 point: " in shown
    assert "≥ 4" in shown or ">= 4" in shown
    recipe = (project / "recipe.yaml").read_bytes()
    recipe.decode("utf-8")
    for command in (
        ("show", "s"),
        ("show", "s", "--why", "0"),
        ("studies",),
        ("evaluate", "model.pt", "--task", "task.py", "--recipe", "recipe.yaml"),
        ("resume", "s", "--trials", 4),
        ("apply", "recipe.yaml", "model.pt", "--task", "task.py"),
    ):
        status, out, err = run(project, environment, *command)
        assert status in (0, 3, 4), err
        out.decode(encoding)
        err.decode(encoding)
    status, out, err = run(project, environment, "search", "größe≤.pt", *words)
    assert (status, out) == (2, b"")
    assert len(err.decode(encoding).splitlines()) == 1


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_ascii(cli, command):
    text = cli(*([] if command is None else [command]), "--help").out
    assert "Usage: autoquant" in text
    assert text.isascii(), [c for c in text if not c.isascii()]


def test_what_stands_for_what():
    assert (
        plain("drop ≤ 1 … ±0.5 − kühler 🙂 ─│┼ 3 × µs")
        == "drop <= 1 ... +/-0.5 - kuhler ? -|| 3 x us"
    )
    assert all(stands.isascii() for stands in ASCII.values())
    assert plain("\udcff") == "?"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LC_ALL": "C"}, True),
        ({"LC_ALL": "POSIX"}, True),
        ({"LC_ALL": "C.UTF-8"}, False),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, False),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}, False),
        ({"LANG": "C"}, False),
    ],
)
def test_where_the_locale_says_ascii(environment, expected):
    assert says_ascii(environment) is expected


IMPORT = """
import codecs
import autoquant.cli.terminal as terminal
try:
    codecs.lookup_error(terminal.HANDLER)
except LookupError:
    print("none")
"""


def test_importing_the_command_line_registers_nothing():
    child = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert child.stdout == "none\n"
