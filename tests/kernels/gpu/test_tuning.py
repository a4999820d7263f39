import json
from pathlib import Path

import pytest
import torch

from autoquant.kernels.gpu import tuning
from autoquant.kernels.gpu.defaults import Gpu
from autoquant.kernels.gpu.launch import config
from autoquant.kernels.gpu.tuning import (
    ASK,
    MAX_BUCKET,
    Chooser,
    Tuner,
    asked,
    bucket,
    cache_file,
    first_that_runs,
    gpu_of,
    tuned,
)

CONFIGS = (config(BLOCK=16), config(BLOCK=32), config(BLOCK=64, warps=8))


class Clock:
    """Says that the second config is the fastest, and that the third does not run."""

    def __init__(self, times=(2.0, 1.0, None)):
        self.times = dict(zip(CONFIGS, times, strict=True))
        self.ran = []

    def run(self, c):
        self.ran.append(c)

    def measure(self, call):
        call()
        time = self.times[self.ran[-1]]
        if time is None:
            raise RuntimeError("out of shared memory")
        return time


def test_the_fastest_is_chosen_once_and_remembered_on_disk(tmp_path):
    clock, path = Clock(), tmp_path / "deep" / "triton.json"
    tuner = Tuner(clock.measure, path)
    for _ in range(3):
        assert tuner.choose("GPU", "kernel", (16, 8), CONFIGS, clock.run) == CONFIGS[1]
    assert len(clock.ran) == 3
    again = Tuner(clock.measure, path)
    assert again.choose("GPU", "kernel", (16, 8), CONFIGS, clock.run) == CONFIGS[1]
    assert len(clock.ran) == 3
    assert [p.name for p in path.parent.iterdir()] == ["triton.json"]


def test_another_gpu_kernel_shape_or_set_of_configs_is_measured(tmp_path):
    clock = Clock()
    tuner = Tuner(clock.measure, tmp_path / "triton.json")
    keys = [("A", "k", (1,)), ("B", "k", (1,)), ("A", "l", (1,)), ("A", "k", (2,))]
    for key in keys:
        tuner.choose(*key, CONFIGS, clock.run)
    assert len(clock.ran) == 12
    assert tuner.choose("A", "k", (1,), CONFIGS[:1], clock.run) == CONFIGS[0]
    assert len(clock.ran) == 13


def test_none_runs(tmp_path):
    clock = Clock((None, None, None))
    tuner = Tuner(clock.measure, tmp_path / "triton.json")
    assert tuner.choose("GPU", "kernel", (1,), CONFIGS, clock.run) is None
    assert not (tmp_path / "triton.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"version": 1}',
        '{"version": 1, "choices": []}',
        '{"version": 1, "choices": {"GPU | kernel | 1": 3}}',
        '{"version": 99, "choices": {"GPU | kernel | 1": {"BLOCK": 64}}}',
        '{"version": 1, "choices": {"GPU | kernel | 1": {"BLOCK": 7}}}',
        "\x00\xff",
    ],
)
def test_a_file_that_holds_something_else_counts_as_empty(tmp_path, text):
    path = tmp_path / "triton.json"
    path.write_bytes(text.encode("latin-1"))
    clock = Clock()
    assert (
        Tuner(clock.measure, path).choose("GPU", "kernel", (1,), CONFIGS, clock.run) == CONFIGS[1]
    )
    assert json.loads(path.read_text())["choices"]["GPU | kernel | 1"]["BLOCK"] == 32


def test_what_another_process_wrote_is_kept(tmp_path):
    path = tmp_path / "triton.json"
    clock = Clock()
    first, second = Tuner(clock.measure, path), Tuner(clock.measure, path)
    first.choose("GPU", "a", (1,), CONFIGS, clock.run)
    second.choose("GPU", "b", (1,), CONFIGS, clock.run)
    first.choose("GPU", "c", (1,), CONFIGS, clock.run)
    assert len(json.loads(path.read_text())["choices"]) == 3


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    tuner = Tuner(clock.measure, tmp_path / "file" / "triton.json")
    assert tuner.choose("GPU", "kernel", (1,), CONFIGS, clock.run) == CONFIGS[1]


def test_where_choices_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "autoquant" / "triton.json"
    for value in ("", "relative"):  # the specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_file() == Path.home() / ".cache" / "autoquant" / "triton.json"


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 64, 65, 10**8)] == [1, 2, 4, 64, 128, MAX_BUCKET]


def test_nothing_is_measured_on_a_cpu():
    ran = []
    assert tuned("kernel", (1,), CONFIGS, ran.append, torch.device("cpu")) == CONFIGS[0]
    assert ran == [CONFIGS[0]]


GPU = Gpu(90, 132, 227 * 1024, "GPU")
ORDER = [CONFIGS[0], CONFIGS[1], CONFIGS[2]]  # of a kernel that nobody knows, as it offers them


