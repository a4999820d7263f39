import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from autoquant.models.exported import lift
from autoquant.nn.sites import find_sites

pytestmark = [
    # What torch.export itself says when a recurrent network goes through it.
    pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    # What copying any exported graph says: torch's own structures are of a class it deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def block(size_in, size_out, kernel, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(size_in, size_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(size_out),
        nn.ReLU6(inplace=True),
    )


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(block(3, 8, 3, 2), block(8, 8, 3, groups=8), block(8, 12, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, scale=None):
        x = self.embedding(tokens)
        y, _ = self.attention(x, x, x, need_weights=False)
        x = self.norm(x + y)
        return {"logits": self.head(x if scale is None else x * scale)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 5, 2, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(10, 6, proj_size=3)

    def forward(self, x):
        y, h = self.gru(x)
        z, (hidden, cell) = self.lstm(y)
        return z, h, hidden, cell


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.Conv1d(4, 6, 3, padding="same", dilation=2)
        self.circular = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular", groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 3, 2, 1, 1)
        self.up2 = nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), groups=2, dilation=2)
        self.volume = nn.Conv3d(1, 2, 2, bias=False)
        self.norm = nn.BatchNorm3d(2, affine=False)

    def forward(self, x):
        y = self.up2(self.up(self.circular(self.same(x))).unsqueeze(-1).repeat(1, 1, 1, 3))
        return self.norm(self.volume(y.unsqueeze(1)))


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(6, 3))
        self.inner.b = nn.Parameter(torch.randn(3))
        self.table = nn.Embedding(9, 3)

    def forward(self, x):
        y = torch.matmul(x @ self.weight, self.inner.w) + self.inner.b
        flat = torch.addmm(self.inner.b, y.flatten(0, 1), self.table.weight[:3].detach())
        return y, flat


