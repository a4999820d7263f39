"""The file of times: it helps where it can, and never fails anything."""

import json

import pytest
import torch

from autoquant.measure import latency_cache as module
from autoquant.measure.latency_cache import LatencyCache, cache_path, device_name, machine_key


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "autoquant" / "latency.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path() == tmp_path / ".cache" / "autoquant" / "latency.json"


def test_what_is_put_is_read_back(tmp_path):
    path = tmp_path / "new" / "latency.json"
    cache = LatencyCache(path)
    assert cache.get("a") is None
    cache.save()
    assert not path.exists()
    cache.put("a", 0.25)
    cache.save()
    other = LatencyCache(path)
    assert other.get("a") == 0.25
    assert [p.name for p in path.parent.iterdir()] == ["latency.json"]


def test_two_writers_keep_what_the_other_wrote(tmp_path):
    path = tmp_path / "latency.json"
    one, two = LatencyCache(path), LatencyCache(path)
    one.put("a", 1.0)
    two.put("b", 2.0)
    one.save()
    two.save()
    assert (LatencyCache(path).get("a"), LatencyCache(path).get("b")) == (1.0, 2.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99, "seconds": {"a": 1}}',
        '{"format": 1}',
        '{"format": 1, "seconds": [1]}',
        '{"format": 1, "seconds": {"a": "fast", "b": null, "c": -1, "d": true, "e": NaN}}',
        '{"format": 1, "seconds": {"a": Infinity}}',
        "[" * 100_000,
    ],
)
def test_a_corrupt_file_is_ignored_and_replaced(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    cache = LatencyCache(path)
    assert all(cache.get(key) is None for key in "abcde")
    cache.put("a", 1.0)
    cache.save()
    assert json.loads(path.read_text()) == {"format": 1, "seconds": {"a": 1.0}}


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "latency.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert LatencyCache(path).get("a") is None


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = LatencyCache(tmp_path / "file" / "latency.json")
    cache.put("a", 1.0)
    cache.save()
    assert cache.get("a") == 1.0
    folder = tmp_path / "latency.json"
    folder.mkdir()
    cache = LatencyCache(folder)
    cache.put("a", 1.0)
    cache.save()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_key_names_what_times_depend_on(monkeypatch):
    cpu = torch.device("cpu")
    key = machine_key(cpu)
    assert device_name(cpu) in key
    assert torch.__version__ in key
    assert module.runtime_version() in key
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert machine_key(cpu) != key


def test_the_key_changes_with_the_code_that_runs(monkeypatch, tmp_path):
    package = tmp_path / "measure"
    package.mkdir()
    (tmp_path / "nn").mkdir()
    code = tmp_path / "nn" / "slots.py"
    code.write_text("x = 1")
    monkeypatch.setattr(module, "__file__", str(package / "latency_cache.py"))
    version = module.runtime_version.__wrapped__
    before = version()
    assert version() == before
    code.write_text("x = 2")
    assert version() != before
