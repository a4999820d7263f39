"""Every mistake a user can make: one line, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

SEARCH = ("search", "model.pt", "--task", "task.py", "--trials", 3)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every file with its content, and every folder, below ``folder``."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def refused(cli, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command that must fail, and gives its one line."""

    def run(*words: object) -> str:
        before = snapshot(tmp_path)
        result = cli(*words)
        assert result.status == 2, result
        assert result.out == ""
        assert len(result.err.splitlines()) == 1, result.err
        assert result.err.startswith("error: ")
        assert "Traceback" not in result.err
        assert snapshot(tmp_path) == before
        return result.err

    return run


def task(project: Path, *changes: tuple[str, str], add: str = "") -> None:
    """Change the project's task file."""
    path = project / "task.py"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text + add)


def without(project: Path, name: str) -> None:
    """Take a function out of the task file."""
    task(project, (f"def {name}(", f"def _{name}_not("))


DATA = "    x, y = data()\n    return zip("

TASKS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "syntax error": (
        lambda p: task(p, ("def net():", "def net(:")),
        ("task.py", "syntax error", "task.py:5"),
    ),
    "raises when loaded": (
        lambda p: task(p, add="\nraise ValueError('no disk here')\n"),
        ("task.py", "ValueError: no disk here", "task.py:"),
    ),
    "exits when loaded": (lambda p: task(p, add="\nimport sys\nsys.exit(3)\n"), ("SystemExit",)),
    "no evaluation_data": (
        lambda p: without(p, "evaluation_data"),
        ("task.py", "evaluation_data", "evaluate"),
    ),
    "no load_model": (lambda p: without(p, "load_model"), ("model.pt", "load_model(path)")),
    "a misspelled function": (
        lambda p: task(p, ("def calibration_data", "def calibraton_data")),
        ("calibraton_data", "did you mean 'calibration_data'"),
    ),
    "no batches": (
        lambda p: task(p, (f"{DATA}x[80:].split(64), y[80:].split(64))", "    return []")),
        ("task.py", "evaluation_data() has no batches"),
    ),
    "an empty batch": (
        lambda p: task(p, (f"{DATA}x[80:].split(64)", f"{DATA}x[:0].split(64)")),
        ("evaluation_data", "empty"),
    ),
    "one sample": (
        lambda p: task(p, ("x[80:].split(64), y[80:].split(64)", "x[:1].split(1), y[:1].split(1)")),
        ("task.py", "0 evaluation samples", "at least 2"),
    ),
    "more inputs than targets": (
        lambda p: task(p, ("y[80:].split(64)", "y[80:].split(63)")),
        ("evaluation_data, batch 1", "64 inputs but 63 targets"),
    ),
    "inputs of another shape": (
        lambda p: task(p, ("torch.randn(400, 12", "torch.randn(400, 11"), ("randn(12", "randn(11")),
        ("the float model fails on the task's data", "RuntimeError"),
    ),
    "data that raises": (
        lambda p: task(p, (DATA, f"    raise OSError('photos are gone')\n{DATA}")),
        ("evaluation_data", "photos are gone", "task.py:"),
    ),
    "targets that are no classes": (
        lambda p: task(p, (".argmax(1)", ".argmax(1) + 9")),
        ("task.py", "is no class of 4"),
    ),
    "an unknown metric": (
        lambda p: task(p, ('"accuracy"', '"acuracy"')),
        ("unknown metric 'acuracy'", "did you mean 'accuracy'"),
    ),
    "a metric that returns NaN": (
        lambda p: task(p, ('metric = "accuracy"', "def metric(o, t):\n    return float('nan')")),
        ("task.py", "on the float model", "metric metric is nan"),
    ),
    "a metric that raises": (
        lambda p: task(p, ('metric = "accuracy"', "def metric(o, t):\n    return o.nothing")),
        ("on the float model", "metric metric failed: AttributeError", "task.py:"),
    ),
    "a metric that returns a vector": (
        lambda p: task(p, ('metric = "accuracy"', "def metric(o, t):\n    return o")),
        ("metric metric returned Tensor of shape [160, 4], not one number",),
    ),
    "load_model that raises": (
        lambda p: task(p, ("model = net()", "model = nn.Linear(3, 3)")),
        ("load_model() raised RuntimeError", "model.pt"),
    ),
    "load_model that returns no model": (
        lambda p: task(p, ("    return model\n", "    return 3\n")),
        ("load_model() returned a int", "nn.Module"),
    ),
    "nothing to quantize": (
        lambda p: task(p, ("    return model\n", "    return nn.PReLU()\n")),
        ("nothing to quantize: the model holds 1× PReLU", "Linear"),
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_task_file(project, refused, case):
    change, words = TASKS[case]
    change(project)
    line = refused(*SEARCH)
    for word in words:
        assert word in line


def test_the_line_of_the_user_s_code_is_named(project, refused):
    task(project, (DATA, f"    raise KeyError('x')\n{DATA}"))
    number = next(
        i
        for i, row in enumerate((project / "task.py").read_text().splitlines(), 1)
        if "raise" in row
    )
    for given in ("task.py", project / "task.py", Path("..") / project.name / "task.py"):
        line = refused("search", "model.pt", "--task", given)
        assert f"{project / 'task.py'}:{number}" in line


def _script(project: Path) -> None:
    traced = torch.jit.trace(nn.Linear(12, 4), torch.zeros(1, 12))
    torch.jit.save(traced, project / "model.pt")


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "gone": (lambda p: (p / "model.pt").unlink(), ("model.pt: no such file",)),
    "a folder": (
        lambda p: ((p / "model.pt").unlink(), (p / "model.pt").mkdir()),
        ("model.pt: a folder",),
    ),
    "empty": (lambda p: (p / "model.pt").write_bytes(b""), ("model.pt: empty",)),
    "a text": (
        lambda p: (p / "model.pt").write_text("hello, this is no model"),
        ("load_model() raised", "model.pt, which holds no model that torch can read"),
    ),
    "a picture": (
        lambda p: (p / "model.pt").write_bytes(b"\x89PNG" + bytes(99)),
        ("model.pt: a PNG image, not a model file",),
    ),
    "cut short": (
        lambda p: (p / "model.pt").write_bytes((p / "model.pt").read_bytes()[:-900]),
        ("model.pt: a damaged archive",),
    ),
    "a pickle": (
        lambda p: torch.save(nn.Linear(12, 4), p / "model.pt"),
        ("a pickle runs code", "--trust-pickle", "state_dict", ".pt2"),
    ),
    "a malicious pickle": (
        lambda p: (p / "model.pt").write_bytes(pickle.dumps(Evil())),
        ("a pickle runs code", "--trust-pickle"),
    ),
    "TorchScript": (_script, ("TorchScript", "--trust-pickle", ".pt2")),
}


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_model_file(project, refused, case, command):
    change, words = MODELS[case]
    change(project)
    line = refused(command, "model.pt", "--task", "task.py")
    for word in words:
        assert word in line


