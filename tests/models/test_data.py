from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import TaskError
from autoquant.models.data import (
    Splits,
    batch_size,
    concat,
    make_splits,
    take,
    to_device,
    training_pairs,
)
from autoquant.models.task import Task


def ids_of(pairs) -> list[int]:
    return [int(i) for inputs, _ in pairs for i in inputs[:, 0]]


def numbered(sizes: list[int], start: int = 0) -> list:
    """Batches whose inputs are numbered and whose targets are the same numbers."""
    batches = []
    for size in sizes:
        x = torch.arange(start, start + size, dtype=torch.float32)
        batches.append((torch.stack([x, x], 1), x))
        start += size
    return batches


def same(a: Splits, b: Splits) -> bool:
    return repr(a) == repr(b)


def fails(task: Task, *parts: str) -> None:
    with pytest.raises(TaskError) as caught:
        make_splits(task)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Trees

TREE = {"x": torch.arange(6).reshape(3, 2), "s": ["a", "b", "c"], "flag": True, "none": None}


def test_batch_size_of_every_form():
    assert batch_size(torch.zeros(5, 2)) == 5
    assert batch_size(["a", "b"]) == 2
    assert batch_size(TREE) == 3
    assert batch_size((torch.zeros(2), {"a": torch.zeros(2, 3)})) == 2
    for junk in (None, 3, object(), {"a": 1}, torch.tensor(1.0), (), {"a": object()}):
        with pytest.raises(TaskError):
            batch_size(junk)
    with pytest.raises(TaskError, match=r"\['a'\]: 2, \['b'\]: 3"):
        batch_size({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_take_repeats_and_orders():
    taken = take(TREE, [2, 0, 2])
    assert taken["x"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert taken["s"] == ["c", "a", "c"]
    assert taken["flag"] is True
    assert taken["none"] is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_concat_undoes_take(sizes):
    n = sum(sizes)
    tree = (torch.arange(n * 2).reshape(n, 2), {"t": [str(i) for i in range(n)], "c": 1})
    ends = np.cumsum(sizes)
    parts = [take(tree, range(e - s, e)) for s, e in zip(sizes, ends, strict=True)]
    joined = concat(parts)
    assert torch.equal(joined[0], tree[0])
    assert joined[1] == tree[1]


def test_concat_of_misfits_is_none():
    x = torch.zeros(2, 3)
    for other in (torch.zeros(2, 4), torch.zeros(2), x.double(), (x,), ["a"]):
        assert concat([x, other]) is None
    assert concat([{"a": x}, {"b": x}]) is None
    assert concat([(x, 1), (x, 2)]) is None
    assert concat([(x, torch.tensor(1)), (x, torch.tensor(2))]) is None
    assert concat([(x, x), (x,)]) is None


def test_to_device_reaches_into_lists():
    moved = to_device({"a": [torch.zeros(2), {"b": torch.zeros(1)}, "s"], "c": 1}, "meta")
    assert moved["a"][0].is_meta
    assert moved["a"][1]["b"].is_meta
    assert moved["a"][2] == "s"


# Splits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
def test_splits_are_disjoint_cover_everything_and_repeat(sizes, seed, calibrated):
    n = sum(sizes)
    if n < 3:
        return
    calibration = [b[0] for b in numbered([4, 4], start=1000)] if calibrated else None
    task = Task(evaluation_data=numbered(sizes), calibration_data=calibration, metric="mse")
    splits = make_splits(task, seed)
    search, confirm = ids_of(splits.search), ids_of(splits.confirm)
    calibrate = [int(i) for x in splits.calibrate for i in x[:, 0]]
    assert sorted(search + confirm + ([] if calibrated else calibrate)) == list(range(n))
    assert abs(len(search) - len(confirm)) <= 1
    assert len(calibrate) == (8 if calibrated else max(1, n // 4))
    for part in (search, confirm):
        assert part == sorted(part)
    for x, y in (*splits.search, *splits.confirm):
        assert torch.equal(x[:, 0], y)
        assert len(y) <= max(sizes)
    assert splits.samples == {
        "calibrate": len(calibrate),
        "search": len(search),
        "confirm": len(confirm),
    }
    torch.manual_seed(seed + 1)
    np.random.default_rng().random()
    assert same(splits, make_splits(task, seed))


def test_another_seed_gives_another_split():
    task = Task(evaluation_data=numbered([50]), metric="mse")
    assert not same(make_splits(task, 0), make_splits(task, 1))


def test_pieces_are_joined_to_the_users_batch_size():
    task = Task(evaluation_data=numbered([10] * 8), calibration_data=[torch.zeros(1, 2)])
    splits = make_splits(task)
    assert all(len(y) > 5 for _, y in splits.search[:-1])
    assert len(splits.search) < 8


def test_batches_of_unlike_shapes_stay_apart():
    batches = [(torch.rand(2, width), torch.zeros(2)) for width in (3, 4, 5, 6, 7, 8)]
    splits = make_splits(Task(evaluation_data=batches, metric="mse"))
    assert sum(splits.samples.values()) == 12


def test_calibration_from_evaluation_data_is_capped():
    splits = make_splits(Task(evaluation_data=numbered([4000]), metric="mse"))
    assert splits.samples == {"calibrate": 512, "search": 1744, "confirm": 1744}


def test_endless_calibration_data_is_capped():
    def forever():
        while True:
            yield torch.rand(100, 2)

    task = Task(evaluation_data=numbered([10]), calibration_data=forever, metric="mse")
    assert make_splits(task).samples["calibrate"] == 512
    assert make_splits(task, calibration_samples=30).samples["calibrate"] == 30


def test_calibration_samples_are_dropped_from_evaluation():
    batches = numbered([10, 10])
    task = Task(evaluation_data=batches, calibration_data=[batches[0][0][:3]], metric="mse")
    splits = make_splits(task)
    assert sorted(ids_of(splits.search) + ids_of(splits.confirm)) == list(range(3, 20))
    assert splits.notes == ("3 evaluation samples are in the calibration data: not used twice",)
    shared = [x for x, _ in batches]
    fails(
        Task(evaluation_data=batches, calibration_data=shared, metric="mse"),
        "0 evaluation samples besides 20",
    )


def test_equal_texts_and_ragged_samples_are_recognised():
    words = [["ab", "c"], ["a", "bc"], ["d"], ["e", "f"]]
    task = Task(evaluation_data=[(words, list("wxyz"))], calibration_data=[[["a", "bc"]]])
    splits = make_splits(task)
    kept = [item for inputs, _ in (*splits.search, *splits.confirm) for item in inputs]
    assert sorted(kept) == [["ab", "c"], ["d"], ["e", "f"]]


def test_a_loader_of_pairs_serves_as_calibration_data():
    batches = numbered([10], start=100)
    task = Task(evaluation_data=numbered([10]), calibration_data=batches, metric="mse")
    (inputs,) = make_splits(task).calibrate
    assert torch.equal(inputs, batches[0][0])


def test_a_data_loader_works_as_it_is():
    data = torch.utils.data.TensorDataset(torch.rand(20, 3), torch.rand(20, 2), torch.rand(20))
    both = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=None)
    pairs = [([a, b], y) for a, b, y in both]
    splits = make_splits(Task(evaluation_data=pairs, metric="mse"))
    assert isinstance(splits.search[0][0], tuple)
    alone = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(20, 3)), 8)
    splits = make_splits(Task(evaluation_data=alone))
    assert splits.search[0][0].shape[1] == 3
    assert splits.search[0][1] is None


def test_a_list_of_pictures_is_one_item_a_sample_where_targets_say_so():
    pictures = [torch.rand(3, 8, 8) for _ in range(6)]
    splits = make_splits(Task(evaluation_data=[(pictures, [{"box": i} for i in range(6)])]))
    assert splits.samples == {"calibrate": 1, "search": 3, "confirm": 2}


def test_arrays_become_tensors():
    task = Task(evaluation_data=[(np.ones((8, 3)), np.ones(8))], metric="mse")
    inputs, targets = make_splits(task).search[0]
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.float64


def test_batches_without_targets():
    splits = make_splits(Task(evaluation_data=[torch.rand(8, 2), {"a": torch.rand(2, 2)}]))
    assert {targets for _, targets in (*splits.search, *splits.confirm)} == {None}


def test_single_samples_work():
    splits = make_splits(Task(evaluation_data=numbered([1] * 9), metric="mse"))
    assert splits.samples == {"calibrate": 2, "search": 4, "confirm": 3}
    assert Counter(len(y) for _, y in splits.search) == {1: 4}


def test_an_iterator_given_once_is_read_once():
    splits = make_splits(Task(evaluation_data=iter(numbered([9])), metric="mse"))
    assert sum(splits.samples.values()) == 9


def test_a_task_with_evaluate_alone_has_calibration_only():
    task = Task(evaluate=lambda model: 1.0, calibration_data=[torch.rand(3, 2)])
    splits = make_splits(task)
    assert splits.samples == {"calibrate": 3, "search": 0, "confirm": 0}
    assert "evaluate_confirm" in splits.notes[0]
    with_confirm = Task(evaluate=lambda m: 1.0, evaluate_confirm=lambda m: 1.0)
    assert make_splits(with_confirm).notes == ()


def broken():
    yield torch.zeros(2, 2), torch.zeros(2)
    raise RuntimeError("disk on fire")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([], ["evaluation_data() has no batches"]),
        (lambda: None, ["evaluation_data() returned NoneType"]),
        (lambda: 1 / 0, ["evaluation_data() failed: ZeroDivisionError", "test_data.py:"]),
        (broken, ["batch 2 failed: RuntimeError: disk on fire", "test_data.py:"]),
        ([(torch.zeros(10, 2), torch.zeros(9))], ["batch 1 has 10 inputs but 9 targets"]),
        ([*numbered([3]), (torch.zeros(0, 2), torch.zeros(0))], ["batch 2, targets is empty"]),
        ([(object(), torch.zeros(2))], ["batch 1 holds a object", "expected a tensor"]),
        ([(np.array([object()]), [1])], ["array of object"]),
        ([3], ["a int is no batch"]),
        ([torch.zeros(4, 2)], ["batch 1 has no targets, which metric 'mse' needs"]),
        (numbered([1]), ["1 evaluation sample can not be split", "at least 3"]),
        (numbered([2]), ["2 evaluation samples can not be split"]),
        ([({"a": torch.zeros(2), "b": torch.zeros(3)}, torch.zeros(2))], ["['a']: 2, ['b']: 3"]),
    ],
)
def test_bad_data_is_one_line(data, parts):
    fails(Task(evaluation_data=data, metric="mse", source="task.py"), "task.py: ", *parts)


