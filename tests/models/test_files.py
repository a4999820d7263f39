import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoquant.errors import AutoquantError, ModelFileError, SpecError, TaskError
from autoquant.models.files import load, sha256_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # torch announces that TorchScript is going away.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def crime(tmp_path):
    """Return a path that only code run from a malicious file would create."""
    return tmp_path / "crime"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(path):
    model = Net()
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    model.load_state_dict(state)
    return model.train()


def refused(match, *args, error=ModelFileError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(loaded, net, kind):
    assert loaded.kind == kind
    assert loaded.name == "net"
    assert not any(m.training for m in loaded.module.modules())
    assert torch.equal(loaded.module(X), net(X))


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_goes_through_load_model(tmp_path, net, legacy):
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    loaded = load(path, load_model=build)
    same(loaded, net, "load_model")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_go_through_load_model(tmp_path, net):
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path)
    same(load(path, load_model=build), net, "load_model")
    assert "load_model(path)" in refused("holds tensors", path)


def test_any_format_goes_through_load_model(tmp_path, net):
    path = tmp_path / "net.npz"
    np.savez(path, **{k: v.numpy() for k, v in net.state_dict().items()})

    def load_model(path):
        model = Net()
        model.load_state_dict({k: torch.from_numpy(v) for k, v in np.load(path).items()})
        return model

    same(load(path, load_model=load_model), net, "load_model")
    refused("holds no model that torch can read: add load_model", path)


@pytest.mark.parametrize("load_model", [None, build])
def test_exported_program_and_pickle_give_the_layers_of_the_state_dict(tmp_path, net, load_model):
    archive, pickled = tmp_path / "net.pt2", tmp_path / "net.pth"
    torch.export.save(torch.export.export(net, (X,)), archive)
    torch.save(net, pickled)
    lifted = load(archive, load_model=load_model)
    same(lifted, net, "pt2")
    same(load(pickled, load_model=load_model, trust_pickle=True), net, "pickle")
    for name, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            assert type(lifted.module.get_submodule(name)) is type(module)


@pytest.mark.parametrize("load_model", [None, build])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_is_refused_with_the_safe_ways(tmp_path, crime, load_model, legacy):
    path = tmp_path / "model.pt"
    content = {"a": torch.ones(1), "b": Bomb(crime)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refused("pickle of more than tensors", path, load_model=load_model)
    for part in ("runs code", "load_model(path)", "torch.export.save(", "--trust-pickle"):
        assert part in message
    assert not crime.exists()


def test_pickle_names_its_classes(tmp_path, net):
    torch.save(net, tmp_path / "net.pt")
    assert "test_files.Net" in refused("it names", tmp_path / "net.pt")


def test_plain_pickle_is_refused(tmp_path, crime):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb(crime)))
    refused("pickle of more than tensors", path)
    assert not crime.exists()
    refused("unpickling raised", path, trust_pickle=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.pt2", "pickle of more than tensors"),
        ("model.bin", "pickle of more than tensors"),
        ("model.safetensors", "damaged model file"),
    ],
)
def test_renamed_pickle_is_refused(tmp_path, crime, name, match):
    torch.save(Bomb(crime), tmp_path / name)
    refused(match, tmp_path / name)
    assert not crime.exists()


def test_trusted_pickle_of_no_module_goes_through_load_model(tmp_path, net):
    path = tmp_path / "net.pt"
    torch.save({"state": net.state_dict(), "options": slice(1)}, path)
    refused("a state_dict or another table", path, trust_pickle=True)

    def load_model(path):
        model = Net()
        model.load_state_dict(torch.load(path, weights_only=False)["state"])
        return model

    same(load(path, load_model=load_model, trust_pickle=True), net, "load_model")


