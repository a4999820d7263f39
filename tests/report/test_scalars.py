"""Scalars of training, read back by TensorBoard itself."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace

import pytest

from autoquant.errors import UserError
from autoquant.libraries import library
from autoquant.report.scalars import ScalarLog, check_scalars
from autoquant.training.guard import Finding
from autoquant.training.rates import Rate
from autoquant.training.train import Moment, Step

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RATES = (
    Rate("enc.0", "weight", 1e-3, 1.0),
    Rate("enc.1", "weight", 5e-4, 0.5),
    Rate("enc.0", "scale", 0.0, 0.0),
)
FINDING = Finding(9, "enc.1", "its gradient is not finite", "back to the last check")
MOMENT = Moment(10, 40, 0.25, 0.125, 0.0625, 0.01, (FINDING,), "accuracy", 0.875, RATES, 0.2)
WARNINGS: list[str] = []


def log_of(folder):
    WARNINGS.clear()
    return ScalarLog(folder, WARNINGS.append)


def read(folder):
    """Return tag → [(step, value)], and the texts by step."""
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    found.Reload()
    tags = found.Tags()
    scalars = {t: [(e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]}
    texts = {
        t: [(e.step, e.tensor_proto.string_val[0]) for e in found.Tensors(t)]
        for t in tags["tensors"]
    }
    return scalars, texts


def train(log, first, last, loss=1.0, every=10):
    for number in range(first, last + 1):
        log.step(Step(number, 40, loss / number))
        if number % every == 0:
            log.check(replace(MOMENT, step=number, held=loss / number))


def test_what_is_written_is_what_tensorboard_reads(tmp_path):
    log = log_of(tmp_path / "new" / "logs")
    log.step(Step(0, 40, 99.0))  # of a race
    log.step(Step(9, 40, 0.5, (FINDING,)))
    log.step(Step(10, 40, math.nan))
    log.check(MOMENT)
    scalars, texts = read(tmp_path / "new" / "logs")  # before it is closed, too
    log.close()
    assert WARNINGS == []
    assert scalars.pop("loss/step")[0] == (9, 0.5)
    expected = {
        "loss/mean": 0.25,
        "loss/held": 0.125,
        "loss/best": 0.0625,
        "metric/accuracy": 0.875,
        "weights/frozen": 0.01,
        "weights/lost": 0.2,
        "rate/weight": 1e-3,
        "rate/scale": 0.0,
        "rate_weight/enc.0": 1e-3,
        "rate_weight/enc.1": 5e-4,
        "rate_scale/enc.0": 0.0,
    }
    assert scalars == {tag: [(10, pytest.approx(v, rel=1e-6))] for tag, v in expected.items()}
    assert texts == {"findings": [(10, f"- {FINDING}".encode())]}


def test_tensorboard_takes_findings_for_text(tmp_path):
    log = log_of(tmp_path)
    log.check(MOMENT)
    log.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.SummaryMetadata("findings").plugin_data.plugin_name == "text"


def test_a_check_without_a_metric_or_findings(tmp_path):
    log = log_of(tmp_path)
    log.check(replace(MOMENT, value=None, held=math.inf, findings=()))
    log.close()
    scalars, texts = read(tmp_path)
    assert "metric/accuracy" not in scalars
    assert scalars["loss/held"] == [(10, math.inf)]
    assert texts == {}


def test_what_goes_on_takes_the_place_of_what_was_lost(tmp_path):
    killed = log_of(tmp_path)
    train(killed, 1, 27)
    killed.close()
    again = log_of(tmp_path)
    train(again, 21, 40, loss=2.0)
    again.close()
    scalars, texts = read(tmp_path)
    assert [step for step, _ in scalars["loss/step"]] == list(range(1, 41))
    values = dict(scalars["loss/step"])
    assert values[20] == pytest.approx(1.0 / 20)
    assert values[21] == pytest.approx(2.0 / 21)
    assert [step for step, _ in scalars["loss/held"]] == [10, 20, 30, 40]
    assert [step for step, _ in texts["findings"]] == [10, 20, 30, 40]


def test_what_begins_anew_takes_the_place_of_all(tmp_path):
    for loss, last in ((1.0, 30), (2.0, 20)):
        log = log_of(tmp_path)
        train(log, 1, last, loss)
        log.close()
    scalars, _ = read(tmp_path)
    assert scalars["loss/held"] == [(n, pytest.approx(2.0 / n)) for n in (10, 20)]
    assert len(scalars["loss/step"]) == 20


def test_no_training_writes_nothing(tmp_path):
    log = log_of(tmp_path / "logs")
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("buffered", "every"),
    [(16, 10), (2**20, 10), (2**20, 100)],
    ids=["written", "flushed", "closed"],
)
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, buffered, every):
    log = log_of(tmp_path)
    train(log, 1, 12)
    with log._file as own, open("/dev/full", "wb", buffering=buffered) as full:
        log._file = log._records._writer = full
        train(log, 13, 40, every=every)
        log.close()
        log.close()
    assert own.closed
    line = f"warning: --log {tmp_path}: No space left on device; no more is logged"
    assert [line] == WARNINGS
    scalars, _ = read(tmp_path)
    assert scalars["loss/held"] == [(10, pytest.approx(0.1))]


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    log = log_of(tmp_path / "file" / "logs")
    train(log, 1, 12)
    log.close()
    assert len(WARNINGS) == 1
    assert "Not a directory; no more is logged" in WARNINGS[0]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    check_scalars()
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    library.cache_clear()
    with pytest.raises(UserError, match="pip install tensorboard"):
        check_scalars()
