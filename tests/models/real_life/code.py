"""Models whose own code asks things of layers, tensors or torch that a swap would change."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models.real_life.case import Case, images, lively, sequences, vectors


class Autocast(nn.Module):
    """Casts in forward, as deployed models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = F.relu(self.body(x))
        return self.head(x.float())


class AsksParameters(nn.Module):
    """Asks its first parameter for dtype and device, as Hugging Face models do; has no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        return self.head(F.relu(self.body(x.to(first.device, first.dtype))))


class AsksType(nn.Module):
    """Compares types exactly, to know what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0][:, -1] if type(layer) is nn.LSTM else layer(x)
        return x


class AsksWeights(nn.Module):
    """Reads dtype, device and norms of layers and of a norm that can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), lively(nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.weight.dtype)
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(x.to(self.head.weight.device)) * self.norm.weight.abs().mean()


class Functional(nn.Module):
    """Calls a layer with other weights than its own (hypernetworks, MAML)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.gain = nn.Linear(16, 16), nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + 0.1 * torch.tanh(self.gain(x).mean())
        given = {name: value * gain for name, value in self.body.named_parameters()}
        return self.head(F.relu(torch.func.functional_call(self.body, given, (x,))))


class Checkpointed(nn.Module):
    """Recomputes in the backward pass (training code that stays in forward)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Named(nn.Module):
    """Attributes of a user's own, by names that any library might take for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        self.fc.clamp = lambda x: x.clamp(-2.0, 2.0)
        self.fc.sites, self.fc.operation, self.fc.reader, self.fc.gelu = 3, "mine", "x", 0.5
        self.act.clamp, self.act.float_type, self.head.choice = 1.5, "relu", 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc.clamp(self.act(self.fc(x))) * self.fc.sites * self.fc.gelu
        assert (self.fc.operation, self.fc.reader) == ("mine", "x")
        assert self.act.float_type == "relu"
        return self.head(x) * self.act.clamp * self.head.choice


class Delegates(nn.Module):
    """Finds what it lacks in the model that it wraps (PEFT, Accelerate, Lightning)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
        self.inner.temperature = 2.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / self.temperature


class Adapter(nn.Module):
    """PEFT's LoRA: a layer that holds a layer, and two small ones by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 16)
        self.lora_a = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
        self.lora_b = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_b["default"](self.lora_a["default"](x))


class NoMode(nn.Module):
    """Refuses to be put in eval mode again by returning None (old Lightning code)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def eval(self) -> None:  # type: ignore[override]
        super().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Forces(nn.Module):
    """An energy and its gradient by positions: interatomic potentials (PyG, SchNet, MACE)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 32), nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            hidden = F.silu(self.two(F.silu(self.one(positions))))
            energy = self.out(hidden).sum((1, 2))
            (gradient,) = torch.autograd.grad(energy.sum(), positions)
        return energy.detach(), -gradient


class BareForces(Forces):
    """The same, but counts on its caller to run it with gradients."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.detach().requires_grad_()
        hidden = F.silu(self.two(F.silu(self.one(positions))))
        energy = self.out(hidden).sum((1, 2))
        return energy, -torch.autograd.grad(energy.sum(), positions)[0]


def with_gradients(model: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Call a model with gradients, as a task file does."""
    with torch.enable_grad():
        return model(positions)