SPACE = "autoquant_space: 1\nname: mine\nrules:\n"
ALIASES = "\n".join(
    [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(9)]
)

SPACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown method": (
        SPACE + "  - weight_calibration: [max, magic]",
        ("rule 1: weight_calibration: found 'magic', allowed: max",),
    ),
    "unknown field": (
        SPACE + "  - weight_bit: 8",
        ("rule 1: unknown field 'weight_bit'",),
    ),
    "no layer": (
        SPACE + "  - names: ['head.*']\n    weight_bits: 4",
        ("rule 1: names head.* matches no layer", "layers are 0, 2, 4"),
    ),
    "99 bits": (SPACE + "  - weight_bits: [8, 99]", ("weight_bits: found 99, allowed: 2, 3",)),
    "0 bits": (SPACE + "  - weight_bits: 0", ("weight_bits: found 0, allowed: 2, 3",)),
    "all float": (SPACE + "  - skip: true", ("leaves every layer in float",)),
    "no rules": ("autoquant_space: 1\n", ("rules",)),
    "another version": ("autoquant_space: 7\nrules: []\n", ("autoquant_space: found 7",)),
    "no YAML": (SPACE + "  - [", ("line", "not valid YAML")),
    "aliases": (ALIASES, ("line 2", "aliases")),
    "a tag": ("!!python/object/apply:os.mkdir [evil]", ("not valid YAML",)),
    "a list": ("- 1\n- 2\n", ("not a search space: expected fields, found list",)),
    "nothing": ("", ("not a search space: expected fields, found nothing",)),
}


