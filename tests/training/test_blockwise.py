"""Training block after block: it gets better, is never worse, and goes on after it was killed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.session.session import Session
from autoquant.session.training import train_blocks
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.techniques import RECONSTRUCTIONS, technique_of
from autoquant.training import turn as module
from autoquant.training.samples import gather
from autoquant.training.train import Trained
from autoquant.training.trainer import Trainer
from autoquant.training.turn import BlockDone
from tests.training.models import KINDS, W2A4, W3A8, everywhere, opened, task_of

SHORT = Blockwise(steps=40, weight_rate=0.02, scale_rate=2e-3, bias_rate=3e-3, activation_rate=2e-3)
NONE = replace(SHORT, weight_rate=0.0, scale_rate=0.0, bias_rate=0.0, activation_rate=0.0)


def trained(session: Session, recipe: SiteRecipe = W3A8, **words: Any) -> Trained:
    technique = words.pop("technique", SHORT)
    return train_blocks(session, everywhere(session, recipe), technique, **words)


def loss(session: Session, sites: Any, split: str = "confirm") -> float:
    session.baseline(split)
    return session.measure(sites, split)[0].loss


def same(a: Trained, b: Trained) -> bool:
    return set(a.learned) == set(b.learned) and (a.after, a.findings) == (b.after, b.findings)


@pytest.mark.parametrize("recipe", [W3A8, W2A4], ids=["W3A8", "W2A4"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_the_loss_less_on_data_that_it_has_not_seen(kind: str, recipe: SiteRecipe) -> None:
    session = opened(kind)
    before = loss(session, everywhere(session, recipe))
    rows: list[BlockDone] = []
    found = trained(session, recipe, watch=rows.append)
    assert found.after < found.before
    assert loss(session, found.sites) < before
    assert found.after == pytest.approx(loss(session, found.sites, "search"), rel=1e-12)
    assert [(row.number, row.count) for row in rows] == [
        (i + 1, len(rows)) for i in range(len(rows))
    ]
    assert all(row.after <= min(row.before, row.fitted) for row in rows)
    assert any(row.after < min(row.before, row.fitted) for row in rows)


def test_it_gains_on_what_was_fitted() -> None:
    session = opened("mlp")
    fitted = fit_layers(session, everywhere(session, W2A4), Sequential())
    before = loss(session, fitted)
    found = train_blocks(session, fitted, replace(SHORT, steps=200))
    assert loss(session, found.sites) < before


def test_a_block_learns_to_give_the_float_blocks_output_on_the_quantized_inputs() -> None:
    """Held against inputs, outputs and noise over signal that are computed here, by hand."""
    session = opened("mlp")
    rows: list[BlockDone] = []
    found = trained(session, watch=rows.append)
    model, applier = session.model, session.applier
    x = torch.cat(list(session.splits.calibrate))[7::8]
    applier.to_float()
    with torch.no_grad():
        target = model[2](model[1](model[0](x)))
        applier.apply(found.sites)
        mine = model[2](model[1](model[0](x)))
    noise = float((mine - target).square().sum() / target.square().sum())
    assert [row.path for row in rows] == ["0", "2", "4"]
    assert rows[1].after == pytest.approx(noise, rel=0.05)


def test_a_block_that_gets_no_better_keeps_what_it_has() -> None:
    session = opened("mlp")
    fitted = fit_layers(session, everywhere(session), Sequential())
    rows: list[BlockDone] = []
    found = train_blocks(session, fitted, NONE, watch=rows.append)
    assert all(row.after == min(row.before, row.fitted) for row in rows)
    assert found.after <= found.before


def test_the_whole_is_kept_only_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened("mlp")
    sites = everywhere(session)
    real, seen = session.measure, []

    def worse(*words: Any, **more: Any) -> Any:
        found = real(*words, **more)
        seen.append(found[0].loss)
        return (replace(found[0], loss=found[0].loss + len(seen)), *found[1:])

    monkeypatch.setattr(session, "measure", worse)
    found = train_blocks(session, sites, SHORT)
    assert len(seen) == 2
    assert seen[1] < seen[0]
    assert found.sites == sites
    assert not found.learned
    assert found.after == found.before
    assert not session.applier.learned


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["mlp", "sequence"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_killed_and_resumed_is_as_if_it_never_was(tmp_path: Path, kind: str, drop: float) -> None:
    technique = replace(SHORT, drop=drop)
    whole = trained(opened(kind), technique=technique)
    file = tmp_path / "c.safetensors"

    def killed(step: int, steps: int) -> None:
        if step == 50:
            raise _Killed

    with pytest.raises(_Killed):
        trained(opened(kind), technique=technique, checkpoint=file, heed=killed)
    assert file.exists()
    seen: list[tuple[int, int]] = []
    again = trained(
        opened(kind), technique=technique, checkpoint=file, heed=lambda *row: seen.append(row)
    )
    assert seen[0][0] == 40
    assert {steps for _, steps in seen} == {whole.steps}
    assert same(whole, again)
    assert dict(whole.sites) == dict(again.sites)
    for digest, weight in whole.learned.items():
        assert torch.equal(weight.q, again.learned[digest].q)


def test_a_checkpoint_of_other_options_is_not_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    trained(opened("mlp"), checkpoint=file)
    others: list[dict[str, Any]] = [
        {"recipe": W2A4},
        {"technique": replace(SHORT, drop=0.5)},
        {"fit": Sequential(ridge=1.0)},
        {"seed": 1},
    ]
    for words in others:
        seen: list[int] = []
        trained(opened("mlp"), checkpoint=file, heed=lambda n, _, s=seen: s.append(n), **words)
        assert seen[0] == 0


def test_the_seed_says_what_is_drawn() -> None:
    one = trained(opened("mlp"), seed=0)
    assert same(one, trained(opened("mlp"), seed=0))
    assert not same(one, trained(opened("mlp"), seed=1))


def test_where_there_is_no_memory_batches_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trainer._gradients

    def scarce(self: Trainer, number: int) -> Any:
        if self._batch > 4:
            raise MemoryError
        return own(self, number)

    monkeypatch.setattr(Trainer, "_gradients", scarce)
    found = trained(opened("mlp"))
    assert found.after < found.before
    halved = [f for f in found.findings if f.what == "out of memory"]
    assert {f.layer for f in halved} == {"0", "2", "4"}
    assert halved[-1].done == "batches have 4 samples from here on"


def test_samples_that_have_no_room_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(*words: Any) -> Any:
        return gather(*words, room=20000)

    monkeypatch.setattr(module, "gather", small)
    rows: list[BlockDone] = []
    found = trained(opened("mlp"), watch=rows.append)
    assert all(0 < row.kept < row.samples == 200 for row in rows)
    assert f"learned from {rows[0].kept} of them" in str(rows[0].findings[0])
    assert len(found.findings) == 3


def test_a_model_and_its_parameters_are_left_as_they_were() -> None:
    session = opened("sequence")
    before = {n: (p.clone(), p.requires_grad) for n, p in session.model.named_parameters()}
    state = torch.random.get_rng_state()
    found = trained(session, technique=replace(SHORT, drop=0.5))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in session.model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    used = {site.learned for site in found.sites.values() if site.learned}
    assert set(session.applier.learned) == used == set(found.learned)


class Looping(nn.Module):
    """A decoder: a cell that is called once for each step, with the state that it gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, None]
        state = x.transpose(0, 1).contiguous() * 0
        for _ in range(3):
            out, state = self.cell(x, state)
        return self.head(out[:, 0])


