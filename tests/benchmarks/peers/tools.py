"""What is compared: each tool by name, and where its function is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Found:
    """A quantized model, its average weight bits, and what it took to find it."""

    model: nn.Module
    bits: float
    seconds: float
    evaluations: int | None = None
    proposals: int | None = None
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tool:
    """One row of the table.

    ``place`` is module:function; ``sampler`` is set for searches by autoquant's own trial loop ("":
    its default). ``package`` is the distribution whose version is reported. ``least`` and ``most``
    bound the budgets that the tool can be asked for; ``unfit`` names models that it
    can't take.
    """

    name: str
    title: str
    place: str
    sampler: str | None = None
    package: str = "autoquant"
    least: float = 0.0
    most: float = 8.0
    unfit: tuple[str, ...] = ()

    @property
    def stochastic(self) -> bool:
        """Whether a seed matters."""
        return self.sampler is not None

    def takes(self, bits: float, model: str) -> bool:
        """Return whether the tool can be asked for ``bits`` of a model."""
        return self.least <= bits <= self.most and model not in self.unfit


OURS = "ours:search"
DECODES = ("g2p",)
"""Its outputs are words: no loss can be taken of them, which these tools ask for."""
BELOW_8 = 7.99
TOOLS = (
    Tool("float", "the float model", "ours:float_model"),
    Tool("naive", "naive: max, per tensor, one width (rounded up)", "ours:naive_recipe"),
    Tool("autoquant", "autoquant (its default)", OURS, ""),
    Tool("tpe", "Optuna's TPE, same space", OURS, "tpe"),
    Tool("nsga2", "Optuna's NSGA-II, same space", OURS, "nsga2"),
    Tool("gp", "Optuna's GP, same space", OURS, "gp"),
    Tool("random", "random, same space", OURS, "random"),
    Tool("greedy", "greedy by one-layer KL (as AIMET's AMP)", "ours:greedy_search", most=BELOW_8),
    Tool("measured", "knapsack of one-layer KL, one shot", "ours:measured", most=BELOW_8),
    Tool("one_shot", "knapsack of autoquant's profile, one shot", "ours:one_shot", most=BELOW_8),
    Tool(
        "every_width",
        "every mixture of widths ³",
        "ours:every_width",
        most=BELOW_8,
        unfit=("mobilenet_v2", "resnext", "minilm"),
    ),
    Tool(
        "modelopt_gradient",
        "ModelOpt AutoQuantize, gradient",
        "modelopt:gradient",
        package="nvidia-modelopt",
        unfit=DECODES,
        most=BELOW_8,
    ),
    Tool(
        "modelopt_kl",
        "ModelOpt AutoQuantize, KL",
        "modelopt:kl_div",
        package="nvidia-modelopt",
        unfit=DECODES,
        most=BELOW_8,
    ),
    Tool(
        "modelopt_int8",
        "ModelOpt INT8 default",
        "modelopt:int8",
        package="nvidia-modelopt",
        unfit=DECODES,
        least=8.0,
    ),
    Tool("nncf", "NNCF, preset MIXED ¹", "nncf:quantize", package="nncf", least=8.0, unfit=DECODES),
    Tool(
        "inc",
        "Neural Compressor autotune ²",
        "inc:autotune",
        package="neural-compressor-pt",
        least=8.0,
        unfit=DECODES,
    ),
)
BY_NAME = {tool.name: tool for tool in TOOLS}
