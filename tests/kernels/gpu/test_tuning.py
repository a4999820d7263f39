import json
from pathlib import Path

import pytest
import torch

from autoquant.kernels.gpu.launch import config
from autoquant.kernels.gpu.tuning import MAX_BUCKET, Tuner, bucket, cache_file, tuned

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
    def run(c):
        raise AssertionError

    assert tuned("kernel", (1,), CONFIGS, run, torch.device("cpu")) == CONFIGS[0]