def test_a_block_that_is_called_again_and_again_learns_from_each_call() -> None:
    session = opened(model=Looping().eval())
    rows: list[BlockDone] = []
    found = trained(session, W2A4, watch=rows.append)
    assert found.after < found.before
    by_path = {row.path: row for row in rows}
    assert by_path["cell"].samples == 3 * len(session.splits.calibrate)
    assert by_path["cell"].after < by_path["cell"].before


class NoGradient(nn.Module):
    """Its first layer gives what has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = _Detached()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.more = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.more(self.layer(x))


def test_what_can_not_be_trained_is_said_and_the_rest_is_trained() -> None:
    rows: list[BlockDone] = []
    found = trained(opened(model=NoGradient()), watch=rows.append)
    assert [row.path for row in rows] == ["part", "head"]
    assert math.isnan(rows[0].after)
    assert str(found.findings[0]).startswith("step 0: part: can't be trained: no gradient reaches")
    assert found.after < found.before


def test_where_nothing_can_be_trained_it_is_one_line() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.part = _Detached()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)[:, :4]

    with pytest.raises(TrialError, match=r"no block can be trained: part: .*no gradient"):
        trained(opened(model=Nothing()))
    session = opened("mlp")
    with pytest.raises(TrialError, match="quantizes no weight"):
        train_blocks(session, {}, SHORT)


def test_the_users_code_that_fails_is_one_line() -> None:
    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise ValueError("no gradients here")
            return self.layer(x)

    model = nn.Sequential(Refusing())
    with pytest.raises(TrialError, match=r"no block can be trained: 0: .*no gradients here"):
        trained(opened(model=model, task=task_of(model)))


def test_it_is_a_technique_of_its_registry() -> None:
    assert "blockwise" in RECONSTRUCTIONS.names()
    technique = Blockwise(estimator="ewgs", steps=7, drop=0.5)
    assert technique_of(RECONSTRUCTIONS, technique.plain(), "here") == technique
    assert str(technique) == "blockwise steps 7 estimator ewgs drop 0.5"
