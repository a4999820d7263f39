"""Help for every command, at once: what needs no torch does not import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoquant.cli import COMMANDS

WITHOUT_TORCH = """
import sys
from autoquant.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = [m for m in ("torch", "sklearn", "scipy", "optuna", "pandas") if m in sys.modules]
print("imported:", *heavy, file=sys.stderr)
"""


def imported(folder: Path, *words: str) -> set[str]:
    """Return which heavy packages a command imports in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        cwd=folder,
        env=os.environ | {"PYTHONWARNINGS": "error::ImportWarning"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return set(child.stderr.splitlines()[-1].removeprefix("imported:").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(cli, command):
    result = cli(command, "--help")
    assert (result.status, result.err) == (0, "")
    assert f"Usage: autoquant {command}" in result.out
    assert f"Example: autoquant {command}" in result.out
    assert result.out == cli(command, "-h").out


def test_help(cli):
    result = cli("--help")
    assert (result.status, result.err) == (0, "")
    assert "Example: autoquant search model.pt --task task.py" in result.out
    for name, line in COMMANDS.items():
        assert f"  {name}" in result.out
        assert line in result.out
    assert cli("--version").out.startswith("autoquant")


def test_no_words_show_the_help(cli):
    result = cli()
    assert result.status == 2
    assert "Usage: autoquant" in result.out + result.err


@pytest.mark.parametrize("words", [("--help",), ("search", "--help"), ("demo", "--help")])
def test_help_imports_nothing_heavy(tmp_path, words):
    assert imported(tmp_path, *words) == set()


@pytest.mark.parametrize("words", [("studies",), ("show", "s"), ("export", "s", "-o", "r.yaml")])
def test_reading_a_study_does_not_import_torch(searched, words):
    assert imported(searched, *words) & {"torch", "sklearn", "scipy"} == set()


@pytest.mark.parametrize(
    "words",
    [
        ("search", "model.pt", "--task", "t.py", "--sampler", "tpee", "--bits", "1"),
        ("search", "model.pt", "--task", "t.py", "--space", "int9"),
        ("search", "gone.pt", "--task", "t.py"),
        ("apply", "gone.yaml", "model.pt"),
        ("tune", "gone.yaml", "model.pt", "--task", "t.py"),
    ],
)
def test_what_is_cheap_to_check_is_checked_before_torch_is_imported(tmp_path, words):
    code = WITHOUT_TORCH.replace("not ended.code", "ended.code == 2")
    child = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr.splitlines()[-1] == "imported:"