def test_state_dict_without_load_model_lists_keys(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    message = refused(r"add load_model\(path\)", tmp_path / "net.pt")
    assert "conv.weight, conv.bias, norm.weight and 6 more" in message
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    refused("a Tensor, not a model", tmp_path / "tensor.pt")


def script(net, path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(net, X).save(str(path))


def test_torchscript_is_converted_where_it_is_trusted(tmp_path, net):
    path = tmp_path / "net.pt"
    script(net, path)
    same(load(path, trust_pickle=True, example_inputs=(X,)), net, "torchscript")
    loaded = load(path, trust_pickle=True, example_inputs=lambda: (X,))
    assert type(loaded.module.conv) is nn.Conv2d
    assert loaded.module.state_dict().keys() >= {"conv.weight", "fc.bias", "norm.running_var"}


def test_torchscript_is_refused_with_the_line_that_makes_a_pt2(tmp_path, net):
    path = tmp_path / "net.pt"
    script(net, path)
    line = r"torch\.export\.save\(torch\.export\.export\(model, inputs\), 'model\.pt2'\)"
    refused(rf"TorchScript, which can run code.*{line}.*--trust-pickle", path)
    refused(rf"inputs to try it on.*{line}", path, trust_pickle=True)
    refused(rf"can't convert.*{line}", path, trust_pickle=True, example_inputs=(torch.ones(1),))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("m.pt", b"", "empty"),
        ("m.pt2", b"", "empty"),
        ("m.pt", b"hello, this is text\n", "no model that torch can read"),
        ("m.pt2", b"hello, this is text\n", "not a .pt2 file"),
        ("m.safetensors", b"hello, this is text\n", "not a .safetensors file"),
        ("m.pt", b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG image"),
        ("m.pt", b"\xff\xd8\xff\xe0" + bytes(64), "a JPEG image"),
        ("m.pt", b"PK\x03\x04" + bytes(64), "a damaged archive"),
        ("m.pt", np.random.default_rng(0).bytes(512), "no model that torch can read"),
    ],
)
def test_files_that_are_no_model_are_one_line(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refused(match, path)


def test_missing_files_and_folders_are_one_line(tmp_path):
    refused("no such file", tmp_path / "none.pt")
    refused("a folder", tmp_path)
    with pytest.raises(ModelFileError, match="can't be read"):
        sha256_of(tmp_path / "none.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "pt2"])
def test_file_cut_short_anywhere_is_one_line(tmp_path, net, form):
    file = io.BytesIO()
    if form == "pt2":
        torch.export.save(torch.export.export(net, (X,)), file)
    else:
        torch.save(net.state_dict(), file, _use_new_zipfile_serialization=form == "zip")
    content = file.getvalue()
    path = tmp_path / f"m.{'pt2' if form == 'pt2' else 'pt'}"
    for size in (1, 3, 10, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused("m.pt", path)


def test_archive_with_a_flipped_byte_is_one_line(tmp_path, net):
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (X,)), file)
    content = bytearray(file.getvalue())
    content[content.index(b'{"graph_module"') + 40] ^= 0xFF
    (tmp_path / "m.pt2").write_bytes(content)
    refused("not a torch.export archive", tmp_path / "m.pt2")


def test_load_model_that_fails_is_one_line(tmp_path, net):
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)

    def wrong(path):
        nn.Linear(1, 1).load_state_dict(torch.load(path))

    message = refused(
        r"wrong\(\) raised RuntimeError: Error", path, error=TaskError, load_model=wrong
    )
    assert "test_files.py" in message

    def spec(path):
        raise SpecError("kept as it is")

    refused("^kept as it is$", path, error=AutoquantError, load_model=spec)


def test_load_model_that_returns_no_module_is_one_line(tmp_path, net):
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    refused(
        r"returned a OrderedDict: return an nn\.Module",
        path,
        error=TaskError,
        load_model=torch.load,
    )
    refused("returned a NoneType", path, error=TaskError, load_model=lambda _: None)


@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (nn.DataParallel, r"net.pt: the model is a DataParallel.*\.module"),
        (lambda net: net.to("meta"), r"net.pt: conv\.weight: on the meta device"),
        (lambda net: nn.Sequential(net, nn.LazyLinear(2)), r"net.pt: 1\.weight: lazy"),
    ],
    ids=["parallel", "meta", "lazy"],
)
def test_load_model_that_returns_no_plain_module_is_one_line(tmp_path, net, wrap, match):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    refused(match, tmp_path / "net.pt", load_model=lambda path: wrap(Net()))


def test_load_model_may_return_a_compiled_module(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt", load_model=lambda path: torch.compile(build(path)))
    same(loaded, net, "load_model")
    assert isinstance(loaded.module, Net)


def test_load_model_may_return_an_exported_program(tmp_path, net):
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    program = torch.export.export(net, (X,))
    same(load(path, load_model=lambda _: program), net, "load_model")
