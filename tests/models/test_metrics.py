import math
import random
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from torch.nn import functional as F

from autoquant.errors import TrialError, UserError
from autoquant.models.edit_distance import edit_distance
from autoquant.models.metrics import (
    METRICS,
    FunctionMetric,
    MaxDrop,
    drop,
    model_metric,
    parse_max_drop,
    resolve_metric,
)
from autoquant.models.task import Task

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(*tensors, sizes=(7, 1, 12)) -> list:
    """The tensors as a list of batches."""
    return list(zip(*(torch.split(t, list(sizes)) for t in tensors), strict=True))


def score(name: str, *batches) -> float:
    return METRICS.get(name).evidence(batches).score()


def example(name: str) -> list:
    """Three batches that suit the metric."""
    g = seeded(3)
    if name in ("accuracy", "top5", "f1"):
        return split(torch.randn(20, 9, generator=g), torch.randint(9, (20,), generator=g))
    if name == "perplexity":
        return split(torch.randn(20, 4, 6, generator=g), torch.randint(6, (20, 4), generator=g))
    if name in ("word_error_rate", "token_error_rate"):
        rng = random.Random(0)
        text = [" ".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(20)]
        other = [" ".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(20)]
        return [(text[:7], other[:7]), (text[7:], other[7:])]
    if name == "kl":
        return split(torch.randn(20, 5, generator=g), torch.randn(20, 5, generator=g))
    return split(torch.randn(20, generator=g), torch.randn(20, generator=g))


# Every metric


@pytest.mark.parametrize("name", METRICS.names())
def test_batching_does_not_change_the_score_and_resamples_equal_the_long_way(name):
    metric, batches = METRICS.get(name), example(name)
    evidence = metric.evidence(iter(batches))
    assert evidence.n == 20
    assert evidence.score_at(np.arange(20)) == evidence.score()
    indices = np.random.default_rng(0).integers(0, 20, (40, 20))
    long_way = [metric.score(evidence.stats[row]) for row in indices]
    assert np.allclose(evidence.scores_at(indices), long_way, rtol=1e-12)
    if all(isinstance(part, torch.Tensor) for batch in batches for part in batch):
        whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        assert score(name, whole) == pytest.approx(evidence.score(), rel=1e-12)


@pytest.mark.parametrize("name", METRICS.names())
def test_a_loss_a_sample_falls_where_the_metric_rises(name):
    metric = METRICS.get(name)
    evidence = metric.evidence(example(name))
    loss = metric.per_sample_loss(evidence)
    if name in ("f1", "pearson", "spearman"):
        assert loss is None
        return
    order = np.argsort(loss)
    best, worst = evidence.score_at(order[:5]), evidence.score_at(order[-5:])
    assert drop(metric, best, worst) > 0


@pytest.mark.parametrize("name", METRICS.names())
def test_no_outputs_is_an_error(name):
    with pytest.raises(TrialError, match="got no outputs"):
        METRICS.get(name).evidence([])


# Classification


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 999), st.sampled_from(DTYPES))
def test_accuracy_and_f1_equal_sklearn(classes, n, seed, dtype):
    g = seeded(seed)
    logits = torch.randn(n, classes, generator=g).to(dtype)
    y = torch.randint(classes, (n,), generator=g)
    predicted = logits.argmax(1)
    assert score("accuracy", (logits, y)) == pytest.approx(sk.accuracy_score(y, predicted))
    assert score("accuracy", (predicted, y)) == pytest.approx(sk.accuracy_score(y, predicted))
    average = "binary" if classes == 2 else "macro"
    expected = sk.f1_score(y, predicted, average=average, zero_division=0)
    assert score("f1", (logits, y)) == pytest.approx(expected)


def test_top5_equals_sklearn_and_torch():
    g = seeded()
    logits, y = torch.randn(200, 12, generator=g), torch.randint(12, (200,), generator=g)
    expected = sk.top_k_accuracy_score(y, logits, k=5, labels=range(12))
    assert score("top5", (logits, y)) == pytest.approx(expected)
    hits = (logits.topk(5).indices == y[:, None]).any(1).float().mean().item()
    assert score("top5", (logits, y)) == pytest.approx(hits)


