from __future__ import annotations

import functools

import pytest
from torch import nn

from autoquant.errors import TaskError
from autoquant.models.direction import name_of, sounds_smaller
from autoquant.models.task import Task

DATA = [([1], [1])]


SMALLER = """
val_loss loss error mean_squared_error rmse RMSE perplexity my_perplexity crossentropy wer nll
CrossEntropyLoss MSELoss wordErrorRate mpjpe neg_log_loss
"""
OTHERS = """
accuracy top5 metric evaluate score f1 auc r2 bleu per_class_accuracy terrific closeness iou mAP
lossless_ratio <lambda> psnr
"""


@pytest.mark.parametrize("name", SMALLER.split())
def test_names_that_say_smaller_is_better(name):
    assert sounds_smaller(name)


@pytest.mark.parametrize("name", OTHERS.split())
def test_names_that_do_not(name):
    assert not sounds_smaller(name)


def my_loss(*_) -> float:
    return 0.0


@pytest.mark.parametrize("function", [my_loss, functools.partial(my_loss, 1), nn.MSELoss()])
@pytest.mark.parametrize("what", ["metric", "evaluate"])
def test_a_loss_is_asked_which_way_it_goes(function, what):
    parts = {what: function} | ({"evaluation_data": DATA} if what == "metric" else {})
    with pytest.raises(TaskError) as raised:
        Task(**parts, source="t.py")
    assert str(raised.value) == (
        f"t.py: is a smaller {name_of(function)} better, as its name says? add the line "
        "`higher_is_better = False`, or `higher_is_better = True` if a larger one is"
    )
    for told in (True, False):
        assert Task(**parts, higher_is_better=told).higher_is_better is told


def test_a_metric_by_name_knows():
    assert Task(evaluation_data=DATA, metric="perplexity").higher_is_better is None