def test_mixed_targets_and_empty_calibration():
    mixed = [(torch.zeros(4, 2), torch.zeros(4)), torch.zeros(4, 2)]
    fails(Task(evaluation_data=mixed), "batch 2: some batches have targets, some not")
    fails(Task(evaluation_data=numbered([9]), calibration_data=[]), "calibration_data() has no")
    fails(Task(evaluation_data=numbered([9]), calibration_data=[object()]), "batch 1 holds a obj")


def test_inputs_to_train_with_are_none_that_are_evaluated_with() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    more = torch.arange(100.0, 140.0).reshape(20, 2)
    task = Task(
        evaluation_data=lambda: [(x, torch.zeros(40))],
        calibration_data=lambda: [x[:4]],
        training_data=lambda: [x[:10], torch.cat([x[20:], more[:5]]), (more[5:], torch.ones(15))],
        metric="accuracy",
    )
    splits = make_splits(task)
    found = torch.cat([inputs for inputs, _ in training_pairs(task, splits)])
    assert torch.equal(found, torch.cat([x[:4], more]))
    assert sum(len(x) for x, _ in training_pairs(task, splits, 7)) == 4  # of the first seven


def test_targets_to_train_with_stay_beside_their_inputs() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    more = torch.arange(100.0, 140.0).reshape(20, 2)
    both = torch.cat([x[30:], more])
    task = Task(
        evaluation_data=lambda: [(x, torch.zeros(40))],
        calibration_data=lambda: [x[:4]],
        training_data=lambda: [(both[:15], both[:15, 0] * 2), (both[15:], both[15:, 0] * 2)],
        training_loss=lambda outputs, targets: (outputs - targets).square().mean(),
        metric="accuracy",
    )
    splits = make_splits(task)
    pairs = training_pairs(task, splits)
    assert torch.equal(torch.cat([inputs for inputs, _ in pairs]), more)
    assert torch.equal(torch.cat([targets for _, targets in pairs]), more[:, 0] * 2)
    few = training_pairs(task, splits, 17)  # ten of which are evaluated with
    assert [len(inputs) for inputs, _ in few] == [len(targets) for _, targets in few] == [5, 2]


