"""Which parts of a model are blocks, in which order, and what is in none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.nn.sites import find_sites
from autoquant.training.blocks import (
    NOT_CALLED,
    SHARED,
    Block,
    find_blocks,
    samples_of,
    usual_numbers,
)


def blocks_of(
    model: nn.Module, batches: Any = None, most: int = 8, run: Any = None
) -> tuple[list[Block], dict[str, str]]:
    batches = [torch.ones(4, 8), torch.ones(2, 8)] if batches is None else batches
    run = run or (lambda m, x: m(x))
    return find_blocks(model, find_sites(model)[0], batches, run, most)


def paths(found: tuple[list[Block], dict[str, str]]) -> list[str]:
    return [block.path for block in found[0]]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class Backwards(nn.Module):
    """Calls its parts in another order than it holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.ModuleList([Pair(), Pair()])
        self.stem = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.body:
            x = x + part(x)
        return self.head(x)


def test_blocks_are_the_largest_modules_with_few_layers_in_the_order_of_their_calls() -> None:
    model = Backwards()
    found = blocks_of(model, most=2)
    assert paths(found) == ["stem", "body.0", "body.1", "head"]
    assert not found[1]
    assert [b.sites for b in found[0]][1] == ("body.0.one", "body.0.two")
    assert [b.head for b in found[0]] == [False, False, False, True]
    assert all(b.calls == (1, 1) for b in found[0])
    assert [b.numbers for b in found[0]] == [16.0, 16.0, 16.0, 11.0]
    ones = ["stem", "body.0.one", "body.0.two", "body.1.one", "body.1.two", "head"]
    assert paths(blocks_of(model, most=1)) == ones
    # However many may be together, a model is not one of its own blocks, but for a bare layer.
    assert paths(blocks_of(model, most=99)) == ["stem", "body.0", "body.1", "head"]
    assert paths(blocks_of(nn.Linear(8, 8))) == [""]


def test_a_flat_model_has_a_block_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert paths(blocks_of(model)) == ["0", "2"]


def test_calls_are_counted_for_each_batch() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = model(x)
        return x

    (block,), _ = blocks_of(nn.Sequential(nn.Linear(8, 8)), run=run)
    assert block.calls == (4, 2)


class Attended(nn.Module):
    """Attention, whose second layer is called by nobody, as its code computes with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return self.attention(x, x, x)[0]


def test_what_is_not_called_by_itself_is_part_of_what_is() -> None:
    (block,), left = blocks_of(Attended(), most=1)
    assert block.path == "attention"
    assert len(block.sites) == 2
    assert not left


class Loose(nn.Module):
    """Uses one layer's weight without calling it, and never the other."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.called = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.called(nn.functional.linear(x, self.used.weight))


def test_what_is_in_no_block_is_said() -> None:
    found = blocks_of(Loose())
    assert paths(found) == ["called"]
    assert found[1] == {"used": NOT_CALLED, "unused": NOT_CALLED}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


def test_a_weight_that_two_blocks_use_is_in_neither() -> None:
    found = blocks_of(Tied())
    assert paths(found) == ["three"]
    assert found[1] == {"one": SHARED}
    inside = nn.Sequential(Tied(), nn.Linear(8, 8))
    assert paths(blocks_of(inside)) == ["0", "1"]


class Deciding(nn.Module):
    """Gives integers, through which no gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(1)


def test_what_gives_no_real_numbers_is_no_block() -> None:
    model = nn.Sequential(Deciding())
    assert paths(blocks_of(model)) == ["0.layer"]


class Changed(nn.Module):
    """Writes into the output of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu_()


def test_an_output_that_is_written_into_is_not_the_models() -> None:
    (block,), _ = blocks_of(Changed())
    assert not block.head


@pytest.mark.parametrize(
    ("numbers", "expected"), [(100.0, 16), (50.0, 16), (400.0, 4), (1e9, 1), (0.0, 16)]
)
def test_of_large_blocks_a_step_has_fewer_samples(numbers: float, expected: int) -> None:
    block = Block("a", ("a",), (1,), numbers, False)
    assert samples_of(block, 16, 100.0) == expected


def test_the_usual_numbers_are_the_median() -> None:
    blocks = [Block("a", (), (), n, False) for n in (1.0, 5.0, 100.0)]
    assert usual_numbers(blocks) == 5.0
    assert usual_numbers([]) == 0.0
