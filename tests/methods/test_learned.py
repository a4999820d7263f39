"""What was learned, as a file beside the recipe: known again, and nothing else taken for it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from autoquant.errors import AutoquantError, SpecError, UserError
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.learned import (
    PARTS,
    LearnedWeight,
    is_learned,
    learned_path,
    read_learned,
    write_learned,
)
from autoquant.nn.convert import prepare
from autoquant.spec.outputs import check_target
from autoquant.spec.recipe import LearnedFile, Recipe, SiteRecipe, WeightScheme

BIAS = BiasCorrection()


def weight(seed=0, channels=4, n=8, bits=4, **parts):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, n), generator=g)
    scale = torch.rand(channels, 1, generator=g) + 0.1
    shift = torch.randn(channels, generator=g)
    made = LearnedWeight(q.to(torch.int8), scale, torch.zeros(channels, 1), shift)
    return replace(made, **parts)


def site_of(learned, bits=4, **fields):
    return SiteRecipe(WeightScheme(bits, **fields), None, BIAS, learned.digest)


def recipe_of(tmp_path, *weights):
    path = tmp_path / "r.learned.safetensors"
    file = write_learned(weights, path)
    return Recipe({str(i): site_of(w) for i, w in enumerate(weights)}, learned=file)


def line_of(caught):
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# ---- the digest


def test_equal_tensors_have_one_digest():
    one, two = weight(), weight()
    assert one.digest == two.digest
    assert len(one.digest) == 32
    turned = replace(one, q=one.q.T.contiguous().T)  # other strides, the same numbers
    assert turned.digest == one.digest


@pytest.mark.parametrize("part", PARTS)
def test_the_digest_changes_with_any_part(part):
    one = weight()
    moved = getattr(one, part).clone()
    moved[-1] += 1
    others = [
        replace(one, **{part: moved}),
        replace(one, **{part: getattr(one, part).double()}),
        replace(one, **{part: getattr(one, part).flatten()[:-1].clone()}),
        replace(one, **{part: getattr(one, part)[None].clone()}),
    ]
    assert len({w.digest for w in (one, *others)}) == 5


def test_the_digest_tells_which_part_holds_what():
    one = weight(zero_point=torch.ones(4, 1))
    assert replace(one, scale=one.zero_point, zero_point=one.scale).digest != one.digest


# ---- the file


def test_what_is_written_is_read(tmp_path):
    weights = [weight(0), weight(1, 6, 3), weight(2, shift=torch.zeros(0))]
    recipe = recipe_of(tmp_path, *weights)
    content = (tmp_path / "r.learned.safetensors").read_bytes()
    assert recipe.learned.sha256 == hashlib.sha256(content).hexdigest()
    found = read_learned(recipe)
    assert set(found) == {w.digest for w in weights}
    for w in weights:
        for name in PARTS:
            part = getattr(found[w.digest], name)
            assert torch.equal(part, getattr(w, name))
            assert part.dtype == getattr(w, name).dtype


def test_the_file_depends_on_nothing_but_the_weights(tmp_path):
    weights = [weight(0), weight(1)]
    files = [
        write_learned(some, tmp_path / f"{i}.safetensors").sha256
        for i, some in enumerate((weights, weights[::-1], [*weights, weights[0]]))
    ]
    assert len(set(files)) == 1


def test_a_recipe_that_learned_nothing_has_no_file_to_read():
    assert read_learned(Recipe({"0": SiteRecipe(WeightScheme(4))})) == {}
    gone = LearnedFile("gone.learned.safetensors", "0" * 64)
    assert read_learned(Recipe({"0": SiteRecipe(WeightScheme(4))}, learned=gone)) == {}


def test_a_digest_without_a_file_names_the_layer():
    with pytest.raises(SpecError) as caught:
        read_learned(Recipe({"fc.1": site_of(weight())}))
    assert line_of(caught).startswith("fc.1: learned: ")


@pytest.mark.parametrize("how", ["missing", "folder", "truncated", "empty", "other", "one more"])
def test_a_file_that_is_another_is_one_line_that_names_it(tmp_path, how):
    recipe = recipe_of(tmp_path, weight(0), weight(1))
    path = tmp_path / "r.learned.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "other":
        write_learned([weight(2)], path)
    elif how != "missing":
        path.write_bytes({"truncated": content[:-7], "empty": b""}.get(how, content + b"\0"))
    with pytest.raises(UserError) as caught:
        read_learned(recipe)
    assert line_of(caught).startswith(f"{path}: ")


def forged(tmp_path, tensors):
    """Return a recipe whose file is the right one, but holds ``tensors``."""
    recipe = recipe_of(tmp_path, weight(0), weight(1))
    content = tensors if isinstance(tensors, bytes) else save(tensors)
    path = tmp_path / "r.learned.safetensors"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    return path, replace(recipe, learned=LearnedFile(str(path), sha256))


def parts_of(*weights):
    return {f"{w.digest}.{name}": getattr(w, name) for w in weights for name in PARTS}


TAMPERED = {
    "another number": lambda t: t + 1,
    "another type": lambda t: t.double(),
    "half": lambda t: t.to(torch.bfloat16),
    "another shape": lambda t: t.flatten()[:-1].clone(),
    "empty": lambda t: t.flatten()[:0].clone(),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", TAMPERED)
def test_tensors_that_are_others_than_the_recipe_says(tmp_path, part, how):
    """Whoever sends a recipe may send a file that fits its sum, and no digest."""
    tensors = parts_of(weight(0), weight(1))
    key = f"{weight(1).digest}.{part}"
    tensors[key] = TAMPERED[how](tensors[key])
    path, recipe = forged(tmp_path, tensors)
    with pytest.raises(UserError) as caught:
        read_learned(recipe)
    assert line_of(caught).startswith(f"{path}: ")
    assert "1" in str(caught.value)


@pytest.mark.parametrize("content", [{}, b"", b"nothing of the kind", "half"])
def test_a_file_that_holds_something_else(tmp_path, content):
    path, recipe = forged(tmp_path, parts_of(weight(0)) if content == "half" else content)
    with pytest.raises(UserError) as caught:
        read_learned(recipe)
    assert line_of(caught).startswith(f"{path}: ")


# ---- what is overwritten


def test_our_own_is_overwritten(tmp_path):
    path = learned_path(tmp_path / "tuned.yaml")
    assert path == tmp_path / "tuned.learned.safetensors"
    write_learned([weight(0)], path)
    assert is_learned(path)
    check_target(path, is_learned)
    write_learned([weight(1)], path)
    assert set(load_file(path)) == set(parts_of(weight(1)))


FOREIGN = {
    "a checkpoint": lambda path: save_file({"layer.weight": torch.zeros(3)}, path),
    "norms alone": lambda path: save_file({"norm.scale": torch.zeros(3)}, path),
    "a tensor called q": lambda path: save_file({"q": torch.zeros(3)}, path),
    "no tensors": lambda path: save_file({}, path),
    "text": lambda path: path.write_text("mine"),
    "nothing": lambda path: path.write_bytes(b""),
    "ours and more": lambda path: save_file(parts_of(weight()) | {"mine": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_file_is_never_overwritten(tmp_path, kind):
    path = tmp_path / "tuned.learned.safetensors"
    FOREIGN[kind](path)
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        write_learned([weight()], path)
    assert line_of(caught).startswith(f"{path}: is there already")
    assert path.read_bytes() == before


def test_nothing_is_left_where_it_can_not_be_written(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_learned([weight()], tmp_path / "r.learned.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- what the applier takes of it


def applied(learned, site=None):
    torch.manual_seed(0)
    prepared = prepare(nn.Sequential(nn.Linear(8, 4)).eval())
    applier = Applier(prepared, {}, {learned.digest: learned})
    applier.apply({"0": site or site_of(learned)})
    return prepared.model


def test_the_layer_becomes_what_was_learned():
    learned = weight()
    model, x = applied(learned), torch.randn(5, 8)
    torch.manual_seed(0)
    bias = nn.Linear(8, 4).bias.detach()
    expected = x @ (learned.q * learned.scale).T + bias + learned.shift
    torch.testing.assert_close(model(x).detach(), expected)


def test_without_the_file_it_names_the_layer():
    prepared = prepare(nn.Sequential(nn.Linear(8, 4)).eval())
    with pytest.raises(SpecError) as caught:
        Applier(prepared, {}).apply({"0": site_of(weight())})
    assert line_of(caught).startswith("0: learned: ")


WRONG = {
    "above its grid": weight(q=torch.full((4, 8), 8, dtype=torch.int8)),
    "below its grid": weight(q=torch.full((4, 8), -9, dtype=torch.int8)),
    "integers of another type": weight(q=torch.zeros(4, 8, dtype=torch.int32)),
    "fractions": weight(q=torch.full((4, 8), 0.5)),
    "another layer's inputs": weight(n=9),
    "another layer's channels": weight(channels=5),
    "turned": weight(channels=8, n=4),
    "scales of another granularity": weight(scale=torch.ones(1, 1)),
    "scales of another shape": weight(scale=torch.ones(4)),
    "no shift": weight(shift=torch.zeros(0)),
    "a shift of another layer": weight(shift=torch.zeros(5)),
    "zero points of another granularity": weight(zero_point=torch.zeros(1, 1)),
    "zero points of another layer": weight(zero_point=torch.zeros(3, 1)),
    "zero points of a symmetric scheme": weight(zero_point=torch.ones(4, 1)),
    "no scale": weight(scale=torch.zeros(4, 1)),
    "scales below 0": weight(scale=-torch.ones(4, 1)),
    "scales that are no numbers": weight(scale=torch.full((4, 1), torch.nan)),
    "scales that are infinite": weight(scale=torch.full((4, 1), torch.inf)),
    "scales of another type": weight(scale=torch.ones(4, 1, dtype=torch.float64)),
    "a shift that is no number": weight(shift=torch.full((4,), torch.nan)),
}


@pytest.mark.parametrize("how", WRONG)
def test_tensors_that_do_not_fit_are_one_line_that_names_the_layer(how):
    with pytest.raises(SpecError) as caught:
        applied(WRONG[how])
    assert line_of(caught).startswith("0: ")


@pytest.mark.parametrize(
    "zero_point", [torch.full((4, 1), 99.0), torch.full((4, 1), 0.5), torch.zeros(4, 2)]
)
def test_zero_points_off_the_grid(zero_point):
    learned = weight(zero_point=zero_point)
    with pytest.raises(SpecError) as caught:
        applied(learned, site_of(learned, scheme="asymmetric"))
    assert line_of(caught).startswith("0: ")


@pytest.mark.parametrize(
    "change",
    [
        {"weight": WeightScheme(3)},
        {"weight": WeightScheme(4, "per_tensor")},
        {"weight": WeightScheme(4, "per_group_32")},
        {"correction": SiteRecipe().correction},
    ],
)
def test_a_recipe_that_was_edited_since(change):
    """Bits, granularity and correction are those that it was learned with."""
    learned = weight()
    with pytest.raises(AutoquantError) as caught:
        applied(learned, replace(site_of(learned), **change))
    assert line_of(caught).startswith("0: ")