def test_targets_are_left_out_where_nothing_takes_them() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    more = torch.arange(100.0, 140.0).reshape(20, 2)
    task = Task(
        evaluation_data=lambda: [(x, torch.zeros(40))],
        training_data=lambda: [(more, torch.ones(20))],
        metric="accuracy",
    )
    [(inputs, targets)] = training_pairs(task, make_splits(task))
    assert torch.equal(inputs, more)
    assert targets is None


def test_a_loss_without_targets_is_one_line() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    words = {
        "evaluation_data": lambda: [(x, torch.zeros(40))],
        "training_loss": lambda outputs, targets: outputs.mean(),
        "metric": "accuracy",
    }
    with pytest.raises(TaskError, match="has training_loss but no training_data with targets"):
        Task(**words)
    task = Task(training_data=lambda: [x + 1000], **words)
    with pytest.raises(TaskError, match="batch 1 has no targets, which training_loss takes"):
        training_pairs(task, make_splits(task))
    uneven = Task(training_data=lambda: [(x, torch.zeros(3))], **words)
    with pytest.raises(TaskError, match="batch 1 has 40 inputs but 3 targets"):
        training_pairs(uneven, make_splits(uneven))


def test_without_inputs_to_train_with_it_is_those_to_calibrate_with() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    task = Task(evaluation_data=lambda: [(x, torch.zeros(40))], metric="accuracy")
    splits = make_splits(task)
    assert training_pairs(task, splits) == tuple((x, None) for x in splits.calibrate)


def test_nothing_to_train_with_is_one_line() -> None:
    x = torch.arange(80.0).reshape(40, 2)
    words = {"evaluation_data": lambda: [(x, torch.zeros(40))], "metric": "accuracy"}
    task = Task(training_data=lambda: [x], calibration_data=lambda: [x[:1] + 0.5], **words)
    with pytest.raises(TaskError, match="training_data has nothing that is not evaluated with"):
        training_pairs(task, make_splits(task))
    empty = Task(training_data=list, **words)
    with pytest.raises(TaskError, match="training_data"):
        training_pairs(empty, make_splits(empty))