@pytest.mark.parametrize("case", SPACES)
def test_space_file(project, refused, case):
    text, words = SPACES[case]
    (project / "space.yaml").write_text(text)
    line = refused(*SEARCH, "--space", "space.yaml")
    assert "space" in line
    for word in words:
        assert word in line


OPTIONS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no model": (("search",), ("Missing argument 'MODEL'", "autoquant search --help")),
    "unknown command": (("serch", "model.pt"), ("No such command 'serch'",)),
    "unknown option": ((*SEARCH, "--max-dorp", "1%"), ("--max-dorp", "--max-drop")),
    "option without value": ((*SEARCH, "--seed"), ("--seed", "requires an argument")),
    "unknown sampler": ((*SEARCH, "--sampler", "tpee"), ("'tpee'", "'tpe'", "knapsack")),
    "unknown device": ((*SEARCH, "--device", "tpu"), ("'tpu'", "'cpu'")),
    "unknown space": ((*SEARCH, "--space", "int9"), ("'int9'", "'int8'", "weight_only")),
    "no such space": ((*SEARCH, "--space", "mine.yaml"), ("mine.yaml", "No such file")),
    "no task": (("search", "model.pt"), ("--task TASK.py", "--data FILE")),
    "no such task": (("search", "model.pt", "--task", "t.py"), ("t.py: no such task file",)),
    "task is no Python": (("search", "model.pt", "--task", "model.pt"), ("ends in .py",)),
    "two sources": ((*SEARCH, "--data", "x.npz"), ("--task and --data",)),
    "metric of a task": ((*SEARCH, "--metric", "mse"), ("--metric goes with --data",)),
    "no such data": (("search", "model.pt", "--data", "x.npz"), ("x.npz: no such data file",)),
    "1 bit": ((*SEARCH, "--bits", "1"), ("--bits 1", "between 2 and 16")),
    "bits below the space": (
        (*SEARCH, "--space", "int8", "--bits", "5"),
        ("--bits 5", "narrowest recipe has 8", "--bits 8 or more"),
    ),
    "size below the space": (
        (*SEARCH, "--size", "5%"),
        ("--size 5%", "smallest recipe has", "of the float model"),
    ),
    "bits and size": ((*SEARCH, "--bits", "5", "--size", "20%"), ("--bits and --size",)),
    "a latency without a unit": ((*SEARCH, "--max-latency", "20"), ("--max-latency '20'", "20ms")),
    "a latency of nothing": ((*SEARCH, "--max-latency", "0ms"), ("--max-latency '0ms'",)),
    "a latency that nothing keeps": (
        (*SEARCH, "--max-latency", "0.001us"),
        ("--max-latency 0.001us", "the space's fastest recipe takes", "give that or more"),
    ),
    "no such objective": ((*SEARCH, "--objective", "speed"), ("--objective 'speed'", "bitops")),
    "bits are a word": ((*SEARCH, "--bits", "five"), ("--bits", "'five'")),
    "size without unit": ((*SEARCH, "--size", "20"), ("--size '20'", "25%")),
    "no trials": ((*SEARCH, "--trials", "0"), ("--trials 0",)),
    "drop is a word": ((*SEARCH, "--max-drop", "little"), ("'little'", "1%")),
    "negative drop": ((*SEARCH, "--max-drop", "-1%"), ("'-1%' is negative",)),
    "timeout": ((*SEARCH, "--timeout", "soon"), ("--timeout 'soon'", "10m")),
    "study name": ((*SEARCH, "--study", "../x"), ("study name '../x'",)),
    "out is a file": ((*SEARCH, "--out", "task.py/x"), ("task.py/x", "no folder")),
    "no study to resume": (("resume",), ("no study in .autoquant", "autoquant search")),
    "no such study": (("resume", "x"), ("no study 'x'",)),
    "no study to show": (("show", "x"), ("no study 'x'",)),
    "no study to export": (("export", "x"), ("no study 'x'",)),
    "no such journal": (("show", "x", "--storage", "a.journal"), ("no such journal: a.journal",)),
    "no such database": (
        ("show", "x", "--storage", "sqlite:///a.db"),
        ("no such database: a.db",),
    ),
    "no such recipe": (("apply", "r.yaml", "model.pt"), ("r.yaml: cannot read the recipe",)),
    "recipe is no recipe": (("apply", "model.pt", "model.pt"), ("not a recipe",)),
    "apply writes no .onnx": (
        ("apply", "r.yaml", "model.pt", "-o", "x.onnx"),
        ("'x.onnx'", ".pt2 or .safetensors"),
    ),
    "apply writes no .pt": (("apply", "r.yaml", "model.pt", "-o", "x.pt"), ("'x.pt'", ".pt2 or")),
    "apply without a suffix": (("apply", "r.yaml", "model.pt", "-o", "x"), ("'x'", ".pt2 or")),
    "a suffix in capitals": (("apply", "r.yaml", "model.pt", "-o", "x.PT2"), ("'x.PT2'",)),
    "export writes no .json": (("export", "s", "-o", "r.json"), ("'r.json'", ".yaml or .yml")),
    "out is named like a file": ((*SEARCH, "--out", "r.yaml"), ("'r.yaml'", "give the folder")),
    "demo in a file": (("demo", "task.py"), ("task.py: is a file",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(project, refused, case):
    argv, words = OPTIONS[case]
    line = refused(*argv)
    for word in words:
        assert word in line


LATE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "storage": (("--storage", "studies"), ("--storage 'studies'", "sqlite:///")),
    "storage nowhere": (("--storage", "sqlite:///no/where.db"), ("study model", "database")),
    "drop of everything": (("--max-drop", "1"), ("whole range of accuracy", "1%")),
}


@pytest.mark.parametrize("case", LATE)
def test_options_that_only_the_preflight_can_judge(project, cli, case):
    words, expected = LATE[case]
    before = snapshot(project)
    result = cli(*SEARCH, *words)
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ")
    for word in expected:
        assert word in line
    assert snapshot(project) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_cuda_without_a_gpu(project, refused, command):
    line = refused(command, "model.pt", "--task", "task.py", "--device", "cuda")
    assert "--device cuda" in line
    assert "--device cpu or auto" in line


def _npz(project: Path, **arrays: np.ndarray) -> str:
    np.savez(project / "data.npz", **arrays)
    return "data.npz"


X = np.zeros((40, 12), dtype=np.float32)
DATAS: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...], tuple[str, ...]]] = {
    "mismatched": ({"inputs": X, "targets": np.zeros(39)}, (), ("40 inputs but 39 targets",)),
    "empty": ({"inputs": X[:0], "targets": np.zeros(0)}, (), ("is empty",)),
    "no inputs": ({"input": X}, (), ("no 'inputs'", "rename 'input'")),
    "objects": ({"inputs": np.array([{}, []], dtype=object)}, (), ("Python objects",)),
    "no targets": ({"inputs": X}, ("--metric", "accuracy"), ("needs 'targets'",)),
    "unknown metric": (
        {"inputs": X, "targets": np.zeros(40)},
        ("--metric", "mze"),
        ("'mze'", "'mse'"),
    ),
}


