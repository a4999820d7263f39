import functools
import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from autoquant.errors import ModelFileError
from autoquant.models.archive import read_program
from autoquant.models.archive_graph import Unsafe, clean
from autoquant.models.exported import lift

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x, table, *, mode="mean"):
        with torch.no_grad():
            y = self.fc(x) + table["a b"] + self.shift
        if x.shape[0] % 2 == 0:
            y = y + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return {"y": y.reshape(x.shape[0] * 2, -1), "m": y.mean()}


@functools.cache
def original():
    """Return the records of an ordinary archive, and the program in it."""
    auto = torch.export.Dim.AUTO
    x = torch.randn(6, 4)
    program = torch.export.export(
        Model().eval(),
        (x, {"a b": x}),
        {"mode": "mean"},
        dynamic_shapes={"x": {0: auto}, "table": {"a b": {0: auto}}, "mode": None},
    )
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"notes.txt": "hello"})
    with zipfile.ZipFile(file) as archive:
        return {n: archive.read(n) for n in archive.namelist()}, program


def write(path, changes=None, compression=zipfile.ZIP_STORED):
    records = {**original()[0], **{f"archive/{k}": v for k, v in (changes or {}).items()}}
    root = next(iter(original()[0])).partition("/")[0]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(name.replace("archive/", f"{root}/", 1), content)
    return path


def record(name):
    return json.loads(next(v for k, v in original()[0].items() if k.endswith(name)))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def crime(tmp_path):
    """Return a path that only code run from a malicious archive would create."""
    return tmp_path / "crime"


def refused(path, crime, match):
    with pytest.raises(ModelFileError, match=match) as caught:
        read_program(path).module()
    assert "\n" not in str(caught.value)
    assert not crime.exists()


def test_ordinary_archive_is_read_as_torch_reads_it(tmp_path):
    program = read_program(write(tmp_path / "m.pt2"))
    want = original()[1].module()
    got = lift(program)
    for rows in (4, 8):
        x = torch.randn(rows, 4)
        assert torch.equal(
            got(x, {"a b": x}, mode="mean")["y"], want(x, {"a b": x}, mode="mean")["y"]
        )
    with pytest.raises(AssertionError, match="Guard failed"):
        got(torch.randn(6, 3), {"a b": torch.randn(6, 3)}, mode="mean")
    assert program._guards_code == original()[1]._guards_code
    assert program.state_dict.keys() == original()[1].state_dict.keys()


def test_pickled_sample_inputs_are_left_out(tmp_path, crime):
    file = io.BytesIO()
    torch.save(Bomb(crime), file)
    path = write(tmp_path / "m.pt2", {"data/sample_inputs/model.pt": file.getvalue()})
    assert read_program(path).example_inputs is None
    assert not crime.exists()


def test_bomb_goes_off_where_torch_loads_it(tmp_path, crime):
    # So that the tests beside this one are known to test something.
    file = io.BytesIO()
    torch.save(Bomb(crime), file)
    path = write(tmp_path / "m.pt2", {"data/sample_inputs/model.pt": file.getvalue()})
    with pytest.raises(ModelFileError):
        read_program(path, trust=True)
    assert crime.exists()


@pytest.mark.parametrize("legacy", ["data/weights/model.pt", "data/constants/model.pt"])
def test_tables_of_an_older_torch_are_unpickled_safely(tmp_path, crime, legacy):
    file = io.BytesIO()
    torch.save({"fc.weight": Bomb(crime)}, file)
    path = write(tmp_path / "m.pt2", {legacy: file.getvalue()})
    refused(path, crime, "holds a pickle of more than tensors")


def test_tables_of_an_older_torch_are_read(tmp_path):
    program = original()[1]
    file = io.BytesIO()
    torch.save(dict(program.state_dict), file)
    path = write(tmp_path / "m.pt2", {"data/weights/model.pt": file.getvalue()})
    assert torch.equal(read_program(path).state_dict["fc.weight"], program.state_dict["fc.weight"])


def test_weight_marked_as_pickled_is_refused(tmp_path, crime):
    config = record("model_weights_config.json")
    config["config"]["fc.weight"]["use_pickle"] = True
    path = write(
        tmp_path / "m.pt2",
        {
            "data/weights/model_weights_config.json": json.dumps(config),
            "data/weights/weight_0": pickle.dumps(Bomb(crime)),
        },
    )
    refused(path, crime, "'fc.weight' as a pickle")


@pytest.mark.parametrize("kind", ["custom_obj_0", "opaque_obj_0"])
def test_object_that_is_no_tensor_is_refused(tmp_path, crime, kind):
    config = {"config": {"thing": {**_payload(), "path_name": kind}}}
    changes = {"data/constants/model_constants_config.json": json.dumps(config)}
    refused(write(tmp_path / "a.pt2", changes), crime, "'thing' as a pickle")
    changes = {f"data/constants/{kind}": pickle.dumps(Bomb(crime))}
    refused(write(tmp_path / "b.pt2", changes), crime, "holds an object that is no tensor")