class ForcesOnly(Forces):
    """The same model, of which the forces alone are asked."""

    def forward(self, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(positions)[1]


class KeepsLast(nn.Module):
    """Keeps its last features for others to read: from training, they carry a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        self.features: Tensor | None = None
        self.history: dict[str, list[Tensor]] = {"norms": []}

    def forward(self, x: Tensor) -> Tensor:
        self.features = F.relu(self.body(x))
        self.history["norms"] = [self.features.norm()]
        return self.head(self.features)


def trained() -> nn.Module:
    """Return a model that has run once outside no_grad."""
    model = KeepsLast()
    model(torch.randn(3, 16))
    return model


class Ensemble(nn.Module):
    """Members run at once by vmap over their stacked parameters (torch.func)."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = ([getattr(m, k) for m in self.members] for k in ("weight", "bias"))
        every = torch.func.vmap(F.linear, (None, 0, 0))(
            x, torch.stack(weights), torch.stack(biases)
        )
        return self.head(F.relu(every.mean(0)))


class Stateful(nn.Module):
    """Carries a state from one call to the next (streaming recognizers)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 16), nn.Linear(16, 5)
        self.register_buffer("state", torch.zeros(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.state.expand(len(x), -1))
        self.state = 0.9 * self.state + h.mean(0, keepdim=True)
        return self.head(h)


class AlwaysDrops(nn.Module):
    """F.dropout without ``training=self.training``: it drops in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.body(x)), 0.5))


class Silenced(nn.Module):
    """Runs under its own no_grad and inference_mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(), contextlib.nullcontext():
            x = F.relu(self.body(x))
            return self.head(x)


CASES = (
    Case(
        "autocast_in_forward",
        Autocast,
        vectors,
        "dtypes of weight and activation differ under autocast",
        quick=True,
    ),
    Case(
        "asks_its_parameters",
        AsksParameters,
        vectors,
        "StopIteration: a quantized model has no parameters left",
        quick=True,
    ),
    Case("asks_exact_type", AsksType, sequences, "a swapped class is no nn.LSTM"),
    Case(
        "asks_weights",
        AsksWeights,
        images,
        "'Identity' object has no attribute 'weight'",
    ),
    Case("functional_call", Functional, vectors, "the given weights are not used"),
    Case("activation_checkpointing", Checkpointed, vectors, "tracing enters the checkpoint"),
    Case(
        "names_of_ones_own",
        Named,
        vectors,
        "attributes of the user's are overwritten",
        quick=True,
    ),
    Case("delegating_attributes", Delegates, vectors, "recursion in __getattr__ of a half copy"),
    Case(
        "adapters",
        lambda: nn.Sequential(Adapter(), nn.ReLU(), nn.Linear(16, 5)),
        vectors,
        "the layer inside an adapter is not found by its type",
    ),
    Case("eval_returns_none", NoMode, vectors, "'NoneType' object has no attribute 'forward'"),
    Case(
        "energy_and_forces",
        Forces,
        lambda: [torch.randn(12, 5, 3) for _ in range(4)],
        "quantized layers have no gradient by their inputs",
        saved="archive",
        noise=0.05,
        quick=True,
    ),
    Case(
        "forces_only",
        ForcesOnly,
        lambda: [torch.randn(12, 5, 3) for _ in range(4)],
        "rounding has gradient 0: the forces vanish, and nothing says so",
        saved="archive",
        noise=0.05,
    ),
    Case(
        "forces_by_the_task",
        BareForces,
        lambda: [torch.randn(12, 5, 3) for _ in range(4)],
        "outputs with a graph can't be turned into numpy arrays",
        saved="archive",
        noise=0.05,
        forward=with_gradients,
    ),
    Case(
        "forces_without_gradients",
        BareForces,
        lambda: [torch.randn(12, 5, 3) for _ in range(4)],
        "element 0 of tensors does not require grad, from deep inside",
        refused=r"run without gradients.*torch\.enable_grad",
        quick=True,
    ),
    Case(
        "keeps_a_graph",
        trained,
        vectors,
        "Only Tensors created explicitly by the user support the deepcopy protocol",
        quick=True,
    ),
    Case("vmapped_ensemble", Ensemble, vectors, "layers that are never called"),
    Case(
        "state_between_calls",
        Stateful,
        vectors,
        "a candidate is measured from the state that another one left",
        refused="different outputs|keep state",
    ),
    Case(
        "dropout_in_eval",
        AlwaysDrops,
        vectors,
        "noise of dropout is taken for noise of quantization",
        refused="different outputs",
        quick=True,
    ),
    Case("inference_mode_inside", Silenced, vectors, "inference tensors can't be observed"),
)