@pytest.mark.parametrize("case", DATAS)
def test_data_file(project, refused, case):
    arrays, words, expected = DATAS[case]
    line = refused("search", "model.pt", "--data", _npz(project, **arrays), *words)
    for word in expected:
        assert word in line


RECIPE_EDITS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "cut in a word": (lambda t: t[: t.index("layers:") - 30], ("recipe.yaml",)),
    "cut in the layers": (lambda t: t[: t.rindex("weight:")], ("recipe.yaml",)),
    "cut in a line": (lambda t: t[: t.index("granularity:") + 5], ("recipe.yaml: line",)),
    "empty": (lambda t: "", ("expected fields, found nothing",)),
    "0 bits": (
        lambda t: re.sub(r"weight: {bits: \d+", "weight: {bits: 0", t, count=1),
        ("weight: bits: found 0, allowed: 2, 3, 4",),
    ),
    "99 bits": (
        lambda t: re.sub(r"weight: {bits: \d+", "weight: {bits: 99", t, count=1),
        ("weight: bits: found 99, allowed: 2, 3, 4",),
    ),
    "missing layer": (
        lambda t: t.replace("\n  '2':", "\n  head:"),
        ("layer 'head' is not in the model", "0, 2, 4"),
    ),
    "another version": (
        lambda t: t.replace("autoquant_recipe: 2", "autoquant_recipe: 3"),
        ("found version 3, this release reads 1 and 2",),
    ),
    "unknown field": (
        lambda t: t.replace("scheme:", "schema:", 1),
        ("unknown field 'schema'", "did you mean 'scheme'"),
    ),
    "a correction that there is not": (
        lambda t: re.sub(r"correction: {method: bias}", "correction: {method: bais}", t, count=1),
        ("correction: unknown method 'bais': did you mean 'bias'?",),
    ),
    "a rounding with an option that it has not": (
        lambda t: t.replace(
            "    weight: ", "    rounding: {method: gptq, dampng: 1}\n    weight: "
        ),
        ("rounding: unknown field 'dampng'", "did you mean 'damping'?"),
    ),
    "aliases": (lambda t: ALIASES, ("aliases",)),
    "bits that the scale is not for": (
        lambda t: re.sub(r"activation: {bits: 8", "activation: {bits: 6", t, count=1),
        ("activation: scale ", "was calibrated for '8 bits ", "delete scale and zero_point"),
    ),
    "a calibration that the scale is not of": (
        lambda t: re.sub(r"calibration: [\w.]+, scale", "calibration: percentile_97, scale", t),
        ("activation: scale ", "was calibrated for", "percentile_97:"),
    ),
    "zero point off the grid": (
        lambda t: re.sub(r"zero_point: [-\d]+", "zero_point: 999", t, count=1),
        ("zero_point: found", "-128 … 127"),
    ),
}