class Launches:
    """Takes every config but those that it refuses."""

    def __init__(self, *refused):
        self.refused = refused
        self.tried = []

    def __call__(self, c):
        self.tried.append(c)
        if c in self.refused:
            raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def chooser(tmp_path):
    """Return a function that makes a Chooser, whose measuring fails the test unless it may."""

    def make(measure=None):
        def refuse(call):
            raise AssertionError("measured")

        return Chooser(Tuner(measure or refuse, tmp_path / "triton.json"))

    return make


def test_by_default_nothing_is_measured_and_one_launch_is_tried(chooser, tmp_path):
    choose, launches = chooser().choose, Launches()
    for _ in range(3):
        assert choose(GPU, "unknown", (1,), CONFIGS, launches) == ORDER[0]
    assert launches.tried == ORDER[:1]
    assert not (tmp_path / "triton.json").exists()


def test_what_does_not_run_is_followed_by_the_next_and_remembered(chooser):
    choose, launches = chooser().choose, Launches(*ORDER[:2])
    for _ in range(3):
        assert choose(GPU, "unknown", (1,), CONFIGS, launches) == ORDER[2]
    assert launches.tried == ORDER
    assert choose(GPU, "unknown", (2,), CONFIGS, Launches()) == ORDER[0]


def test_a_kernel_that_runs_with_nothing_is_not_tried_again(chooser):
    choose, launches = chooser().choose, Launches(*ORDER)
    for _ in range(3):
        assert choose(GPU, "unknown", (1,), CONFIGS, launches) is None
    assert launches.tried == ORDER
    assert choose(GPU, "unknown", (1,), CONFIGS[:1], Launches()) == ORDER[0]  # other configs


def test_used_up_memory_is_no_fault_of_a_config(chooser):
    def run(c):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        first_that_runs(CONFIGS, run)
    choose = chooser().choose
    with pytest.raises(torch.OutOfMemoryError):
        choose(GPU, "unknown", (1,), CONFIGS, run)
    assert choose(GPU, "unknown", (1,), CONFIGS, Launches()) == ORDER[0]


def test_what_was_measured_wins_and_what_ships_stands_behind_it(chooser, tmp_path):
    clock = Clock()
    measured = chooser(clock.measure).choose(GPU, "k", (1,), CONFIGS, clock.run, measures=True)
    assert measured == CONFIGS[1]
    for choose in (chooser().choose, chooser(clock.measure).choose):
        assert choose(GPU, "k", (1,), CONFIGS, Launches()) == measured
        assert choose(GPU, "k", (2,), CONFIGS, Launches()) == ORDER[0]
        assert choose(Gpu(90, 132, 1 << 17, "other"), "k", (1,), CONFIGS, Launches()) == ORDER[0]
    assert len(clock.ran) == 3
    launches = Launches(measured)
    assert chooser().choose(GPU, "k", (1,), CONFIGS, launches) == ORDER[0]
    assert launches.tried == [measured, ORDER[0]]


def test_measuring_can_be_asked_for_after_a_default_was_used(chooser):
    clock = Clock()
    choose = chooser(clock.measure).choose
    assert choose(GPU, "k", (1,), CONFIGS, clock.run) == ORDER[0]
    assert choose(GPU, "k", (1,), CONFIGS, clock.run, measures=True) == CONFIGS[1]
    assert choose(GPU, "k", (1,), CONFIGS, clock.run, measures=True) == CONFIGS[1]
    assert len(clock.ran) == 4


@pytest.mark.parametrize("measures", [False, True])
def test_nothing_runs_while_a_graph_is_captured(chooser, measures):
    choose = chooser(Clock().measure).choose

    def run(c):
        raise AssertionError

    assert choose(GPU, "k", (1,), CONFIGS, run, measures, captures=True) == ORDER[0]
    # Nor does that stand for an answer: the next call tries it.
    assert choose(GPU, "k", (1,), CONFIGS, Launches(ORDER[0])) == ORDER[1]
    assert choose(GPU, "k", (1,), CONFIGS, run, captures=True) == ORDER[1]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("On", True)]
)
def test_asking(monkeypatch, value, expected):
    monkeypatch.delenv(ASK, raising=False)
    if value is not None:
        monkeypatch.setenv(ASK, value)
    assert asked() is expected


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_a_gpu_is_asked_what_it_is(monkeypatch, tmp_path, asks, capturing):
    class Properties:
        major, minor, name = 8, 9, "some GPU"
        multi_processor_count = 58
        shared_memory_per_block_optin = 101376

    clock = Clock()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    tuner = Tuner(clock.measure, tmp_path / "triton.json")
    monkeypatch.setattr(tuning, "_CHOOSER", Chooser(tuner))
    monkeypatch.setenv(ASK, str(int(asks)))
    device = torch.device("cuda", 7)
    try:
        best = tuned("k", (1,), CONFIGS, clock.run, device)
        assert gpu_of(device) == Gpu(89, 58, 101376, "some GPU")
    finally:
        gpu_of.cache_clear()
    measures = asks and not capturing
    assert best == (CONFIGS[1] if measures else ORDER[0])
    assert len(clock.ran) == 1 + (0 if capturing else 3 if measures else 1)
    assert (tmp_path / "triton.json").exists() == measures
