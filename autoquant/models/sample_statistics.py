"""Per-sample sufficient statistics of the metrics: (outputs, targets) of one batch → [n, k].

Plain functions; each returns float64 with one row a sample, from which the metric follows for any
choice of samples. Tensors are reduced on the device they lie on, so that only the statistics
travel to the CPU. Half-precision outputs are widened first. Outputs with a NaN raise TrialError:
an argmax of NaN would be a class like any other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoquant.errors import TrialError
from autoquant.models.edit_distance import nearest

IGNORE_INDEX = -100
"""Targets with this value do not count, as in torch.nn.functional.cross_entropy."""

Array = np.ndarray
"""float64 statistics, one row a sample."""


def as_tensor(values: Any, what: str, device: torch.device | None = None) -> Tensor:
    """Return numbers (a tensor, an array, a list of numbers or of tensors) as a tensor."""
    try:
        if isinstance(values, Tensor):
            tensor = values.detach()
        elif isinstance(values, list) and values and isinstance(values[0], Tensor):
            tensor = torch.stack([value.detach() for value in values])
        else:
            tensor = torch.as_tensor(values)
            if tensor.is_floating_point() and not hasattr(values, "dtype"):
                # Plain numbers would be rounded to whatever the default dtype is.
                tensor = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrialError(f"{what} of type {type(values).__name__} are not numbers") from error
    if tensor.is_floating_point():
        if torch.isnan(tensor).any():
            raise TrialError(f"{what} contain NaN")
        if tensor.dtype != torch.float64:
            tensor = tensor.float()
    return tensor if device is None else tensor.to(device)


def labels(values: Any, what: str, device: torch.device | None = None) -> Tensor:
    """Return classes as integers; numbers with a fraction raise TrialError.

    Whole numbers in floating point are classes: that is what files of arrays make of them.
    """
    tensor = as_tensor(values, what, device)
    if not tensor.is_floating_point():
        return tensor.long()
    whole = tensor == tensor.round()
    if not bool((whole & tensor.isfinite()).all()):
        wrong = float(tensor[~(whole & tensor.isfinite())][0])
        given = str(getattr(values, "dtype", "float")).removeprefix("torch.")
        raise TrialError(
            f"{what} of dtype {given} hold {wrong:g}, which is no class: classes are whole numbers"
        )
    return tensor.long()


def _misfit(outputs: Tensor, targets: Tensor, expected: str) -> TrialError:
    shapes = f"outputs of shape {list(outputs.shape)} and targets of shape {list(targets.shape)}"
    return TrialError(f"{shapes} do not fit: expected {expected}")


def _rows(*columns: Tensor) -> Array:
    """Return tensors [n] as the columns of [n, k]."""
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def _per_sample(values: Tensor) -> Tensor:
    """Return the sum over all dimensions but the first, in float64: [n]."""
    return values.double().reshape(len(values), -1).sum(dim=1)


def _logits(outputs: Any, targets: Any, expected: str) -> tuple[Tensor, Tensor]:
    """Return logits [n, positions, classes] and integer targets [n, positions].

    Classes lie in dimension 1 ([N, C], [N, C, …], torch's convention) or in the last one
    ([N, T, C], as language models have it), whichever fits the targets; both is an error.
    """
    x = as_tensor(outputs, "outputs")
    y = labels(targets, "targets", x.device)
    if x.ndim < 2 or not x.is_floating_point():
        raise _misfit(x, y, expected)
    last = x.shape[:-1] == y.shape
    second = (x.shape[0], *x.shape[2:]) == tuple(y.shape)
    if last and second and x.ndim > 2:
        raise _misfit(x, y, "only one dimension that can be the classes (transpose in forward)")
    if not last and not second:
        raise _misfit(x, y, expected)
    if not last:
        x = x.movedim(1, -1)
    classes = x.shape[-1]
    wrong = (y != IGNORE_INDEX) & ((y < 0) | (y >= classes))
    if wrong.any():
        raise TrialError(f"target {int(y[wrong][0])} is no class of {classes} (0 … {classes - 1})")
    return x.reshape(len(x), -1, classes), y.reshape(len(y), -1)


def class_count(outputs: Any, targets: Any) -> int:
    """Return how many classes logits tell apart."""
    return int(_logits(outputs, targets, CLASSIFIER)[0].shape[-1])


CLASSIFIER = "logits [N, C] with targets [N], [N, C, …] with [N, …], or class indices like targets"


def _classes(outputs: Any, targets: Any) -> tuple[Tensor, Tensor, int]:
    """Return predicted and true classes [n, positions] and the number of classes seen."""
    x = as_tensor(outputs, "outputs")
    if x.is_floating_point():
        logits, y = _logits(outputs, targets, CLASSIFIER)
        return logits.argmax(dim=-1), y, logits.shape[-1]
    y = labels(targets, "targets", x.device)
    if x.shape != y.shape or not x.ndim:
        raise _misfit(x, y, CLASSIFIER)
    x, y = x.long().reshape(len(x), -1), y.reshape(len(y), -1)
    return x, y, int(max(x.max(), y.max())) + 1 if x.numel() else 0


def correct(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: positions whose class is right, positions that count."""
    predicted, y, _ = _classes(outputs, targets)
    counts = y != IGNORE_INDEX
    return _rows(_per_sample((predicted == y) & counts), _per_sample(counts))


def correct_in_top5(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: positions whose class is among the five largest logits, positions that count.

    Of equal logits the lower class counts as the larger, so that a constant output scores 5/C.
    """
    logits, y = _logits(outputs, targets, "logits [N, C] with targets [N]")
    if logits.shape[-1] <= 5:
        raise TrialError(f"top5 needs more than 5 classes, the outputs have {logits.shape[-1]}")
    counts = y != IGNORE_INDEX
    label = y.clamp(min=0).unsqueeze(-1)
    own = logits.gather(-1, label)
    lower = torch.arange(logits.shape[-1], device=logits.device) < label
    rank = ((logits > own) | ((logits == own) & lower)).sum(dim=-1)
    return _rows(_per_sample((rank < 5) & counts), _per_sample(counts))


def predicted_and_true(outputs: Any, targets: Any) -> Array:
    """Return [n, 1 + 2p]: number of classes, then p predicted classes and p true ones in turn.

    Positions that do not count are NaN, like the padding that joins batches of unlike p.
    """
    predicted, y, classes = _classes(outputs, targets)
    pairs = torch.stack([predicted, y], dim=-1).double()
    pairs[y == IGNORE_INDEX] = torch.nan
    stats = np.full((len(y), 1 + 2 * y.shape[1]), float(classes))
    stats[:, 1:] = pairs.reshape(len(y), -1).cpu().numpy()
    return stats


def _numbers(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of one shape, in float64; [N, 1] fits [N]."""
    x = as_tensor(outputs, "outputs")
    y = as_tensor(targets, "targets", x.device)
    if x.shape != y.shape:
        flat_x = x.squeeze(-1) if x.ndim == 2 else x
        flat_y = y.squeeze(-1) if y.ndim == 2 else y
        if flat_x.shape != flat_y.shape:
            raise _misfit(x, y, "the same shape for both")
        x, y = flat_x, flat_y
    if not x.ndim:
        raise _misfit(x, y, "one entry or more a sample")
    return x.double(), y.double()


def _elements(x: Tensor) -> Tensor:
    """Return the number of elements of each sample: [n]."""
    return torch.full((len(x),), x[0].numel() if len(x) else 0, dtype=torch.int64, device=x.device)


def squared_error(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: sum of squared errors, number of elements."""
    x, y = _numbers(outputs, targets)
    return _rows(_per_sample((x - y).square()), _elements(x))


def absolute_error(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: sum of absolute errors, number of elements."""
    x, y = _numbers(outputs, targets)
    return _rows(_per_sample((x - y).abs()), _elements(x))


def value_pairs(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: the output and the target of each sample, one number each."""
    x, y = _numbers(outputs, targets)
    if x.numel() != len(x):
        raise _misfit(x, y, "one number a sample")
    return _rows(x.reshape(-1), y.reshape(-1))


def token_loss(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: negative log likelihood in nats, number of tokens that count.

    Logits and targets are taken as they are: a language model's ``forward`` shifts them by one.
    """
    logits, y = _logits(outputs, targets, "logits [N, T, C] with targets [N, T]")
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        y.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return _rows(_per_sample(loss.reshape(y.shape)), _per_sample(y != IGNORE_INDEX))


def divergence(outputs: Any, reference: Any) -> Array:
    """Return [n, 2]: sum over positions of KL(reference ‖ outputs) in nats, number of positions.

    Both are logits [N, C], [N, T, C] or [N, C, H, W, …]. Where the reference's rows are
    probabilities already (not negative, sum 1), both are taken as such.
    """
    q = as_tensor(outputs, "outputs")
    p = as_tensor(reference, "the float model's outputs", q.device)
    if p.shape != q.shape or p.ndim < 2 or not p.is_floating_point() or p.shape[-1] == 0:
        raise _misfit(q, p, "classifier outputs of one shape, logits [N, C] or [N, T, C]")
    if p.ndim > 3:
        p, q = p.movedim(1, -1), q.movedim(1, -1)
    p, q = p.double(), q.double()
    if bool((p >= 0).all()) and bool(((p.sum(dim=-1) - 1).abs() < 1e-3).all()):
        log_p, log_q = p.log(), q.log()
    else:
        log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    # A class of probability 0 adds nothing, where the formula has 0 · ∞.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return _rows(_per_sample(terms), _elements(terms[..., 0] if terms.ndim > 2 else terms[:, :1]))


def noise_and_signal(outputs: Any, reference: Any) -> Array:
    """Return [n, 2]: Σ(q − f)², Σf² over all floating-point tensors of a sample's outputs."""
    stats = np.zeros((0, 2))
    pairs = float_leaves(outputs, reference)
    if not pairs:
        raise TrialError(
            f"outputs of type {type(outputs).__name__} hold no floating-point tensors to compare"
        )
    for number, (q, f) in enumerate(pairs):
        x = as_tensor(q, "outputs")
        y = as_tensor(f, "the float model's outputs", x.device)
        if x.shape != y.shape or not x.ndim:
            raise _misfit(x, y, "outputs of one shape from both models, samples first")
        # What both mask by the same infinity is neither noise nor signal.
        noise = torch.where(x == y, 0.0, x.double() - y.double())
        signal = torch.where(y.isinf(), 0.0, y.double())
        part = _rows(_per_sample(noise.square()), _per_sample(signal.square()))
        if number and len(part) != len(stats):
            raise TrialError("the tensors of one output differ in their number of samples")
        stats = stats + part if number else part
    return stats


def float_leaves(outputs: Any, reference: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the floating-point tensors of two outputs of one form, paired."""
    if isinstance(outputs, Tensor) and isinstance(reference, Tensor):
        return [(outputs, reference)] if reference.is_floating_point() else []
    if isinstance(outputs, list) and isinstance(reference, list):
        return _ragged(outputs, reference)
    if isinstance(outputs, Mapping) and isinstance(reference, Mapping):
        shared = [(outputs[key], reference[key]) for key in reference if key in outputs]
    elif isinstance(outputs, tuple) and isinstance(reference, tuple):
        shared = list(zip(outputs, reference, strict=False))
    else:
        return []
    return [pair for q, f in shared for pair in float_leaves(q, f)]


def _ragged(outputs: list[Any], reference: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return lists of one tensor a sample as two tensors [n, longest], padded with zeros."""
    if len(outputs) != len(reference) or not all(
        isinstance(item, Tensor) and item.is_floating_point() for item in (*outputs, *reference)
    ):
        return []
    if any(q.shape != f.shape for q, f in zip(outputs, reference, strict=True)):
        raise TrialError("outputs of one sample differ in shape between the two models")
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        (
            pad([item.reshape(-1) for item in outputs], batch_first=True),
            pad([item.reshape(-1) for item in reference], batch_first=True),
        )
    ]


def word_errors(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: edit distance in words, words of the reference (the nearest of several)."""
    rows = []
    for output, target in _items(outputs, targets):
        texts = list(target) if isinstance(target, list | tuple) else [target]
        if not texts or not all(isinstance(text, str) for text in (output, *texts)):
            raise TrialError(
                f"expected strings, found {type(output).__name__} and {type(target).__name__}"
            )
        rows.append(nearest(output.split(), [text.split() for text in texts]))
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def token_errors(outputs: Any, targets: Any) -> Array:
    """Return [n, 2]: edit distance in tokens, tokens of the reference (the nearest of several).

    A sample is a sequence: a string (of characters), or a list, tuple or 1-D tensor of tokens; in
    a tensor −100 is padding. Its target is one such sequence or a list of alternatives.
    """
    rows = [
        nearest(_tokens(output), _alternatives(output, target))
        for output, target in _items(outputs, targets)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _items(outputs: Any, targets: Any) -> list[tuple[Any, Any]]:
    if len(outputs) != len(targets):
        raise TrialError(f"{len(outputs)} outputs for {len(targets)} targets")
    return list(zip(outputs, targets, strict=True))


def _tokens(sequence: Any) -> Sequence[Hashable]:
    if isinstance(sequence, str):
        return sequence
    if isinstance(sequence, Tensor | np.ndarray) and sequence.ndim == 1:
        return [token for token in sequence.tolist() if token != IGNORE_INDEX]
    if isinstance(sequence, list | tuple):
        return [token.item() if isinstance(token, Tensor) else token for token in sequence]
    raise TrialError(f"a {type(sequence).__name__} is no sequence of tokens")


def _alternatives(output: Any, target: Any) -> list[Sequence[Hashable]]:
    """Return the target's alternatives: a list of strings is one sequence unless outputs are."""
    nested = isinstance(target, list | tuple) and len(target) > 0
    if nested and isinstance(output, str):
        return [_tokens(one) for one in target]
    if nested and (
        isinstance(target[0], list | tuple)
        or (isinstance(target[0], Tensor | np.ndarray) and target[0].ndim == 1)
    ):
        return [_tokens(one) for one in target]
    return [_tokens(target)]
