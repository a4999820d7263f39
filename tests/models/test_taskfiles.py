"""The classes of a task file are found in the processes that it starts."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autoquant.models.task import load_task

TASK = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from helper_of_workers import scaled


@dataclass
class Digits(Dataset):
    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        return scaled(x), int(x[:3].argmax())


def collate(rows):
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


def loader(count):
    return DataLoader(Digits(count), 20, num_workers=2, collate_fn=collate,
                      multiprocessing_context={context!r})


def load_model(path):
    model = nn.Linear(8, 3)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def evaluation_data():
    return loader(80)


metric = "accuracy"
"""


def project(folder: Path, name: str, context: str | None) -> Path:
    (folder / "helper_of_workers.py").write_text("def scaled(x):\n    return 2 * x\n")
    torch.save(nn.Linear(8, 3).state_dict(), folder / "model.pt")
    (folder / name).write_text(TASK.replace("{context!r}", repr(context)))
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("entry", ["module", "script"])
def test_workers_find_the_classes_of_the_task(tmp_path, context, entry):
    task = project(tmp_path, "my task-2.py", context)
    script = tmp_path / "run.py"  # as the one that pip installs
    script.write_text("from autoquant.cli import main\nif __name__ == '__main__':\n    main()\n")
    words = {"module": ["-m", "autoquant"], "script": [str(script)]}[entry]
    child = subprocess.run(
        [sys.executable, *words, "evaluate", "model.pt", "--task", task.name, "--json"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)["splits"]
    assert {name: split["samples"] for name, split in found.items()} == {
        "search": 30,
        "confirm": 30,
    }


UNPICKLE = """
import pickle, sys
found = pickle.load(sys.stdin.buffer)
assert len(found) == 7 and "torch" in sys.modules
print(type(found).__name__)
"""


def test_an_object_of_the_task_crosses_to_a_process_that_knows_nothing_of_it(tmp_path, monkeypatch):
    task = project(tmp_path, "task.py", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = load_task(task)
    assert loaded.evaluation_data is not None
    data = type(loaded.evaluation_data().dataset)(7)
    words = [sys.executable, "-c", UNPICKLE]
    child = subprocess.run(words, input=pickle.dumps(data), capture_output=True)
    assert child.stdout.decode().strip() == "Digits", child.stderr.decode()
    task.write_text(task.read_text() + "\nversion = 2\n")
    child = subprocess.run(words, input=pickle.dumps(data), capture_output=True)
    assert "has changed since the task was loaded" in child.stderr.decode()