STATIC = """
autoquant_space: 1
rules:
  - weight_bits: [8, 6, 4]
    correction: [bias]
    activation_calibration: [mse, max]
"""


@pytest.fixture
def static(project, cli):
    """Return the project after a search whose recipe has scales for activations."""
    (project / "static.yaml").write_text(STATIC)
    words = ("--task", "task.py", "--trials", 4, "--study", "s", "--space", "static.yaml")
    assert cli("search", "model.pt", *words, "--tune", "none").done
    return project


@pytest.mark.parametrize("case", RECIPE_EDITS)
def test_recipe(static, refused, case):
    change, words = RECIPE_EDITS[case]
    path = static / "recipe.yaml"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    for command in (
        ("apply", "recipe.yaml", "model.pt", "--task", "task.py"),
        ("evaluate", "model.pt", "--task", "task.py", "--recipe", "recipe.yaml"),
    ):
        line = refused(*command)
        for word in words:
            assert word in line


def test_recipe_of_another_model(searched, refused, cli, weights):
    other = {key: value * 1.01 for key, value in weights.items()}
    torch.save(other, searched / "other.pt")
    apply = ("apply", "recipe.yaml", "other.pt", "--task", "task.py", "-o", "q.pt2")
    evaluate = ("evaluate", "other.pt", "--task", "task.py", "--recipe", "recipe.yaml")
    for command in (apply, evaluate):
        line = refused(*command)
        assert "the recipe is for model (sha256" in line
        assert "not for other" in line
        assert "--accept-changes" in line
        assert cli(*command, "--accept-changes").status == 0


def test_study_that_exists(searched, refused):
    line = refused(*SEARCH, "--study", "s")
    assert "study s exists already" in line
    assert "autoquant resume s" in line
    assert "--study" in line