def settled(model):
    """Give batch norms statistics that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
    return model.eval()


CASES = {
    "depthwise": (Depthwise, lambda: torch.randn(2, 3, 12, 12), True),
    "transformer": (Transformer, lambda: torch.randint(0, 11, (2, 5)), True),
    "recurrent": (Recurrent, lambda: torch.randn(2, 3, 4), False),
    "convolutions": (Convolutions, lambda: torch.randn(2, 4, 7), False),
    "products": (Products, lambda: torch.randn(2, 5, 4), False),
}


@functools.cache
def exported(name, form):
    """Return a model, an input, and its program: as exported, decomposed, or saved and loaded."""
    if form != "training":
        model, x, program = exported(name, "training")
        if form == "core":
            return model, x, program.run_decompositions()
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return model, x, torch.export.load(file)
    make, inputs, dynamic = CASES[name]
    torch.manual_seed(0)
    model, x = settled(make()), inputs()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return model, x, torch.export.export(model, (x,), dynamic_shapes=shapes)


def layers(model):
    """Return the type of every module that holds parameters of its own, by its name."""
    return {n: type(m) for n, m in model.named_modules() if list(m.parameters(recurse=False))}


@pytest.mark.parametrize("form", ["training", "core", "loaded"])
@pytest.mark.parametrize("name", CASES)
def test_lifted_program_computes_what_the_model_does(name, form):
    model, x, program = exported(name, form)
    lifted = lift(program)
    for got, want in zip(pytree.tree_leaves(lifted(x)), pytree.tree_leaves(model(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["depthwise", "recurrent", "convolutions"])
def test_same_operators_give_the_same_bits(name):
    model, x, program = exported(name, "loaded")
    for got, want in zip(
        pytree.tree_leaves(lift(program)(x)), pytree.tree_leaves(model(x)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["training", "loaded"])
@pytest.mark.parametrize("name", ["depthwise", "recurrent", "convolutions"])
def test_layers_and_state_are_those_of_the_model(name, form):
    model, _, program = exported(name, form)
    lifted = lift(program)
    assert layers(lifted) == layers(model)
    assert lifted.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(lifted.state_dict()[key], value), key
    assert [(s.name, s.kind, s.shape) for s in find_sites(lifted)[0]] == [
        (s.name, s.kind, s.shape) for s in find_sites(model)[0]
    ]


def test_decomposed_convolutions_and_batch_norms_are_the_same_layers():
    model, _, program = exported("depthwise", "core")
    lifted = lift(program)
    assert layers(lifted) == layers(model)
    for name, original in model.named_modules():
        if isinstance(original, (nn.Conv2d, nn.BatchNorm2d)):
            assert str(lifted.get_submodule(name)) == str(original)


@pytest.mark.parametrize("form", ["training", "core", "loaded"])
def test_sites_of_a_transformer_have_the_names_of_the_original(form):
    model, _, program = exported("transformer", form)
    lifted = lift(program)
    assert {s.name for s in find_sites(lifted)[0]} == {s.name for s in find_sites(model)[0]}
    assert type(lifted.embedding) is nn.Embedding
    assert lifted.embedding.padding_idx == 0
    assert type(lifted.head) is nn.Linear
    assert lifted.head.weight is lifted.embedding.weight


def test_sites_of_an_unrolled_gru_have_the_names_of_its_weights():
    _, _, program = exported("recurrent", "core")
    names = {s.name for s in find_sites(lift(program))[0]}
    assert {"gru.weight_ih_l0", "gru.weight_hh_l0", "gru.weight_hh_l1_reverse"} <= names


@pytest.mark.parametrize("form", ["training", "core"])
def test_product_becomes_linear_of_the_transposed(form):
    model, x, program = exported("products", form)
    lifted = lift(program)
    assert type(lifted.weight) is nn.Linear
    assert torch.equal(lifted.weight.weight, model.weight.t())
    assert torch.equal(lifted.inner.w.weight, model.inner.w.t())
    # A slice of a parameter is no layer's weight: it stays a parameter, and the product works.
    assert torch.equal(lifted.table.weight, model.table.weight)
    assert type(lifted.table) is nn.Module
    torch.testing.assert_close(lifted(x), model(x))


def test_one_parameter_in_two_operators_stays_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, i):
            return self.table(i) @ self.table.weight.t(), nn.functional.linear(
                self.table(i), self.table.weight
            )

    model, i = Tied().eval(), torch.tensor([[1, 2]])
    lifted = lift(torch.export.export(model, (i,)))
    sites, rest = find_sites(lifted)
    assert [(s.name, len(s.users)) for s in sites] == [("table", 2)]
    assert rest == ()
    with torch.no_grad():
        lifted.table.weight.mul_(2)
        model.table.weight.copy_(lifted.table.weight)
    torch.testing.assert_close(lifted(i), model(i))


def test_parameter_with_a_reader_that_is_no_layer_is_left_alone():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) * self.fc.weight.sum()

    model, x = Half().eval(), torch.randn(2, 3)
    lifted = lift(torch.export.export(model, (x,)))
    assert find_sites(lifted)[0] == ()
    assert lifted.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(lifted(x), model(x))


def test_one_matrix_read_both_ways_is_left_alone():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return (x @ self.w) @ self.w.t()

    model, x = Autoencoder().eval(), torch.randn(2, 4)
    lifted = lift(torch.export.export(model, (x,)))
    assert isinstance(lifted.w, nn.Parameter)
    assert torch.equal(lifted(x), model(x))


def test_layer_called_twice_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x))

    model, x = Twice().eval(), torch.randn(2, 3)
    lifted = lift(torch.export.export(model, (x,)))
    assert layers(lifted) == {"fc": nn.Linear}
    assert torch.equal(lifted(x), model(x))


def test_batch_norm_in_training_mode_stays_an_operator():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    lifted = lift(torch.export.export(model, (torch.randn(2, 2, 4, 4),)))
    assert type(lifted.get_submodule("1")) is nn.Module
    assert type(lifted.get_submodule("0")) is nn.Conv2d


def test_operators_in_a_no_grad_block_are_lifted():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.out = nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.fc(x).relu()
            return self.out(x)

    model, x = Frozen().eval(), torch.randn(2, 3)
    lifted = lift(torch.export.export(model, (x,)))
    assert layers(lifted) == layers(model)
    assert torch.equal(lifted(x), model(x))


def test_addend_that_is_computed_is_added_after_the_layer():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return torch.addmm(x, x, self.w)

    model, x = Residual().eval(), torch.randn(2, 3)
    lifted = lift(torch.export.export(model, (x,)))
    assert type(lifted.w) is nn.Linear
    torch.testing.assert_close(lifted(x), model(x))


def test_copy_in_another_mode_works_for_other_batch_sizes_and_checks_shapes():
    model, x, program = exported("depthwise", "loaded")
    lifted = copy.deepcopy(lift(program))
    assert not lifted.training
    assert not any(m.training for m in lifted.modules())
    assert lifted.train().get_submodule("features.0.1").training
    lifted.eval()
    more = torch.cat([x, x, x])
    assert torch.equal(lifted(more), model(more))
    with pytest.raises(AssertionError, match=r"Guard failed: x\.size\(\)\[1\] == 3"):
        lifted(torch.randn(2, 4, 12, 12))


def test_shapes_are_checked_without_example_inputs():
    program = copy.copy(exported("depthwise", "training")[2])
    program._example_inputs = None
    lifted = copy.deepcopy(lift(program))
    assert program.example_inputs is None
    with pytest.raises(AssertionError, match="Guard failed"):
        lifted(torch.randn(2, 4, 12, 12))


def test_keywords_and_nested_inputs_are_called_as_the_program_is():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, pair, *, scale=None):
            return [self.fc(pair["a"][0]), {"s": pair["a"][1] * scale}]

    model = Nested().eval()
    inputs = {"a": (torch.randn(2, 3), torch.randn(2))}
    scale = torch.tensor(2.0)
    lifted = lift(torch.export.export(model, (inputs,), {"scale": scale}))
    got, want = lifted(inputs, scale=scale), model(inputs, scale=scale)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1]["s"], want[1]["s"])


def test_lifted_model_can_be_exported_again():
    model, x, program = exported("depthwise", "loaded")
    shapes = ({0: torch.export.Dim("batch")},)
    again = torch.export.export(lift(program), (x,), dynamic_shapes=shapes)
    more = torch.cat([x, x])
    assert torch.equal(lift(again)(more), model(more))


def test_gradients_reach_the_lifted_parameters():
    model, x, program = exported("products", "training")
    lifted = lift(program)
    lifted(x)[0].sum().backward()
    (want,) = torch.autograd.grad(model(x)[0].sum(), [model.weight])
    torch.testing.assert_close(lifted.weight.weight.grad, want.t())
