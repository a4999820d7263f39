"""A journal that is killed, filled up or shared keeps whole lines."""

import errno
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileBackend

from autoquant.errors import StudyError
from autoquant.study.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.journal"


def logs(n, start=0):
    return [{"op_code": 0, "n": i, "text": "line\nend \u2028 ä"} for i in range(start, start + n)]


def read(path):
    return list(Journal(path).read_logs(0))


def test_what_is_appended_is_read(path):
    journal = Journal(path)
    journal.append_logs(logs(2))
    journal.append_logs(logs(3, 2))
    assert read(path) == logs(5)
    assert list(journal.read_logs(3)) == logs(2, 3)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_cut_anywhere_it_loses_the_line_in_flight_alone(path, data):
    path.unlink(missing_ok=True)
    Journal(path).append_logs(logs(4))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    assert read(path) == logs(left)
    Journal(path).append_logs(logs(1, 9))
    assert read(path) == [*logs(left), *logs(1, 9)]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"3", b"", b"\xff\xfe", b"plain words"])
def test_damage_before_the_end_is_refused_and_nothing_is_touched(path, line):
    Journal(path).append_logs(logs(2))
    whole = path.read_bytes() + line + b"\n" + b'{"op'
    path.write_bytes(whole)
    with pytest.raises(StudyError) as caught:
        Journal(path)
    message = f"{path}: line 3 is damaged or this is no study journal; restore the file from a copy"
    assert str(caught.value).startswith(message)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_write_that_fails_half_way_is_taken_back(path, monkeypatch, share):
    journal = Journal(path)
    journal.append_logs(logs(2))

    def half(self, new):
        text = "".join(json.dumps(log) + "\n" for log in new)
        with open(path, "a") as file:
            file.write(text[: int(len(text) * share)])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", half)
        with pytest.raises(OSError, match="No space left"):
            journal.append_logs(logs(1, 2))
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1]
    journal.append_logs(logs(1, 2))
    assert read(path) == logs(3)


def test_a_line_that_another_process_wrote_is_not_taken_back(path, monkeypatch):
    journal, other = Journal(path), Journal(path)
    append = JournalFileBackend.append_logs

    def after_another(self, new):
        append(other, logs(1))
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", after_another)
        with pytest.raises(OSError, match="Input/output"):
            journal.append_logs(logs(1, 1))
    assert read(path) == logs(1)


WRITE = """
import sys
from pathlib import Path
from autoquant.study.journal import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(50):
    journal.append_logs([{"n": int(sys.argv[2]) + i}])
"""
HOLD = """
import sys, time
from pathlib import Path
from autoquant.study.journal import ProcessLock
ProcessLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_writers_do_not_disturb_each_other(path):
    writers = [start(WRITE, path, 1000 * k) for k in range(3)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    found = [log["n"] for log in read(path)]
    assert sorted(found) == [1000 * k + i for k in range(3) for i in range(50)]
    for k in range(3):
        assert [n for n in found if n // 1000 == k] == [1000 * k + i for i in range(50)]


def test_a_killed_process_leaves_no_lock_behind(path):
    Journal(path).append_logs(logs(1))
    with start(HOLD, path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    Journal(path).append_logs(logs(1, 1))
    assert read(path) == logs(2)
