"""A task file may set torch's default dtype: numbers of autoquant's own do not depend on it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import autoquant

TASK = """\
import torch
from torch import nn

torch.set_default_dtype(torch.{dtype})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, dtype=torch.float32)
        self.norm = nn.BatchNorm2d(8, dtype=torch.float32)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8, dtype=torch.float32)
        self.gru = nn.GRU(24, 12, batch_first=True, dtype=torch.float32)
        self.head = nn.Linear(12, 4, dtype=torch.float32)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.conv(x))))
        y, _ = self.gru(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(y[:, -1])


def load_model(path):
    model = Net()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(240, 1, 8, 8, generator=generator, dtype=torch.float32)
    return x, x.mean((1, 3)).cumsum(1)[:, ::2].argmax(1)


def calibration_data():
    return data()[0][:80].split(40)


def evaluation_data():
    x, y = data()
    return zip(x[80:].split(40), y[80:].split(40))


metric = "accuracy"
"""
SEARCH = ("--max-drop", "20%", "--trials", "14", "--calibrate", "80")


def autoquant_command(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "autoquant", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 3, 4), done.stdout + done.stderr
    return done.stdout + done.stderr


def searched(folder, dtype):
    """Return the recipe of a search under a default dtype, without what names the file."""
    folder.mkdir()
    (folder / "task.py").write_text(TASK.format(dtype=dtype))
    torch.manual_seed(0)
    scope: dict = {}
    exec(TASK.format(dtype="float32"), scope)
    torch.save(scope["Net"]().state_dict(), folder / "model.pt")
    autoquant_command(folder, "search", "model.pt", "--task", "task.py", *SEARCH[:4], "--out", ".")
    autoquant_command(
        folder, "apply", "recipe.yaml", "model.pt", "--task", "task.py", "-o", "made.pt2"
    )
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("usual") / "s", "float32")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_search_finds_the_same_under_every_default_dtype(usual, tmp_path, dtype):
    found = searched(tmp_path / "s", dtype)
    for recipe in (found, usual):
        recipe.pop("provenance", None)
        recipe.pop("search", None)
    assert found == usual


FACTORIES = {"empty", "zeros", "ones", "tensor", "full", "rand", "randn", "eye", "linspace"}
FACTORIES |= {"logspace", "scalar_tensor", "empty_strided", "normal"}


def test_every_tensor_that_is_made_is_made_with_a_dtype():
    """Else it is of whatever dtype a task has made the default, which C code can't read."""
    root = Path(autoquant.__file__).parent
    without = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            torch_s = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if not torch_s or node.func.attr not in FACTORIES:
                continue
            if all(keyword.arg != "dtype" for keyword in node.keywords):
                without.append(f"{path.relative_to(root)}:{node.lineno}")
    assert without == []
