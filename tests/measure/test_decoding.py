"""Scores of what is decoded, against plain loops over samples and steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autoquant
from autoquant import Task
from autoquant.measure.decoding import decoded, divergences, scoring, steps_of
from autoquant.measure.evaluator import Evaluator
from autoquant.models.data import make_splits
from autoquant.study.ledger import Ledger
from autoquant.study.trials import measured

CLASSES, END = 5, 4


class Decoder(nn.Module):
    """Starts from a state and chooses the likeliest class, step by step."""

    def __init__(self, noise: float = 0.0, steps: int = 6) -> None:
        super().__init__()
        self.steps = steps
        self.mix = nn.Linear(8 + CLASSES, 8)
        self.scores = nn.Linear(8, CLASSES)
        draw = torch.Generator().manual_seed(0)
        other = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(1.5 * torch.randn(p.shape, generator=draw))
                p += noise * torch.randn(p.shape, generator=other)

    @torch.no_grad()
    def forward(self, state: Tensor) -> Tensor:
        token = torch.zeros(len(state), CLASSES)
        tokens = []
        for _ in range(self.steps):
            state = self.mix(torch.cat([state, token], 1)).tanh()
            chosen = self.scores(state).argmax(1)
            token = nn.functional.one_hot(chosen, CLASSES).float()
            tokens.append(chosen)
        return torch.stack(tokens, 1)


def until_end(tokens: Tensor) -> list[list[int]]:
    rows = tokens.tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def states(n: int = 40) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(2))


def run(model: Decoder, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    with scoring(model.scores) as given:
        return model(x), given


def by_loops(x: Tensor, lengths: list[int], noise: float) -> list[tuple[float, int]]:
    """The divergence of each sample alone, step by step, by the definition."""
    found = []
    for row, length in zip(x, lengths, strict=True):
        (_, ours), (_, theirs) = (run(Decoder(v), row[None]) for v in (0.0, noise))
        total, count = 0.0, 0
        for p, q in list(zip(ours, theirs, strict=True))[:length]:
            p, q = p[0].double().softmax(0), q[0].double().softmax(0)
            terms = zip(p.tolist(), q.tolist(), strict=True)
            total += sum(a * math.log(a / b) for a, b in terms)
            count += 1
            if p.argmax() != q.argmax():
                break
        found.append((total, count))
    return found


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("ended", [False, True])
def test_divergences_are_those_of_the_definition(noise, ended):
    x = states()
    tokens, given = run(Decoder(), x)
    outputs: Any = until_end(tokens) if ended else tokens
    steps = decoded(given, outputs)
    assert steps is not None
    lengths = [min(len(row) + 1, 6) for row in outputs] if ended else [6] * len(x)
    assert steps.lengths.tolist() == lengths
    found = divergences(steps, run(Decoder(noise), x)[1])
    assert found is not None
    expected = by_loops(x, lengths, noise)
    assert found[:, 1].tolist() == [count for _, count in expected]
    assert found[:, 0] == pytest.approx([total for total, _ in expected], rel=1e-4, abs=1e-6)
    assert (found[:, 0].sum() > 0) == (noise > 0)
    if noise == 0.5:  # some diverge before their end, or nothing was tried
        assert (found[:, 1] < torch.tensor(lengths).numpy()).any()


@given(st.integers(1, 7), st.integers(1, 4), st.integers(2, 5), st.randoms())
@settings(deadline=None, max_examples=30)
def test_steps_may_come_one_by_one_or_together(samples, steps, classes, random):
    draw = torch.Generator().manual_seed(random.randrange(1 << 30))
    whole = torch.randn(samples, steps, classes, generator=draw)
    one_by_one = steps_of(list(whole.unbind(1)), samples)
    together = steps_of([whole], samples)
    assert one_by_one is not None
    assert torch.equal(one_by_one, together)
    steps_found = decoded([whole], whole.argmax(-1))
    assert steps_found is not None
    found = divergences(steps_found, [whole])
    assert found is not None
    assert found[:, 0] == pytest.approx(0.0, abs=1e-12)
    assert (found[:, 1] == steps).all()


def test_a_model_that_stops_sooner_is_compared_as_far_as_it_went():
    x = states()
    tokens, given = run(Decoder(), x)
    steps = decoded(given, tokens)
    found = divergences(steps, run(Decoder(steps=2), x)[1])
    assert (found[:, 1] == 2).all()


@pytest.mark.parametrize(
    "outputs",
    [
        lambda t: (t + 1) % CLASSES,  # not the likeliest: sampled, or of another layer
        lambda t: t[:-1],  # another number of samples
        lambda t: [str(row) for row in t.tolist()],
        lambda t: [[float(v) for v in row] + [9] for row in t.tolist()],
        lambda t: t.float(),
        lambda t: t.sum(),
        lambda t: {"tokens": t},
    ],
)
def test_what_is_no_greedy_decoding_has_no_steps(outputs):
    tokens, given = run(Decoder(), states())
    assert decoded(given, tokens) is not None
    assert decoded(given, outputs(tokens)) is None


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [torch.zeros(3)],
        [torch.zeros(2, 5)],  # beams, or finished samples that were left out
        [torch.zeros(3, 5), torch.zeros(3, 4)],
        [torch.zeros(3, 5).long()],
        [torch.zeros(3, 1)],
        [torch.full((3, 5), math.nan)],
        [(torch.zeros(3, 5),)],
    ],
)
def test_calls_that_score_no_samples_are_no_steps(calls):
    assert steps_of(calls, 3) is None


def evaluator_of(forward: Any) -> Evaluator:
    x = states(120)
    pairs = [(part, until_end(Decoder()(part))) for part in x.split(25)]
    task = Task(evaluation_data=lambda: pairs, forward=forward, metric="token_error_rate")
    return Evaluator(task, make_splits(task), torch.device("cpu"))


class Both(nn.Module):
    """One model that can be either, as a model that takes recipes is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Decoder()


