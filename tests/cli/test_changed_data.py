"""Data that are not what the study began with are found, and never confirmed with in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autoquant
from autoquant.errors import TaskError
from autoquant.models.data import make_splits
from autoquant.models.digests import sample_digests
from autoquant.study import header
from autoquant.study.ledger import Ledger

READ = """
def data():
    x, y = torch.load(__import__("pathlib").Path(__file__).parent / "data.pt")
    return x, y
"""


@pytest.fixture
def begun(project: Path, cli) -> Path:
    """Return the project, whose task reads a file, after a search of four trials: study "s"."""
    scope: dict = {}
    text = (project / "task.py").read_text()
    exec(text, scope)
    x, y = scope["data"]()
    torch.save((x, y), project / "data.pt")
    (project / "task.py").write_text(
        text.replace('metric = "accuracy"', READ + 'metric = "accuracy"')
    )
    words = ("--task", "task.py", "--trials", 4, "--study", "s")
    result = cli("search", "model.pt", *words)
    assert result.done, result.err
    return project


def change(folder: Path, how) -> None:
    x, y = torch.load(folder / "data.pt")
    torch.save(how(x.clone(), y.clone()), folder / "data.pt")


def one_input(x, y):
    x[399, 0] += 1e-3
    return x, y


def one_target(x, y):
    y[300] = (y[300] + 1) % 4
    return x, y


def one_calibrated(x, y):
    x[3, 0] += 1e-3
    return x, y


def longer(x, y):
    return torch.cat([x, x[80:] + 10]), torch.cat([y, y[80:]])


def in_another_order(x, y):
    order = torch.randperm(320, generator=torch.Generator().manual_seed(3)) + 80
    return torch.cat([x[:80], x[order]]), torch.cat([y[:80], y[order]])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (one_input, ("search", "confirm")),
        (one_target, ("search", "confirm")),
        (one_calibrated, ("calibrate",)),
        (longer, ("search and confirm",)),
        (in_another_order, ("search and confirm",)),
    ],
)
def test_changed_data_are_refused(begun, cli, how, named):
    change(begun, how)
    before = (begun / ".autoquant" / "s.journal").read_bytes()
    refused = cli("resume", "s", "--trials", 6)
    assert (refused.status, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert "study s: its data have changed since the study began (" in refused.err
    assert any(name in refused.err for name in named)
    assert "--accept-changes" in refused.err
    assert (begun / ".autoquant" / "s.journal").read_bytes() == before
    accepted = cli("resume", "s", "--trials", 6, "--accept-changes")
    assert accepted.done, accepted.err


@pytest.mark.parametrize("how", [longer, in_another_order])
def test_what_was_searched_by_is_never_confirmed_with(begun, cli, how, monkeypatch):
    def inputs(pairs):
        return set(sample_digests(x for x, _ in pairs))

    from autoquant.study.source import Source

    earlier = make_splits(Source("", str(begun / "task.py")).load_task())
    change(begun, how)
    used = {}
    from autoquant.optimize import resume

    opened = resume.open_session

    def watched(*args, **kwargs):
        session = opened(*args, **kwargs)
        used["confirm"] = inputs(session.splits.confirm)
        used["search"] = inputs(session.splits.search)
        return session

    with monkeypatch.context() as patch:
        patch.setattr(resume, "open_session", watched)
        accepted = cli("resume", "s", "--trials", 6, "--accept-changes")
    assert accepted.done, accepted.err
    assert "samples to confirm with were searched by before: not used" in accepted.err
    assert used["confirm"]
    assert not used["confirm"] & (inputs(earlier.search) | used["search"])
    # The next change leaves alone what either run has searched by.
    change(begun, lambda x, y: (x.flip(0), y.flip(0)))
    seen = inputs(earlier.search) | used["search"]
    with monkeypatch.context() as patch:
        patch.setattr(resume, "open_session", watched)
        cli("resume", "s", "--trials", 7, "--accept-changes")
    assert not used["confirm"] & seen


def test_unchanged_data_go_on_whole(begun, cli):
    again = cli("resume", "s", "--trials", 6)
    assert again.done
    assert "not used" not in again.err


def test_another_float_metric_is_noticed(project, cli):
    text = (project / "task.py").read_text()
    helper = "def scored(o, t):\n    return float((o.argmax(1) == t).float().mean())\n"
    (project / "helper.py").write_text(helper)
    task = text.replace('metric = "accuracy"', "from helper import scored as metric")
    (project / "task.py").write_text(task)
    words = ("--task", "task.py", "--trials", 3, "--study", "s", "--max-drop", "0.05")
    result = cli("search", "model.pt", *words)
    assert result.done, result.err
    import sys

    sys.modules.pop("helper")
    (project / "helper.py").write_text(helper.replace("mean()", "mean()) * 0.5 + float(0"))
    refused = cli("resume", "s", "--trials", 4)
    sys.modules.pop("helper", None)
    assert refused.status == 2
    assert "study s: the float model's scored is " in refused.err.splitlines()[-1]
    assert ", and was " in refused.err


def test_another_release_is_refused_and_another_torch_is_said(begun, cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(header, "__version__", "9.9")
        refused = cli("resume", "s")
    assert refused.status == 2
    assert "study s: it was begun by autoquant 0.1.0, this is 9.9" in refused.err
    assert "--accept-changes" in refused.err
    ledger = Ledger.open("s", None)
    ledger.note(versions=ledger.header["versions"] | {"torch": "2.9.1"})
    said = cli("resume", "s")
    assert said.done
    assert "note: the study was begun with torch 2.9.1, this is " in said.err


X = torch.randn(160, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(160) % 4


class Shuffled(torch.utils.data.Dataset):
    def __len__(self):
        return 160

    def __getitem__(self, i):
        return X[i], Y[i]


def loader(**options):
    return torch.utils.data.DataLoader(Shuffled(), batch_size=40, **options)


def augmented():
    for x, y in zip(X.split(40), Y.split(40), strict=True):
        yield x + 0.01 * torch.randn_like(x), y


def other_targets():
    for x in X.split(40):
        yield x, torch.randint(0, 4, (40,))


def fewer(calls=iter(range(9))):  # noqa: B008
    return [(X, Y)] * (3 - next(calls))


NET = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
FINE = {"evaluation_data": list(zip(X.split(40), Y.split(40), strict=True))}
OTHER = "evaluation_data gives other data each time it is read (batch 1 differs)"
CASES = {
    "a shuffled loader": ({"evaluation_data": loader(shuffle=True)}, OTHER),
    "a function with a shuffled loader": (
        {"evaluation_data": lambda: loader(shuffle=True)},
        OTHER,
    ),
    "augmented": ({"evaluation_data": augmented}, OTHER),
    "random targets": ({"evaluation_data": other_targets}, OTHER),
    "a generator": (
        {"evaluation_data": (pair for pair in FINE["evaluation_data"])},
        "evaluation_data gives 4 batches the first time and 0 the second",
    ),
    "fewer each time": (
        {"evaluation_data": fewer},
        "evaluation_data gives 3 batches the first time and 2 the second",
    ),
    "calibration data": (
        FINE | {"calibration_data": lambda: iter([torch.randn(40, 12)])},
        "calibration_data gives other data each time it is read (batch 1 differs)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_that_differ_from_one_reading_to_the_next_are_named(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts, words = CASES[case]
    with pytest.raises(TaskError) as caught:
        autoquant.search(NET, autoquant.Task(metric="accuracy", **parts), trials=2)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_seeded_anew_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def seeded():
        return loader(shuffle=True, generator=torch.Generator().manual_seed(1))

    task = autoquant.Task(metric="accuracy", evaluation_data=seeded)
    autoquant.search(NET, task, trials=2, max_drop="50%")


def test_samples_of_a_type_of_one_s_own_are_told_by_what_they_hold():
    from autoquant.models.digests import glimpse

    same = [Path("a"), torch.Size([3])]
    assert glimpse(same) == glimpse([Path("a"), torch.Size([3])])
    assert glimpse(same) != glimpse([Path("b"), torch.Size([3])])
    big = torch.zeros(1 << 20)
    moved = big.clone()
    moved[::2] = 1
    assert glimpse(big) != glimpse(moved)
    assert glimpse(big) == glimpse(big.clone())