def test_study_of_another_model(searched, refused, weights):
    torch.save({key: value * 1.01 for key, value in weights.items()}, searched / "model.pt")
    assert "the model has changed since the study began" in refused("resume", "s")


@pytest.mark.parametrize("command", ["resume", "show", "export"])
def test_corrupt_journal(searched, refused, cli, command):
    journal = searched / ".autoquant" / "s.journal"
    rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*rows[:4], rows[4][:40] + b"\n", *rows[5:]]))
    line = refused(command, "s")
    assert "s.journal: line 5 is damaged" in line
    assert cli("studies").status == 0  # it lists the others and remarks on this one


@pytest.mark.parametrize("content", [b"\x00\xff\x00", b"hello\n", b"[1]\n", b"{}\n", b'{"a": 1}\n'])
def test_a_file_that_is_no_journal(project, refused, content):
    (project / ".autoquant").mkdir()
    (project / ".autoquant" / "s.journal").write_bytes(content)
    (project / ".autoquant" / "s.journal.flock").touch()
    assert "s" in refused("show", "s")


def test_export_of_what_there_is_not(searched, refused):
    assert "has no trial 99; it has 14" in refused("export", "s", "--trial", 99)
    assert "no trial within 1; the smallest has 3" in refused("export", "s", "--bits", 1)
    assert "no trial within" in refused("export", "s", "--size", "1%")
    assert "--size 'x'" in refused("export", "s", "--size", "x")
    assert "give one" in refused("export", "s", "--bits", 5, "--trial", 2)
    assert "cannot write" in refused("export", "s", "-o", "task.py/r.yaml")


@pytest.mark.parametrize("output", ["task.py/q.pt2", "task.py/q.safetensors"])
def test_output_that_cannot_be_written(searched, refused, output):
    line = refused("apply", "recipe.yaml", "model.pt", "--task", "task.py", "-o", output)
    assert "task.py is no folder" in line


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let every sync to disk fail from now on, after ``after`` more of them."""
    left = [after]
    sync = os.fsync

    def fsync(handle: int) -> None:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_full_disk_keeps_every_finished_trial(project, cli, monkeypatch):
    with monkeypatch.context() as context:
        fill_the_disk(context, 7)
        result = cli(*SEARCH, "--trials", 14, "--study", "s")
    assert result.status == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: study s: the disk is full; every finished trial is kept")
    assert "autoquant resume s" in line
    assert not (project / "recipe.yaml").exists()
    shown = cli("show", "s", "--json")
    kept = shown.out.count('"trial"')
    assert 1 <= kept < 14
    assert cli("resume", "s").done
    assert cli("show", "s", "--json").out.count('"trial"') == 14


@pytest.mark.skipif(resource is None, reason="this system has no limit on file sizes")
def test_a_journal_that_can_grow_no_more(project, cli):
    """A real write that fails half-way, as on a full disk: what it left is taken back."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        result = cli(*SEARCH, "--trials", 14, "--study", "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result.status, result.out) == (2, "")
    assert result.err.splitlines()[-1] == "error: study s: File too large"
    journal = project / ".autoquant" / "s.journal"
    assert journal.read_bytes().endswith(b"\n")
    rows = json.loads(cli("show", "s", "--json").out)["trials"]
    assert 1 <= len(rows) < 14
    assert cli("resume", "s").done
    after = json.loads(cli("show", "s", "--json").out)["trials"]
    assert len(after) == 14
    assert after[: len(rows)] == rows


def test_full_disk_of_an_export(searched, refused, monkeypatch):
    fill_the_disk(monkeypatch, 0)
    assert "new.yaml: cannot write: No space left on device" in refused(
        "export", "s", "-o", "new.yaml"
    )


def test_debug_shows_the_traceback(project, cli):
    task(project, ("def net():", "def net(:"))
    result = cli(*SEARCH, "--debug")
    assert result.status == 2
    assert result.out == ""
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith(f"error: {project}/task.py: syntax error")


def test_debug_is_taken_anywhere(project, cli):
    assert "Traceback" in cli("--debug", "search", "model.pt", "--task", "no.py").err
    assert "Traceback" in cli("search", "--debug", "model.pt", "--task", "no.py").err
