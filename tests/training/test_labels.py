"""Labels: the task's own loss is made small beside how far outputs are from the float model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.models.task import Task
from autoquant.session.session import Session
from autoquant.session.training import lesson_of, train_layers
from autoquant.spec.recipe import SiteRecipe
from autoquant.training.train import Trained, student_of
from autoquant.training.trainer import Trainer
from tests.training.models import W2A4, W3A8, everywhere, inputs, model_of, opened, task_of
from tests.training.test_train import SHORT

ALONE = replace(SHORT, labels=1.0)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def labelled(turn: int = 1, **words: Any) -> Task:
    """Return a task whose classes are the float model's, ``turn`` further on."""
    model = model_of("mlp")
    x = inputs()[:200]  # what is calibrated with
    with torch.no_grad():
        y = (model(x).argmax(1) + turn) % 4
    pairs = list(zip(x.split(50), y.split(50), strict=True))
    given = {"training_data": lambda: pairs, "training_loss": cross_entropy}
    return task_of(model, **(given | words))


def run(
    session: Session, technique: Any = ALONE, recipe: SiteRecipe = W3A8, **words: Any
) -> Trained:
    return train_layers(session, everywhere(session, recipe), technique, **words)


def test_by_labels_alone_it_learns_what_they_say_and_not_what_the_float_model_does() -> None:
    session = opened(task=labelled())
    student = student_of(session.applier, everywhere(session, W3A8), ALONE)
    lesson = lesson_of(session)
    trainer = Trainer(student, lesson, replace(ALONE, weight_rate=0.2))
    x = inputs()[200:]
    with torch.no_grad():
        wanted = (model_of("mlp")(x).argmax(1) + 1) % 4

    def right() -> float:
        with torch.no_grad(), student.learning():
            return float((session.model(x).argmax(1) == wanted).float().mean())

    before = right()
    while trainer.done < ALONE.steps:
        trainer.step()
    assert before < 0.3
    assert right() > before + 0.2


def test_the_loss_of_a_step_is_the_mixture() -> None:
    first = {}
    for labels in (0.0, 0.3, 1.0):
        session = opened(task=labelled())
        technique = replace(SHORT, labels=labels)
        student = student_of(session.applier, everywhere(session, W3A8), technique)
        trainer = Trainer(student, lesson_of(session), technique)
        trainer.step()
        first[labels] = trainer.losses[0]
    assert first[0.3] == pytest.approx(0.7 * first[0.0] + 0.3 * first[1.0], rel=1e-5)


def test_without_a_share_they_change_nothing() -> None:
    found = run(opened(task=labelled()), replace(SHORT, labels=0.0))
    bare = run(opened(task=labelled(training_loss=None)), SHORT)
    assert {s.learned for s in found.sites.values()} == {s.learned for s in bare.sites.values()}
    assert found.after < found.before


def test_the_float_model_is_not_asked_where_it_does_not_count() -> None:
    taught = []

    class Listening(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            taught.append(not torch.is_grad_enabled())
            return super().forward(x)

    model = Listening(*model_of("mlp"))
    session = opened(model=model, task=labelled())
    student = student_of(session.applier, everywhere(session, W3A8), ALONE)
    lesson = lesson_of(session)
    for labels, count in ((1.0, 0), (0.5, 3)):
        trainer = Trainer(student, lesson, replace(ALONE, labels=labels))
        taught.clear()
        for _ in range(3):
            trainer.step()
        assert sum(taught) == count


def test_what_is_worse_on_held_back_data_is_not_kept() -> None:
    found = run(opened(task=labelled()), replace(ALONE, weight_rate=0.2))
    assert found.after == found.before
    assert not any(site.learned for site in found.sites.values())


def test_interrupted_and_gone_on_with_is_the_same(tmp_path: Path) -> None:
    technique = replace(SHORT, labels=0.1)
    whole = run(opened(task=labelled(0)), technique, recipe=W2A4)
    file = tmp_path / "c.safetensors"

    def stop(number: int) -> None:
        if number == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(opened(task=labelled(0)), technique, recipe=W2A4, heed=stop, checkpoint=file)
    steps: list[int] = []
    again = run(
        opened(task=labelled(0)), technique, recipe=W2A4, heed=steps.append, checkpoint=file
    )
    assert steps[0] == 12
    assert again.sites == whole.sites
    assert whole.after < whole.before


def test_a_checkpoint_with_other_targets_is_not_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    run(opened(task=labelled(0)), replace(SHORT, labels=0.5), checkpoint=file)
    steps: list[int] = []
    run(opened(task=labelled(1)), replace(SHORT, labels=0.5), heed=steps.append, checkpoint=file)
    assert steps[0] == 0


def _raises(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ValueError("no such class")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (_raises, "training_loss failed: ValueError: no such class"),
        (lambda o, t: 1.0, "training_loss returned a float: expected a tensor with one number"),
        (
            lambda o, t: (o - 1).square().mean(1),
            r"returned a tensor of shape \[\d+\]: expected one",
        ),
        (lambda o, t: (o.argmax(1) == t).float().mean(), "training_loss has no gradient"),
    ],
)
def test_a_loss_that_can_not_be_made_small_is_one_line(loss: Any, words: str) -> None:
    with pytest.raises(TrialError, match=words):
        run(opened(task=labelled(training_loss=loss)))