def _payload():
    return next(iter(record("model_weights_config.json")["config"].values()))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("data/aotinductor/model/model.so", "not part of an exported program"),
        ("models/other.json", "more than one model"),
        ("models/model.json", "no models/model.json"),
    ],
)
def test_other_parts_are_refused(tmp_path, crime, name, match):
    content = None if name == "models/model.json" else b"{}"
    changes = {name: content}
    path = tmp_path / "m.pt2"
    if content is None:
        root = next(iter(original()[0])).partition("/")[0]
        with zipfile.ZipFile(path, "w") as archive:
            for key, value in original()[0].items():
                if key != f"{root}/{name}":
                    archive.writestr(key, value)
    else:
        write(path, changes)
    refused(path, crime, match)


def test_compressed_records_are_refused(tmp_path, crime):
    refused(write(tmp_path / "m.pt2", compression=zipfile.ZIP_DEFLATED), crime, "compressed")


def test_two_records_of_one_name_are_refused(tmp_path, crime):
    path = write(tmp_path / "m.pt2")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(n for n in archive.namelist() if n.endswith("model.json")), b"{}")
    refused(path, crime, "two records")


def _code(crime):
    return f"open('{crime}','w')"


def edit(program, where, value):
    """Set the entry of the program's JSON that the path ``where`` leads to."""
    *path, last = where
    for key in path:
        program = program[key]
    program[last] = value


GRAPH = ("graph_module", "graph")


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        (("guards_code", 0), "{code}", "more than arithmetic"),
        (("guards_code", 0), "L['x'].size()[0] == 1 # {code}", "shape expression"),
        (("guards_code", 0), "L['x\"), {plain}, (\"'].size()[0] == 1", "shape expression"),
        (("guards_code", 0), "().__class__.__base__", "more than arithmetic"),
        ((*GRAPH, "nodes", 0, "target"), "torch.os.system", r"calls 'torch\.os\.system'"),
        ((*GRAPH, "nodes", 0, "target"), "torch.load", "calls 'torch.load'"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.load_library", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.aten.from_file.default", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.aten.save.default", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.debugprims.load_tensor.default", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.higher_order.call_torchbind", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "torch.ops.aten.__class__.mro", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "_operator.methodcaller", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "math.__loader__", "calls"),
        ((*GRAPH, "nodes", 0, "target"), "#anything:op", "calls"),
        ((*GRAPH, "nodes", 0, "name"), "y = {code}", "has a variable named"),
        ((*GRAPH, "nodes", 0, "inputs", 0, "name"), "x={code}", "has a variable named"),
        ((*GRAPH, "inputs", 0, "as_tensor", "name"), "x={code}", "has a variable named"),
        ((*GRAPH, "sym_int_values", "n"), {"as_expr": {"expr_str": "{code}"}}, "arithmetic"),
        ((*GRAPH, "sym_int_values", "n"), {"as_expr": {"expr_str": "__import__"}}, "arithmetic"),
        ((*GRAPH, "sym_int_values", "n={code}"), {"as_int": 1}, "names something"),
        (("graph_module", "signature", "input_specs", 0, "parameter", "parameter_name"),
         'fc"); {code} ("', "names something"),
        (("graph_module", "module_call_graph", 0, "signature", "forward_arg_names", 0),
         "x={code}", "has a variable named"),
        (("graph_module", "module_call_graph", 0, "signature", "in_spec"),
         '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]',
         "takes or returns"),
        (("graph_module", "module_call_graph", 0, "signature", "in_spec"),
         '[1, {"type": "builtins.dict", "context": "[\\"a\\\\\\"b\\"]", "children_spec": []}]',
         "in a way that torch does not"),
    ],
)  # fmt: skip
def test_code_in_the_graph_is_refused(tmp_path, crime, where, value, match):
    program = record("models/model.json")

    def filled(v):
        if isinstance(v, dict):
            return {k: filled(x) for k, x in v.items()}
        return v.replace("{code}", _code(crime)).replace("{plain}", f"open('{crime}')") \
            if isinstance(v, str) else v  # fmt: skip

    edit(program, [filled(k) for k in where], filled(value))
    refused(write(tmp_path / "m.pt2", {"models/model.json": json.dumps(program)}), crime, match)


def test_text_that_is_pasted_into_a_check_loses_its_quotation_marks():
    assert clean({"as_string": "m'); f(\"\\"}) == {"as_string": "m ); f(  "}
    assert clean({"as_string": "bij,jk->bik"}) == {"as_string": "bij,jk->bik"}


def test_object_argument_is_refused():
    with pytest.raises(Unsafe, match="no tensor"):
        clean({"arg": {"as_custom_obj": {"name": "x", "class_fqn": "y"}}})


def test_devices_become_the_cpu():
    assert clean({"as_device": {"type": "cuda", "index": 1}}) == {
        "as_device": {"type": "cpu", "index": None}
    }


def test_program_of_another_version_is_one_line(tmp_path, crime):
    program = record("models/model.json")
    program["schema_version"]["major"] = 99
    path = write(tmp_path / "m.pt2", {"models/model.json": json.dumps(program)})
    refused(path, crime, "export it again with this version")