def test_a_constant_output_is_not_in_the_top_five_always():
    assert score("top5", (torch.zeros(20, 10), torch.arange(20) % 10)) == 0.5


def test_positions_and_ignored_ones():
    g = seeded()
    logits, y = torch.randn(4, 3, 5, 5, generator=g), torch.randint(3, (4, 5, 5), generator=g)
    y[0], y[1, 2] = -100, -100
    used = y != -100
    expected = (logits.argmax(1) == y)[used].float().mean().item()
    assert score("accuracy", (logits, y)) == pytest.approx(expected)
    tokens, labels = logits.movedim(1, -1).reshape(4, 25, 3), y.reshape(4, 25)
    assert score("accuracy", (tokens, labels)) == pytest.approx(expected)
    macro = sk.f1_score(y[used], logits.argmax(1)[used], average="macro")
    assert score("f1", (tokens, labels)) == pytest.approx(macro)
    ragged = [(tokens[:2, :20], labels[:2, :20]), (tokens[2:], labels[2:])]
    kept = torch.cat([b.reshape(-1) for _, b in ragged])
    guess = torch.cat([a.argmax(-1).reshape(-1) for a, _ in ragged])
    macro = sk.f1_score(kept[kept != -100], guess[kept != -100], average="macro")
    assert score("f1", *ragged) == pytest.approx(macro)


@pytest.mark.parametrize(
    ("outputs", "targets", "part"),
    [
        (torch.zeros(4), torch.zeros(4), "do not fit"),
        (torch.zeros(4, 3), torch.zeros(4) + 0.5, "hold 0.5, which is no class"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "do not fit"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), "do not fit"),
        (torch.zeros(4, 3), torch.full((4,), 3), "target 3 is no class of 3"),
        (torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long), "contain NaN"),
        (torch.zeros(4, 4, 4), torch.zeros(4, 4, dtype=torch.long), "only one dimension"),
        ("text", torch.zeros(4), "not numbers"),
        (torch.zeros(4, 3), ["a"] * 4, "not numbers"),
    ],
)
def test_outputs_that_do_not_fit_are_one_line(outputs, targets, part):
    with pytest.raises(TrialError, match=part) as caught:
        score("accuracy", (outputs, targets))
    assert "\n" not in str(caught.value)


