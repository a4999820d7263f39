"""The benchmarks of the problems of training: what they change, keep and say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.session.tuning import fit_layers
from tests.benchmarks.challenges import signs
from tests.benchmarks.challenges.__main__ import SECTIONS, sections
from tests.benchmarks.challenges.lab import Outcome, Sites, refined
from tests.benchmarks.challenges.rows import Rows, interval, paired, values
from tests.benchmarks.training import REPORT
from tests.training.models import W2A4, everywhere, opened


def test_intervals_are_those_of_students_t() -> None:
    found = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(found))
    assert interval(found) == f"{7 / 3:.4f} ± {(high - low) / 2:.4f}"
    assert interval([0.5]) == "0.5000"
    assert interval([]) == ""
    assert interval([1.0, math.inf]) == "no number"
    assert paired([2.0, 4.0], [1.0, 2.0]) == "+100% ± 424%"
    assert paired([1.1], [1.0]) == "+10%"
    assert paired([1.0], [1.0, 2.0]) == ""


def test_rows_are_kept_as_they_are_made_and_made_once(tmp_path: Path) -> None:
    rows = Rows.of(tmp_path / "rows.jsonl")
    made: list[int] = []

    def row(loss: float) -> dict[str, float]:
        made.append(1)
        return {"loss": loss}

    rows.make(("a", "case", "one", 0), lambda: row(1.0))
    rows.make(("a", "case", "one", 0), lambda: row(2.0))
    rows.make(("b", "case", "one", 0), lambda: row(math.inf))
    assert len(made) == 2
    again = Rows.of(rows.path)
    assert values(again.of_section("a"), "loss", variant="one") == [1.0]
    assert values(again.of_section("b"), "loss") == [math.inf]
    again.forget(["a"])
    assert not again.of_section("a")
    assert again.of_section("b")


def test_steps_until_a_loss_is_reached() -> None:
    outcome = Outcome(0.0, tuple(float(10 - i) for i in range(10)), 0)
    assert outcome.reached(5.5, mean=2) == 6
    assert outcome.reached(0.5, mean=2) is None


def test_changes_of_a_gradient_change_what_they_say() -> None:
    gradient = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))

    def of(variant: str) -> torch.Tensor:
        return signs.changed(gradient, variant, torch.Generator().manual_seed(1))

    assert torch.equal(of(signs.WHOLE), gradient)
    assert torch.equal(of(signs.SIGNS).sign(), gradient.sign())
    assert float(of(signs.SIGNS).abs().std()) == pytest.approx(0.0, abs=1e-6)
    assert float(of(signs.SIGNS).abs().mean()) == pytest.approx(float(gradient.abs().mean()))
    other = of(signs.MAGNITUDES)
    assert torch.equal(other.sign(), gradient.sign())
    assert torch.equal(other.abs().flatten().sort()[0], gradient.abs().flatten().sort()[0])
    assert not torch.equal(other, gradient)
    for variant, share in signs.FLIPPED.items():
        turned = of(variant)
        assert torch.equal(turned.abs(), gradient.abs())
        assert float((turned != gradient).float().mean()) == pytest.approx(share, abs=0.03)
    turned = of(signs.SMALL) != gradient
    assert float(turned.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert gradient.abs()[turned].max() <= gradient.abs()[~turned].min()


@pytest.mark.parametrize("kind", ["mlp", "sequence"])  # where embeddings are not fitted
def test_finer_grids_hold_the_same_function(kind: str) -> None:
    session = opened(kind)
    sites = fit_layers(session, everywhere(session, W2A4), Sequential())
    x = session.splits.calibrate[0]

    def outputs(chosen: Sites) -> torch.Tensor:
        session.applier.apply(chosen)
        with session.prepared.engine.reference(), torch.no_grad():
            return session.model(x)

    first = outputs(sites)
    for bits in (3, 4, 8):
        found, ratio = refined(sites, bits, session.applier)
        assert ratio == 2 ** (bits - 2)
        assert {s.weight.bits for s in found.values() if s.weight} == {bits}
        torch.testing.assert_close(outputs(found), first, rtol=1e-5, atol=1e-5)
    assert refined(sites, 2, session.applier)[1] == 1


def test_the_report_has_the_sections_that_were_measured() -> None:
    rows = Rows.of(REPORT.with_suffix(".jsonl"))
    text = REPORT.read_text(encoding="utf-8")
    for module, title in SECTIONS.values():
        assert (f"## {title}\n" in text) == bool(rows.of_section(module.SECTION))
    assert sections(rows) in text
