import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoquant.errors import TaskError
from autoquant.models.task import Task, data_task, load_task, outputs_of, run_forward

BATCHES = [(torch.zeros(4, 2), torch.zeros(4))]


@pytest.fixture(autouse=True)
def _restore_imports():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("autoquant.models.taskfiles.", "helper_")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "task.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def fails(call, *parts: str) -> str:
    with pytest.raises(TaskError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# Task


def test_data_given_as_a_list_becomes_a_function():
    task = Task(evaluation_data=BATCHES, metric="mse")
    assert task.evaluation_data is not None
    assert list(task.evaluation_data()) == BATCHES


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "neither evaluation_data nor evaluate"),
        ({"evaluation_data": BATCHES, "evaluate": lambda m: 1.0}, "both evaluation_data and"),
        ({"evaluate": lambda m: 1.0, "metric": "mse"}, "both metric and evaluate"),
        (
            {"evaluation_data": BATCHES, "evaluate_confirm": lambda m: 1.0},
            "evaluate_confirm but no evaluate",
        ),
        ({"evaluation_data": BATCHES, "higher_is_better": False}, "higher_is_better but no metric"),
        ({"evaluation_data": BATCHES, "metric": "acuracy"}, "did you mean 'accuracy'?"),
        ({"evaluation_data": BATCHES, "metric": 3}, "metric is a int"),
        (
            {"evaluation_data": BATCHES, "metric": "mse", "higher_is_better": True},
            "must be False for metric 'mse'",
        ),
        ({"evaluation_data": BATCHES, "metric": max, "higher_is_better": "yes"}, "'yes'"),
        ({"evaluation_data": 3}, "evaluation_data is a int"),
        ({"evaluation_data": torch.zeros(3)}, "evaluation_data is a Tensor"),
        ({"evaluation_data": BATCHES, "forward": 3}, "forward is a int"),
        ({"evaluate": 0.5}, "evaluate is a float"),
    ],
)
def test_contradictions_are_one_line(fields, part):
    fails(lambda: Task(**fields, source="task.py"), "task.py: ", part)


# Task files


def test_a_task_file_defines_the_task(tmp_path):
    write(tmp_path, "VALUE = 3", "helper_a.py")
    write(tmp_path, "VALUE = 4", "helper_b.py")
    path = write(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import helper_a\n"
        "@dataclass\n"
        "class Config:\n    size: int = helper_a.VALUE\n"
        "metric = 'mae'\n"
        "def evaluation_data():\n"
        "    import helper_b\n"
        "    yield [Config().size, helper_b.VALUE, __file__]\n",
    )
    task = load_task(path)
    assert task.metric == "mae"
    assert task.evaluation_data is not None
    assert list(task.evaluation_data()) == [[3, 4, str(path)]]
    assert task.source == str(path)
    assert len(task.sha256) == 64
    assert not (tmp_path / "__pycache__" / "task.cpython-311.pyc").exists()


def test_the_hash_and_the_functions_follow_the_content(tmp_path):
    first = load_task(write(tmp_path, "evaluate = lambda model: 1.0\n"))
    second = load_task(write(tmp_path, "evaluate = lambda model: 2.0\n"))
    assert first.sha256 != second.sha256
    assert first.evaluate is not None
    assert second.evaluate is not None
    assert (first.evaluate(nn.Identity()), second.evaluate(nn.Identity())) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def evaluate(model:\n    return 1\n", ["syntax error", "task.py:1"]),
        ("x = 1\nopen('nowhere.npz')\n", ["FileNotFoundError", "nowhere.npz", "task.py:2"]),
        ("import helper_missing\n", ["No module named 'helper_missing'", "task.py:1"]),
        ("raise SystemExit(1)\n", ["SystemExit", "task.py:1"]),
        ("raise ValueError('two\\nlines')\n", ["ValueError: two lines"]),
        ("train_data = []\n", ["'train_data'", "did you mean 'training_data'?"]),
        ("evaluaton_data = []\n", ["'evaluaton_data'", "did you mean 'evaluation_data'?"]),
        ("evaluate = lambda m: 1.\nhigher_is_beter = False\n", ["did you mean 'higher_is_better'"]),
        ("", ["neither evaluation_data nor evaluate"]),
        ("\x00", ["task.py"]),
    ],
)
def test_a_bad_task_file_is_one_line(tmp_path, text, parts):
    path = write(tmp_path, text)
    fails(lambda: load_task(path), str(path), *parts)


def test_a_syntax_error_in_a_helper_names_the_helper(tmp_path):
    write(tmp_path, "\n\ndef f(:\n", "helper_c.py")
    path = write(tmp_path, "import helper_c\n")
    fails(lambda: load_task(path), "helper_c.py:3")


def test_imported_and_private_names_are_not_taken_for_mistakes(tmp_path):
    path = write(
        tmp_path,
        "from sklearn import metrics\n"
        "from statistics import mean as forwards\n"
        "_metrics = 3\n"
        "evaluate = lambda model: 1.0\n",
    )
    assert load_task(path).metric is None


def test_a_missing_task_file_and_one_that_is_no_python(tmp_path):
    fails(lambda: load_task(tmp_path / "none.py"), "none.py: no such task file")
    fails(lambda: load_task(tmp_path), "no such task file")
    fails(lambda: load_task(write(tmp_path, "x", "task.txt")), "ends in .py")


# Data files

X = np.random.default_rng(0).normal(size=(130, 3))
Y = np.arange(130) % 4