def test_top5_of_five_classes_and_all_ignored():
    with pytest.raises(TrialError, match="more than 5 classes"):
        score("top5", (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(TrialError, match="accuracy is nan"):
        score("accuracy", (torch.zeros(4, 3), torch.full((4,), -100)))


# Regression and correlation


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.integers(0, 999), st.sampled_from(DTYPES))
def test_regression_and_correlation_equal_sklearn_and_scipy(n, seed, dtype):
    g = seeded(seed)
    # Coarse numbers, so that there are ties.
    x = (torch.randn(n, generator=g) * 3).round().div(2).to(dtype)
    y = x.double() + torch.randn(n, generator=g).double().mul(2).round()
    x[0], y[0] = 50, -60
    assert score("mse", (x, y)) == pytest.approx(sk.mean_squared_error(y, x.double()))
    assert score("mae", (x[:, None], y)) == pytest.approx(sk.mean_absolute_error(y, x.double()))
    batch = (x, y[:, None])
    assert score("pearson", batch) == pytest.approx(stats.pearsonr(x.double(), y).statistic)
    assert score("spearman", batch) == pytest.approx(stats.spearmanr(x.double(), y).statistic)


def test_correlation_with_a_constant_is_an_error_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("pearson", "spearman"):
            evidence = METRICS.get(name).evidence([(torch.ones(9), torch.arange(9))])
            with pytest.raises(TrialError, match=f"metric {name} is nan"):
                evidence.score()
            assert np.isnan(evidence.scores_at(np.zeros((2, 9), dtype=int))).all()
    with pytest.raises(TrialError, match="one number a sample"):
        score("pearson", (torch.zeros(9, 2), torch.zeros(9, 2)))


# Language


@pytest.mark.parametrize("dtype", DTYPES)
def test_perplexity_is_the_exponential_of_torchs_cross_entropy(dtype):
    g = seeded()
    logits = torch.randn(6, 7, 11, generator=g).to(dtype)
    y = torch.randint(11, (6, 7), generator=g)
    y[2:4, 3:] = -100
    expected = F.cross_entropy(logits.float().reshape(-1, 11), y.reshape(-1)).exp().item()
    parts = [(logits[:3, :6], y[:3, :6]), (logits[3:], y[3:])]
    assert score("perplexity", (logits, y)) == pytest.approx(expected, rel=1e-6)
    assert METRICS.get("perplexity").evidence(parts).n == 6


def slow_distance(a, b) -> int:
    """The recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return slow_distance(a[:-1], b[:-1])
    return 1 + min(
        slow_distance(a[:-1], b), slow_distance(a, b[:-1]), slow_distance(a[:-1], b[:-1])
    )


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_equals_its_definition(a, b):
    assert edit_distance(a, b) == slow_distance(a, b)


def test_error_rates_by_hand():
    outputs = ["the cat sat", "hello", ""]
    targets = ["the cat sat down", ["goodbye", "hello there"], "a b"]
    # 1 of 4, 1 of 1 (the first of two as near), 2 of 2.
    assert score("word_error_rate", (outputs, targets)) == pytest.approx(4 / 7)
    phones = [["K", "AE1", "T"], ["D"]]
    nearest = [[["K", "AE1"], ["K", "AE1", "T", "S"]], [["D", "AO1", "G"]]]
    assert score("token_error_rate", (phones, nearest)) == pytest.approx((1 + 2) / (2 + 3))
    assert score("token_error_rate", (phones, [["K", "AE1", "T"], ["T"]])) == 0.25
    assert score("token_error_rate", (["kitten"], ["sitting"])) == pytest.approx(3 / 7)
    ids = torch.tensor([[1, 2, 3, -100], [4, 5, 6, 7]])
    assert score("token_error_rate", (ids, [[1, 2, 3], torch.tensor([4, 5])])) == 0.4


def test_error_rate_mistakes():
    with pytest.raises(TrialError, match="2 outputs for 1 targets"):
        score("token_error_rate", (["a", "b"], ["a"]))
    with pytest.raises(TrialError, match="expected strings, found list"):
        score("word_error_rate", ([["a"]], ["a"]))
    with pytest.raises(TrialError, match="a int is no sequence"):
        score("token_error_rate", ([3], ["a"]))


def test_two_thousand_words_take_a_fraction_of_a_second():
    rng = random.Random(0)
    words = [rng.choices(range(70), k=8) for _ in range(4000)]
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        METRICS.get("token_error_rate").evidence([(words[:2000], words[2000:])])
        best = min(best, time.perf_counter() - start)
    assert best < 0.5


# Fidelity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 5)])
def test_kl_equals_torch(dtype, shape):
    g = seeded()
    p, q = (torch.randn(*shape, generator=g).to(dtype) for _ in range(2))
    expected = F.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True
    )
    assert score("kl", (q, p)) == pytest.approx(expected.sum(-1).mean().item(), rel=1e-6)
    assert score("kl", (p, p)) == 0


def test_kl_of_probabilities_and_of_pictures():
    g = seeded()
    p, q = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    of_logits = score("kl", (q, p))
    assert score("kl", (q.softmax(1), p.softmax(1))) == pytest.approx(of_logits, rel=1e-4)
    maps = (q.reshape(1, 6, 5, 1).movedim(2, 1), p.reshape(1, 6, 5, 1).movedim(2, 1))
    assert score("kl", maps) == pytest.approx(of_logits)
    certain = torch.tensor([[1.0, 0.0]])
    assert score("kl", (torch.tensor([[0.5, 0.5]]), certain)) == pytest.approx(math.log(2))


def test_noise_to_signal_is_the_inverse_sqnr():
    g = seeded()
    f = torch.randn(8, 3, 4, generator=g)
    q = f + 0.1 * torch.randn(8, 3, 4, generator=g)
    expected = ((q - f) ** 2).sum() / (f**2).sum()
    assert score("noise_to_signal", (q, f)) == pytest.approx(expected.item(), rel=1e-5)
    assert -10 * math.log10(score("noise_to_signal", (q, f))) == pytest.approx(20, abs=2)
    trees = ({"a": q, "ids": torch.arange(8)}, {"a": f, "ids": torch.arange(8)})
    assert score("noise_to_signal", trees) == pytest.approx(expected.item(), rel=1e-5)
    ragged = ([q[0, 0], q[0]], [f[0, 0], f[0]])
    assert METRICS.get("noise_to_signal").evidence([ragged]).n == 2
    assert score("noise_to_signal", (torch.zeros(3), torch.zeros(3))) == 0
    with pytest.raises(TrialError, match="no floating-point tensors"):
        score("noise_to_signal", (["a"], ["a"]))
    with pytest.raises(TrialError, match="do not fit"):
        score("noise_to_signal", (q[:, :2], f))


def test_fidelity_is_chosen_by_the_outputs():
    task = Task(evaluation_data=[torch.zeros(2)])
    logits = torch.randn(4, 5, generator=seeded())
    assert resolve_metric(task, logits).name == "kl"
    assert resolve_metric(task, logits.half()).name == "kl"
    for other in (F.normalize(logits), logits[:, :1], logits[0], logits.long(), {"a": logits}):
        assert resolve_metric(task, other).name == "noise_to_signal"


# The user's own


def test_a_function_gets_everything_at_once():
    seen = []

    def area(outputs, targets):
        seen.append((outputs.shape, targets.shape))
        return sk.roc_auc_score(targets, outputs)

    g = seeded()
    x, y = torch.randn(20, generator=g), (torch.arange(20) % 2)
    task = Task(evaluation_data=[(x, y)], metric=area)
    metric = resolve_metric(task, x)
    evidence = metric.evidence(split(x, y))
    assert (metric.name, metric.higher_is_better, evidence.n) == ("area", True, 20)
    assert evidence.score() == pytest.approx(sk.roc_auc_score(y, x))
    assert seen == [((20,), (20,))]
    rows = np.array([[0, 1, 2, 3], [0, 2, 4, 6]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, one_class = evidence.scores_at(rows)
    assert first == pytest.approx(sk.roc_auc_score(y[:4], x[:4]))
    assert math.isnan(one_class)
    assert metric.per_sample_loss(evidence) is None


def test_outputs_that_can_not_be_joined_come_as_a_list_of_samples():
    batches = [(torch.zeros(2, 3), ["a", "b"]), (torch.zeros(1, 4), ["c"])]
    metric = FunctionMetric(lambda outputs, targets: sum(len(o) for o in outputs), True)
    evidence = metric.evidence(batches)
    assert evidence.score() == 3 + 3 + 4
    assert evidence.score_at(np.array([2, 2])) == 8
    untargeted = FunctionMetric(lambda outputs, targets: float(targets is None), True)
    assert untargeted.evidence([(torch.zeros(2), None)]).score() == 1.0


def fails(outputs, targets):
    raise KeyError("label")


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (fails, r"metric fails failed: KeyError: 'label' \(.*test_metrics.py:\d+\)"),
        (lambda o, t: math.nan, "is nan"),
        (lambda o, t: math.inf, "is inf"),
        (lambda o, t: None, "returned NoneType, not one number"),
        (lambda o, t: "0.5", "returned str"),
        (lambda o, t: o, r"returned Tensor of shape \[3\]"),
    ],
)
def test_a_function_that_gives_no_number_is_one_line(function, part):
    evidence = FunctionMetric(function, True).evidence([(torch.zeros(3), torch.zeros(3))])
    with pytest.raises(TrialError, match=part) as caught:
        evidence.score()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [2, np.float32(2), np.array([2.0]), torch.tensor(2)])
def test_a_function_may_return_any_kind_of_number(value):
    metric = FunctionMetric(lambda o, t: value, True)
    assert metric.evidence([(torch.zeros(3), torch.zeros(3))]).score() == 2.0


def test_function_outputs_must_have_samples():
    metric = FunctionMetric(lambda o, t: 1.0, True)
    with pytest.raises(TrialError, match="3 outputs for 2 targets"):
        metric.evidence([(torch.zeros(3), torch.zeros(2))])
    with pytest.raises(TrialError, match="can not be split into samples"):
        metric.evidence([(object(), torch.zeros(2))])


def test_a_task_with_evaluate_has_a_model_metric():
    task = Task(evaluate=lambda model: 1.0, higher_is_better=False)
    assert drop(model_metric(task), 1.0, 1.5) == 0.5
    with pytest.raises(UserError, match="evaluate"):
        resolve_metric(task, None)


# Drops


def test_a_positive_drop_is_worse():
    assert drop(METRICS.get("accuracy"), 0.9, 0.8) == pytest.approx(0.1)
    assert drop(METRICS.get("perplexity"), 10.0, 12.0) == 2.0
    assert drop(METRICS.get("kl"), 0.0, 0.5) == 0.5


@pytest.mark.parametrize(
    ("text", "name", "value", "expected"),
    [
        ("1%", "accuracy", 0.5, 0.01),
        (" 0.5 % ", "token_error_rate", 0.1, 0.005),
        ("1%", "perplexity", 20.0, 0.2),
        ("1%", "mse", -3.0, 0.03),
        ("1%", "kl", 0.0, 0.01),
        ("0", "accuracy", 0.5, 0.0),
        (0.02, "accuracy", 0.5, 0.02),
        ("3", "perplexity", 20.0, 3.0),
    ],
)
def test_max_drop_in_the_metrics_unit(text, name, value, expected):
    assert parse_max_drop(text).absolute(METRICS.get(name), value) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "%", "one", "-1%", -0.1, "nan", "inf%", "101%", "1%%", True, None]
)
def test_senseless_drops_are_refused(text):
    with pytest.raises(UserError, match="max drop") as caught:
        parse_max_drop(text)
    assert "\n" not in str(caught.value)


def test_one_without_a_percent_sign_is_not_one_point():
    with pytest.raises(UserError, match="write 1% for points"):
        parse_max_drop("1").absolute(METRICS.get("accuracy"), 0.9)


@given(st.floats(0, 100), st.booleans())
def test_max_drop_round_trips_through_its_text(value, percent):
    once = parse_max_drop(f"{value}%" if percent else value)
    again = parse_max_drop(str(once))
    assert again.percent == once.percent
    assert again.value == pytest.approx(once.value, rel=1e-9)
    assert isinstance(again, MaxDrop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", METRICS.names())
def test_cuda_outputs_score_as_cpu_outputs(name):
    batches = example(name)
    if not isinstance(batches[0][0], torch.Tensor):
        pytest.skip("strings lie on no device")
    moved = [(outputs.cuda(), targets) for outputs, targets in batches]
    assert score(name, *moved) == pytest.approx(score(name, *batches), rel=1e-5)


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1", "perplexity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_whole_numbers_in_floating_point_are_classes(name, dtype):
    outputs = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 7
    assert score(name, (outputs, y.to(dtype))) == score(name, (outputs, y))
    indices = outputs.argmax(1)
    if name in ("accuracy", "f1"):
        assert score(name, (indices, y.to(dtype))) == score(name, (indices, y))


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1", "perplexity"])
def test_targets_with_a_fraction_are_no_classes(name):
    y = torch.arange(40) % 7 + 0.25
    with pytest.raises(TrialError, match=r"targets of dtype float32 hold 0\.25, which is no class"):
        score(name, (torch.randn(40, 7), y))
