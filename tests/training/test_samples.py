"""What a block learns from is what it sees in the two models, as far as there is room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.nn.sites import find_sites
from autoquant.training.blocks import Block, find_blocks
from autoquant.training.samples import HELD, MOST_HELD, Call, Gathered, Samples, gather, mixed


def compute(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return module(*args, **kwargs)


class Switched(nn.Module):
    """A model that is another one while ``noise`` is not 0, before its last part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.noise, self.runs, self.part = 0.0, 0, part
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x + self.noise)
        self.runs += 1
        return found


def gathered(model: Switched, batches: list[Tensor], **words: Any) -> tuple[Gathered, Block]:
    (block,), _ = find_blocks(
        model, find_sites(model.part)[0] and [
            s for s in find_sites(model)[0] if s.name.startswith("part")
        ], batches, lambda m, x: m(x), 8,
    )  # fmt: skip
    model.runs = 0

    def switch(noise: float) -> None:
        model.noise = noise

    found = gather(
        model, block, batches, lambda m, x: m(x), compute,
        lambda: switch(0.0), lambda: switch(1.0), **words,
    )  # fmt: skip
    return found, block


def samples(count: int, size: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.randn(count, size, generator=draw).split(16))


def all_of(found: Samples) -> tuple[Tensor, Tensor, Tensor]:
    calls: list[Call] = list(found.batches)
    parts = [(c.inputs[0][0], c.clean[0][0], c.targets[0]) for c in calls]
    x_hat, x, z = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return x_hat, x, z


def test_inputs_are_of_the_quantized_model_and_targets_of_the_float_one() -> None:
    model = Switched(nn.Sequential(nn.Linear(8, 8)))
    batches = samples(40)
    found, _ = gathered(model, batches)
    assert (found.kept, found.samples) == (40, 40)
    whole = torch.cat(batches)
    held = torch.arange(40) % HELD == HELD - 1
    for rows, part in ((held, found.held), (~held, found.learn)):
        x_hat, x, z = all_of(part)
        torch.testing.assert_close(x, whole[rows])
        torch.testing.assert_close(x_hat, whole[rows] + 1.0)
        torch.testing.assert_close(z, model.part(whole[rows]).detach())
    assert found.learn.divisible
    # Each run ended where the block did, or began.
    assert model.runs == 0


def test_where_there_is_no_room_samples_are_taken_evenly() -> None:
    model = Switched(nn.Sequential(nn.Linear(8, 8)))
    batches = samples(64)
    found, _ = gathered(model, batches, room=64 * 3 * 8 * 4 // 2)
    assert (found.kept, found.samples) == (32, 64)
    expected = torch.cat([batch[::2] for batch in batches])
    both = torch.cat([all_of(part)[1] for part in (found.learn, found.held)])
    assert torch.equal(both.sum(1).sort().values, expected.sum(1).sort().values)


class Summing(nn.Module):
    """Each output depends on all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - x.mean(0)


@pytest.mark.parametrize("part", [Summing(), nn.GRU(8, 8)], ids=["mixing", "gru"])
def test_what_mixes_samples_is_learned_from_in_whole_calls(part: nn.Module) -> None:
    batches = [torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    if isinstance(part, Summing):
        batches = samples(9 * 16)
    model = Switched(part)
    found, _ = gathered(model, batches)
    assert not found.learn.divisible
    assert (found.learn.count, found.held.count) == (8, 1)
    order = found.learn.order(16, 0)
    assert order.length == 8
    call = found.learn.at(order.places(0))
    assert call.size == 1
    assert call.inputs[0][0].shape == batches[0].shape
    half, _ = gathered(model, batches, room=1)
    assert half.kept == 1


class Cached(nn.Module):
    """Takes what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return self.layer(x)


class Caching(Switched):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, cache=object())


def test_what_can_not_be_given_again_is_one_line() -> None:
    with pytest.raises(TrialError, match="its input holds a object, which can't be given again"):
        gathered(Caching(Cached()), samples(16))


def test_what_the_quantized_model_never_calls_is_one_line() -> None:
    class Elsewhere(Switched):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.noise else self.part(x)

    with pytest.raises(TrialError, match="never calls it as the float model does"):
        gathered(Elsewhere(nn.Sequential(nn.Linear(8, 8))), samples(16))


def test_what_is_not_each_samples_own_belongs_to_all() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: Tensor, power: int) -> Tensor:
            return self.layer(x) * scale**power

    class Scaling(Switched):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(x + self.noise, torch.full((1, 8), 2.0), power=2)

    found, _ = gathered(Scaling(Scaled()), samples(16))
    call = found.learn.at((0, (1, 3)))
    assert found.learn.divisible
    (x, scale), words = call.inputs
    assert (x.shape, scale.shape, words) == ((2, 8), (1, 8), {"power": 2})


def test_too_few_to_hold_any_back_are_both() -> None:
    found, _ = gathered(Switched(nn.Sequential(nn.Linear(8, 8))), samples(4))
    assert found.learn.count == found.held.count == 4


def test_a_share_of_the_numbers_is_as_in_the_float_model() -> None:
    x = torch.zeros(50, 40, dtype=torch.float32)
    call = Call(((x + 1.0, torch.arange(3)), {"n": 2}), ((x, torch.arange(3)), {"n": 2}), (x,), 50)
    torch.manual_seed(0)
    found = mixed(0.25, call)
    assert float(found.inputs[0][0].mean()) == pytest.approx(0.75, abs=0.03)
    assert set(found.inputs[0][0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found.inputs[0][1], torch.arange(3))
    assert found.inputs[1] == {"n": 2}
    assert torch.equal(mixed(0.0, call).inputs[0][0], x + 1.0)
    assert torch.equal(mixed(1.0, call).inputs[0][0], x)


def test_of_many_samples_no_more_are_held_back_than_it_takes() -> None:
    found, _ = gathered(Switched(nn.Sequential(nn.Linear(8, 8))), samples(32 * MOST_HELD))
    assert found.held.count == MOST_HELD
    assert found.learn.count == 31 * MOST_HELD