def batches_of(task: Task) -> list:
    assert task.evaluation_data is not None
    return list(task.evaluation_data())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_data_file_gives_batches_of_64(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    tensors = {"inputs": torch.tensor(X, dtype=torch.float32), "targets": torch.tensor(Y)}
    if suffix == ".npz":
        np.savez(path, inputs=X, targets=Y)
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    batches = batches_of(data_task(path, "accuracy"))
    assert [len(targets) for _, targets in batches] == [64, 64, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), tensors["inputs"])
    assert torch.equal(torch.cat([targets for _, targets in batches]), tensors["targets"])


def test_several_inputs_and_no_targets(tmp_path):
    np.savez(tmp_path / "d.npz", **{"inputs.ids": Y, "inputs.mask": Y > 1})
    (batch, *_) = batches_of(data_task(tmp_path / "d.npz", None))
    assert batch.keys() == {"ids", "mask"}
    assert batch["ids"].tolist() == Y[:64].tolist()


def test_strings_and_foreign_byte_order(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=X.astype(">f8"), targets=np.array(["a b"] * 130))
    inputs, targets = batches_of(data_task(tmp_path / "d.npz", "word_error_rate"))[0]
    assert torch.allclose(inputs, torch.tensor(X[:64], dtype=torch.float32))
    assert targets == ["a b"] * 64


@pytest.mark.parametrize(
    ("arrays", "metric", "part"),
    [
        ({"input": X}, None, "has no 'inputs' (found 'input'); rename 'input'"),
        ({"inputs": X, "targets": Y[:5]}, "accuracy", "130 inputs but 5 targets"),
        ({"inputs": X[:0], "targets": Y[:0]}, "accuracy", "'inputs' is empty"),
        ({"inputs": X}, "accuracy", "metric 'accuracy' needs 'targets'"),
        ({"inputs": X, "targets": Y}, "accurcy", "did you mean 'accuracy'?"),
        ({"inputs": np.array([{}, 3], dtype=object)}, None, "'inputs' holds Python objects"),
        ({"inputs": X, "inputs.a": X}, None, "both 'inputs' and 'inputs.a'"),
        ({"inputs.a": X, "inputs.b": X[:3]}, None, "differ in their number of samples"),
        ({"inputs": np.float32(3)}, None, "single number"),
        ({"inputs": np.array(["2020-01-01"], dtype="datetime64[D]")}, None, "datetime64"),
        ({"inputs": X, "targets": np.float32(3)}, "mse", "'targets'"),
    ],
)
def test_a_bad_npz_is_one_line(tmp_path, arrays, metric, part):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    fails(lambda: data_task(path, metric), str(path), part)


def test_a_reference_metric_needs_no_targets(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=X)
    assert data_task(tmp_path / "d.npz", "kl").metric == "kl"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("pickle_ran",))


def test_pickles_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"inputs": Bomb()}, "d.pt")
    fails(lambda: data_task(Path("d.pt"), None), "d.pt", "pickles are not loaded")
    np.savez("d.npz", inputs=np.array([Bomb()], dtype=object))
    fails(lambda: data_task(Path("d.npz"), None), "holds Python objects")
    assert not Path("pickle_ran").exists()


def test_damaged_and_unknown_files(tmp_path):
    for name in ("d.npz", "d.pt", "d.safetensors"):
        for content in (b"", b"PK\x03\x04junk", b"junk" * 100):
            (tmp_path / name).write_bytes(content)
            fails(lambda name=name: data_task(tmp_path / name, None), name)
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "one.npy").rename(tmp_path / "d.npz")
    fails(lambda: data_task(tmp_path / "d.npz", None), "single array")
    torch.save(torch.zeros(3), tmp_path / "d.pt")
    fails(lambda: data_task(tmp_path / "d.pt", None), "holds a Tensor")
    torch.save({"inputs": 3}, tmp_path / "d.pt")
    fails(lambda: data_task(tmp_path / "d.pt", None), "'inputs' is a int")
    fails(lambda: data_task(tmp_path / "d.csv", None), "no such data file")
    (tmp_path / "d.csv").touch()
    fails(lambda: data_task(tmp_path / "d.csv", None), "unknown kind of data file")


# Forward and outputs


class Echo(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


def test_default_forward_spreads_tuples_and_dicts():
    task, x = Task(evaluation_data=BATCHES), torch.ones(2)
    assert run_forward(task, Echo(), x) == ((x,), {})
    assert run_forward(task, Echo(), (x, None)) == ((x, None), {})
    assert run_forward(task, Echo(), {"a": x}) == ((), {"a": x})
    assert run_forward(task, Echo(), ["a", "b"]) == ((["a", "b"],), {})


def test_a_task_forward_is_used():
    task = Task(evaluation_data=BATCHES, forward=lambda model, x: model(x + 1))
    assert run_forward(task, nn.Identity(), torch.ones(1)).item() == 2


@dataclass
class Output:
    hidden: torch.Tensor
    extra: torch.Tensor | None = None


@dataclass
class Classified:
    logits: torch.Tensor


def test_outputs_of_finds_the_part_that_counts():
    x = torch.ones(2, 3)
    assert outputs_of(x) is x
    assert outputs_of((x, None)) is x
    assert outputs_of(OrderedDict(loss=None, logits=x)) is x
    assert outputs_of(Classified(x)) is x
    assert outputs_of((Classified(x), 1)) is x
    assert outputs_of(Output(x)) == {"hidden": x}
    assert outputs_of(["a", "b"]) == ["a", "b"]
    nested = {"hidden": Output(x), "pair": (x, Output(x)), "cache": object()}
    assert outputs_of(nested) == {"hidden": {"hidden": x}, "pair": (x, {"hidden": x})}