def test_an_evaluator_that_knows_the_scores_compares_them():
    found = evaluator_of(lambda m, x: until_end(m.now(x)))
    plain = evaluator_of(lambda m, x: until_end(m.now(x)))
    model = Both()
    found.scorer = model.now.scores
    for e in (found, plain):
        e.baseline(model, "search")
    with torch.no_grad():
        for p, q in zip(model.parameters(), Decoder(0.05).parameters(), strict=True):
            p.copy_(q)
    reading, other = found.read(model, "search"), plain.read(model, "search")
    assert reading.value == other.value
    x = torch.cat([x for x, _ in found.splits.search])
    lengths = [min(len(row) + 1, 6) for row in until_end(Decoder()(x))]
    rows = by_loops(x, lengths, 0.05)
    expected = sum(total for total, _ in rows) / sum(count for _, count in rows)
    assert reading.divergence == pytest.approx(expected, rel=1e-4)
    assert reading.distance is not None
    assert reading.distance.metric.name == "kl"
    assert other.divergence != pytest.approx(expected, rel=1e-2)
    assert other.distance.metric.name == "token_error_rate"


def test_scores_that_were_not_decoded_by_are_left_alone():
    forward = lambda m, x: [[(t + 1) % CLASSES for t in row] for row in until_end(m.now(x))]  # noqa: E731
    found = evaluator_of(forward)
    model = Both()
    found.scorer = model.now.scores
    found.baseline(model, "search")
    reading = found.read(model, "search")
    assert reading.distance.metric.name == "token_error_rate"


def test_a_search_that_uses_results_again_measures_the_same_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = states(150)
    pairs = [(part, until_end(Decoder()(part))) for part in x.split(25)]
    task = Task(
        evaluation_data=lambda: pairs,
        forward=lambda m, part: until_end(m(part)),
        metric="token_error_rate",
    )

    def losses(memory: str) -> list[float]:
        autoquant.search(Decoder(), task, trials=20, bits=5.0, study=memory, memory=memory)
        trials = Ledger.open(memory, None).trials()
        return [m["loss"] for t in trials if (m := measured(t)) is not None]

    with_reuse, without = losses("64MB"), losses("0")
    assert with_reuse == without
    assert len(set(without)) > 8  # scores, not the few shares of tokens that can differ
