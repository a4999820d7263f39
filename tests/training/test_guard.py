"""What goes wrong in training is seen, said and mended."""

from __future__ import annotations

import math

import pytest
import torch

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.session.training import lesson_of
from autoquant.spec.techniques import ESTIMATORS
from autoquant.training import trainer as module
from autoquant.training.guard import FARTHEST, LAST, GradientWatch, LossWatch, vanished
from autoquant.training.learner import SCALE, WEIGHT
from autoquant.training.student import Student
from autoquant.training.trainer import Trainer
from tests.training.models import everywhere, opened


def trainer_of(**words: float) -> Trainer:
    session = opened("mlp")
    student = Student(session.applier, everywhere(session), lambda _: ESTIMATORS.get("lsq")())
    return Trainer(student, lesson_of(session), Distillation(**({"steps": 40} | words)))  # type: ignore[arg-type]


def test_a_loss_of_one_batch_may_be_any_but_not_the_last_ones_together() -> None:
    watch = LossWatch()
    assert [watch.astray(1.0 + 0.1 * (i % 3)) for i in range(30)] == [None] * 30
    assert watch.astray(9.0) is None
    found = [watch.astray(9.0) for _ in range(LAST - 1)]
    assert found[-1] is not None
    assert "usually" in found[-1]
    assert watch.astray(math.nan) == "the loss is not finite"
    again = LossWatch()
    again.load(watch.state())
    assert again.state() == watch.state()
    watch.forget()
    assert watch.astray(9.0) is None


def test_a_long_gradient_is_cut_to_a_multiple_of_its_usual_length() -> None:
    watch = GradientWatch(3.0)
    for _ in range(10):
        assert watch.heed("a", [torch.ones(4)])
    long = [torch.full((4,), 100.0)]
    assert watch.heed("a", long)
    assert float(long[0].norm()) == pytest.approx(6.0, rel=1e-5)
    assert not watch.heed("a", [torch.tensor([math.nan])])
    short = [torch.full((4,), 0.5)]
    assert watch.heed("a", short)
    assert torch.equal(short[0], torch.full((4,), 0.5))


def test_a_gradient_that_is_not_finite_takes_its_layer_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of()
    for _ in range(3):
        trainer.step()
    trainer.keep()
    kept = trainer.state()["tensors"]
    own = trainer._gradients

    def poisoned(number: int):
        loss, gradients = own(number)
        gradients["2", WEIGHT][0, 0] = math.nan
        return loss, gradients

    monkeypatch.setattr(trainer, "_gradients", poisoned)
    trainer.step()
    monkeypatch.undo()
    assert trainer.done == 4
    (finding,) = trainer.findings
    assert (finding.step, finding.layer) == (3, "2")
    assert "not finite" in finding.what
    assert "halved" in finding.done
    assert all(torch.equal(v, kept[k]) for k, v in trainer.state()["tensors"].items())
    shares = {g["site"]: g["share"] for g in trainer._optimizer.param_groups}
    assert shares == {"0": 1.0, "2": 0.5, "4": 1.0}
    trainer.step()
    assert all(bool(p.isfinite().all()) for _, _, p in trainer.student.parameters())


def test_rates_that_are_far_too_high_end_in_no_numbers_that_are_none() -> None:
    trainer = trainer_of(
        weight_rate=1.0, scale_rate=1.0, bias_rate=1.0, activation_rate=1.0, warmup=0.0
    )
    for _ in range(40):
        trainer.step()
    found = [(f.layer, f.what) for f in trainer.findings]
    assert any(what == "a scale ran off" for _, what in found)
    assert len(found) == len(set(found))  # each is said once
    for name, kind, parameter in trainer.student.parameters():
        assert bool(parameter.isfinite().all())
        if kind == SCALE:
            off = parameter - trainer._start[name][kind]
            assert float(off.detach().abs().max()) <= FARTHEST + 1e-6


def test_a_layer_all_of_whose_weights_became_one_number_is_taken_back() -> None:
    trainer = trainer_of()
    learner = trainer.student.learners["2"]
    with torch.no_grad():
        learner.parameters[WEIGHT].zero_()
    trainer.check()
    assert torch.equal(learner.parameters[WEIGHT], trainer._start["2"][WEIGHT])
    assert [f.layer for f in trainer.findings] == ["2"]
    trainer.step()
    assert torch.equal(learner.parameters[WEIGHT], trainer._start["2"][WEIGHT])


def test_weights_that_go_back_and_forth_are_frozen() -> None:
    trainer = trainer_of(steps=80, weight_rate=0.2, freezing=0.02, warmup=0.0)
    for _ in range(80):
        trainer.step()
    assert 0.0 < trainer.frozen < 1.0
    learner, seen = trainer.student.learners["2"], trainer._oscillation["2"]
    before = learner.integers()[seen.frozen]
    assert len(before)
    assert torch.equal(before, seen.held()[seen.frozen])
    free = trainer_of(steps=80, weight_rate=0.2, freezing=1.0, warmup=0.0)
    for _ in range(80):
        free.step()
    assert free.frozen == 0.0


def test_weights_that_rounding_makes_none_are_counted() -> None:
    trainer = trainer_of()
    learner = trainer.student.learners["2"]
    weight = learner.slot.target
    q = learner.solution()[0].q
    assert vanished(learner) == (int(((q == 0) & (weight != 0)).sum()), int((weight != 0).sum()))


def test_batches_that_do_not_fit_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(batch=16)
    own, sizes = module.Trainer._gradients, []

    def small(self: Trainer, number: int):
        sizes.append(self._batch)
        if self._batch > 4:
            raise MemoryError
        return own(self, number)

    monkeypatch.setattr(module.Trainer, "_gradients", small)
    trainer.step()
    trainer.step()
    assert sizes == [16, 8, 4, 4]
    assert [f.what for f in trainer.findings] == ["out of memory"] * 2
    assert "4 samples" in trainer.findings[-1].done


def test_rates_tell_what_the_guard_left_of_them() -> None:
    trainer = trainer_of()
    trainer.step()
    first = {(r.site, r.kind): r for r in trainer.rates()}
    assert all(r.share == 1.0 and r.rate > 0 for r in first.values())
    name, other = list(trainer.student.learners)[:2]
    trainer._stop_kind(name, SCALE, "a scale ran off", "held")
    trainer._go_back(other, "its gradient is not finite")
    trainer._off.add(name)
    for row in trainer.rates():
        expected = {name: 0.0, other: 0.5}.get(row.site, 1.0)
        assert row.share == expected
        assert (row.rate > 0) == (expected > 0)
