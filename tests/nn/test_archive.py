"""Archives: packed integers and a recipe, and an architecture to put them into."""

import copy
import itertools
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import autoquant
from autoquant.errors import ModelFileError
from autoquant.methods.applier import Applier
from autoquant.nn.archive import load_archive, read_recipe, save_archive
from autoquant.nn.convert import prepare, use_channels_last
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme


def blank(model):
    """Return the architecture of ``model`` with other numbers."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.5)
    return other


def saved(case, sites, path):
    """Write the archive of a recipe; return the deployed model."""
    applier = case.applier()
    done = applier.apply(sites(applier.prepared))
    deployed = applier.deploy(done)
    save_archive(deployed, Recipe(done, folded=applier.prepared.folded), path)
    return deployed


@pytest.mark.parametrize(
    ("bits", "granularity", "scheme", "activation"),
    [(8, "per_channel", "symmetric", "per_tensor"), (3, "per_tensor", "asymmetric", "per_token")],
)
def test_an_archive_goes_into_a_fresh_float_architecture(
    case, uniform, equal, tmp_path, bits, granularity, scheme, activation
):
    path = tmp_path / "deep" / "model.safetensors"
    deployed = saved(
        case,
        lambda p: uniform(p, bits, activation, granularity=granularity, scheme=scheme),
        path,
    )
    restored = load_archive(path, blank(case.model))
    assert equal(case.run(restored), case.run(deployed))
    assert restored.state_dict().keys() == deployed.state_dict().keys()
    again = load_archive(path, blank(case.model).train())
    assert equal(case.run(again), case.run(deployed))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_sites_left_in_float_are_stored_as_they_are(case, equal, tmp_path):
    def some(prepared):
        first = prepared.sites[0].name
        return {first: SiteRecipe(WeightScheme(4)), prepared.sites[-1].name: SiteRecipe()}

    path = tmp_path / "model.safetensors"
    deployed = saved(case, some, path)
    assert equal(case.run(load_archive(path, blank(case.model))), case.run(deployed))


def test_tied_weights_are_stored_once_and_are_tied_again(make_case, uniform, tmp_path):
    case, path = make_case("language"), tmp_path / "model.safetensors"
    saved(case, lambda p: uniform(p, 4), path)
    with safe_open(str(path), "pt") as file:
        assert "words._autoquant.weight.packed" in file.keys()  # noqa: SIM118
        assert "out._autoquant.weight.packed" not in file.keys()  # noqa: SIM118
    restored = autoquant.load(path, blank(case.model))
    assert restored.words._autoquant["weight"] is restored.out._autoquant["weight"]


def test_the_recipe_inside_is_the_one_that_was_written(make_case, uniform, tmp_path):
    case, path = make_case("convolutions"), tmp_path / "model.safetensors"
    applier = case.applier()
    done = applier.apply(uniform(applier.prepared, 5))
    recipe = Recipe(done, folded=applier.prepared.folded, seed=7)
    save_archive(applier.deploy(done), recipe, path)
    assert read_recipe(path) == recipe
    assert dict(read_recipe(path).folded) == {"stem.1": "stem.0", "norm": "grouped"}


class Buffers(nn.Module):
    """Holds a part of a larger tensor, and a tensor that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        whole = torch.arange(16.0).reshape(4, 4)
        self.register_buffer("part", whole[0])
        self.register_buffer("other", whole[1:].t())

    def forward(self, x):
        return self.layer(x + self.part) @ self.other


def test_buffers_that_are_views_can_be_saved(tmp_path):
    model, x = Buffers().eval(), torch.randn(2, 4)
    applier = Applier(prepare(model, lambda m: m(x)), {})
    one = {"layer": SiteRecipe(WeightScheme(4))}
    deployed = applier.deploy(one)
    path = tmp_path / "model.safetensors"
    save_archive(deployed, Recipe(one), path)
    assert torch.equal(load_archive(path, blank(Buffers()))(x), deployed(x))


def net(*widths, norm=True):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers, *([nn.LayerNorm(widths[-1])] if norm else []))


@pytest.fixture
def archive(tmp_path):
    applier = Applier(prepare(net(32, 32, 4).eval()), {})
    sites = {
        "0": SiteRecipe(WeightScheme(4, "per_group_32"), ActivationScheme(8, "per_token")),
        "1": SiteRecipe(WeightScheme(8)),
    }
    path = tmp_path / "model.safetensors"
    save_archive(applier.deploy(sites), Recipe(sites), path)
    return path


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (net(32, 4), "no layer '1' here"),
        (net(32, 32, 5), r"'1._autoquant.weight.packed' is \(4, 32\), here it is \(5, 32\)"),
        (net(33, 32, 4), "per_group_32 does not divide the 33 inputs"),
        (net(64, 32, 4), r"'0._autoquant.weight.packed' is \(32, 16\), here it is \(32, 32\)"),
        (net(32, 32, 4, norm=False), "no '2.bias' here"),
        (nn.Sequential(*net(32, 32, 4), nn.LayerNorm(4)), "'3.weight' is not in it"),
        (nn.LayerNorm(3), "nothing to quantize"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_another_architecture_is_refused_in_one_line(archive, other, found):
    with pytest.raises(ModelFileError, match=f"is of another architecture: .*{found}") as caught:
        load_archive(archive, other)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(archive))


