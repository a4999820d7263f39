"""--json: one object on standard output and nothing else, whatever the task prints, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOISE = """
import atexit, ctypes, logging, os, subprocess, sys

def say(where):
    print("python", where)
    sys.__stdout__.write("python's own " + where)
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).printf(b"c, buffered\\n")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    logging.warning("log")

logging.basicConfig(stream=sys.stdout)
atexit.register(print, "at exit")
atexit.register(ctypes.CDLL(None).puts, b"c at exit")
say("import")
loud = True

def forward(model, inputs):
    global loud
    if loud:
        say("forward")
    loud = False
    return model(inputs)
"""
WORDS = ("model.pt", "--task", "task.py")
COMMANDS = {
    "search": ("search", *WORDS, "--trials", "4", "--study", "t"),
    "resume": ("resume", "s", "--trials", "15", "--accept-changes"),
    "evaluate": ("evaluate", *WORDS, "--recipe", "recipe.yaml"),
    "tune": ("tune", "recipe.yaml", *WORDS, "--ridge", "200"),
    "apply": ("apply", "recipe.yaml", *WORDS),
    "show": ("show", "s"),
    "why": ("show", "s", "--why", "0"),
    "studies": ("studies",),
}


@pytest.fixture
def loud(searched: Path) -> Path:
    """Return a searched project whose task prints."""
    with (searched / "task.py").open("a") as file:
        file.write(NOISE)
    return searched


@pytest.mark.parametrize("command", COMMANDS)
def test_one_object_and_nothing_else(loud, command):
    child = subprocess.run(
        [sys.executable, "-m", "autoquant", *COMMANDS[command], "--json"],
        cwd=loud,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode in (0, 3, 4), child.stderr
    assert child.stdout.count("\n") == 1
    json.loads(child.stdout)
    if command not in ("show", "why", "studies"):
        for line in ("python import", "descriptor", "c, buffered", "child", "at exit", "c at exit"):
            assert line in child.stderr


def test_a_failure_prints_no_object(loud):
    with (loud / "task.py").open("a") as file:
        file.write("raise SystemExit\n")
    child = subprocess.run(
        [sys.executable, "-m", "autoquant", *COMMANDS["evaluate"], "--json"],
        cwd=loud,
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (2, "")


def test_standard_output_is_given_back_to_a_program(loud):
    """One that runs a command itself: what it prints afterwards comes out, nothing of the task."""
    script = (
        "import sys\n"
        "from autoquant.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    print('after')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS["evaluate"], "--json"],
        cwd=loud,
        capture_output=True,
        text=True,
    )
    lines = child.stdout.splitlines()
    assert json.loads(lines[0])["splits"]
    # What is printed at exit is the program's own affair.
    assert [line for line in lines[1:] if "at exit" not in line] == ["after"]


def test_numbers_that_json_does_not_know(capsys):
    from autoquant.cli.output import emit

    emit({"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None}


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_closed_streams(loud, closed):
    words = " ".join([sys.executable, "-m", "autoquant", *COMMANDS["studies"], "--json", closed])
    child = subprocess.run(["sh", "-c", words], cwd=loud, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "" or json.loads(child.stdout)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_closed_streams_change_no_status(tmp_path, closed, flags):
    words = " ".join([sys.executable, "-m", "autoquant", "show", "nothing", *flags, closed])
    child = subprocess.run(["sh", "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, "")