def test_a_fold_that_is_not_there_is_refused(make_case, uniform, tmp_path):
    case, path = make_case("convolutions"), tmp_path / "model.safetensors"
    saved(case, lambda p: uniform(p, 8), path)
    other = copy.deepcopy(case.model)
    other.norm = nn.Identity()
    with pytest.raises(ModelFileError, match="is of another architecture: folded: norm → grouped"):
        load_archive(path, other)


@pytest.mark.parametrize("part", [0, 4, 100, -1])
def test_a_truncated_archive_is_one_line(archive, part):
    archive.write_bytes(archive.read_bytes()[:part])
    with pytest.raises(ModelFileError, match="cannot read") as caught:
        load_archive(archive, net(32, 32, 4))
    assert "\n" not in str(caught.value)


def test_what_is_no_archive_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelFileError, match="cannot read"):
        read_recipe(path)
    save_file({"x": torch.zeros(2)}, str(path))
    with pytest.raises(ModelFileError, match="holds no recipe"):
        read_recipe(path)
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ModelFileError, match="cannot read"):
        read_recipe(path)


def test_a_recipe_inside_that_was_changed_is_checked_like_any_other(archive):
    data = archive.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = header["__metadata__"]["autoquant_recipe"]
    header["__metadata__"]["autoquant_recipe"] = text.replace("bits: 4", "bits: 99")
    new = json.dumps(header).encode()
    archive.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    with pytest.raises(autoquant.errors.SpecError, match="bits: found 99"):
        load_archive(archive, net(32, 32, 4))


class Graph(nn.Module):
    """A graph of one's own in a sparse buffer."""

    def __init__(self, count, layout):
        super().__init__()
        dense = torch.zeros(4, 4)
        dense.flatten()[torch.randperm(16)[:count]] = torch.rand(count) + 0.5
        self.register_buffer("edges", dense.to_sparse(layout=layout))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.sparse.mm(self.edges, x.t()).t())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_kept(layout, tmp_path):
    x, path = torch.randn(5, 4), tmp_path / "graph.safetensors"
    prepared = prepare(Graph(6, layout))
    recipe = Recipe({"fc": SiteRecipe(WeightScheme(8))})
    deployed = Applier(prepared, {}).deploy(recipe.sites)
    save_archive(deployed, recipe, path)
    loaded = load_archive(path, Graph(6, layout))
    assert loaded.edges.layout is layout
    assert torch.equal(loaded(x), deployed(x))
    if layout is torch.sparse_coo:  # of which another graph may have more edges
        assert torch.equal(load_archive(path, Graph(9, layout))(x), deployed(x))
    else:
        with pytest.raises(ModelFileError, match=r"is of another architecture: .*edges") as caught:
            load_archive(path, Graph(9, layout))
        assert "\n" not in str(caught.value)


def test_a_sparse_buffer_with_indices_beyond_its_shape_is_refused(tmp_path):
    path = tmp_path / "graph.safetensors"
    recipe = Recipe({"fc": SiteRecipe(WeightScheme(8))})
    deployed = Applier(prepare(Graph(6, torch.sparse_coo)), {}).deploy(recipe.sites)
    save_archive(deployed, recipe, path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["edges@indices"][0, 0] = 1 << 40
    save_file(tensors, path, metadata)
    with pytest.raises(ModelFileError, match="is of another architecture") as caught:
        load_archive(path, Graph(6, torch.sparse_coo))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("last", [True, False])
def test_convolutions_compute_in_the_memory_format_that_they_were_applied_in(last, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    x, path = torch.randn(4, 3, 12, 12), tmp_path / "net.safetensors"
    architecture, prepared = copy.deepcopy(net), prepare(net)
    use_channels_last(net, on=last)
    recipe = Recipe({name: SiteRecipe(WeightScheme(8)) for name in ("0", "2")})
    deployed = Applier(prepared, {}).deploy(recipe.sites)
    save_archive(deployed, recipe, path)
    loaded = load_archive(path, architecture)
    assert [m.forward.channels_last for m in (loaded[0], loaded[2])] == [last, last]
    assert torch.equal(loaded(x), deployed(x))


def test_compiled_and_parallel_architectures(tmp_path):
    path, net = tmp_path / "net.safetensors", nn.Sequential(nn.Linear(4, 3))
    prepared = prepare(copy.deepcopy(net))
    recipe = Recipe({"0": SiteRecipe(WeightScheme(8))})
    save_archive(Applier(prepared, {}).deploy(recipe.sites), recipe, path)
    assert isinstance(load_archive(path, torch.compile(net)), nn.Sequential)
    with pytest.raises(ModelFileError, match=r"DataParallel.*\.module"):
        load_archive(path, nn.DataParallel(net))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelFileError, match="cannot write"):
        save_archive(nn.Linear(2, 2), Recipe({"weight": SiteRecipe()}), blocked / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
