"""What is compared: each tool by name, and where its function is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One tool. ``place`` is module:function, ``package`` the distribution that is reported.

    ``swept`` says that its learning rate is looked for. One that isn't has ``options`` instead:
    where its rates are from; "" for one that trains nothing.
    """

    name: str
    title: str
    place: str
    package: str = "autoquant"
    swept: bool = False
    options: str = ""

    @property
    def trains(self) -> bool:
        """Whether it takes steps at all, and a seed matters."""
        return self.swept or bool(self.options)


DEFAULT, OF_CASE = "default", "case"
TOOLS = (
    Tool("fitted", "autoquant, fitted only", "ours:made"),
    Tool("default", "autoquant, its default rates", "ours:made", options=DEFAULT),
    Tool("case", "autoquant, the case's rates", "ours:made", options=OF_CASE),
    Tool("modelopt", "ModelOpt", "modelopt:prepare", "nvidia-modelopt", swept=True),
    Tool("brevitas", "Brevitas", "brevitas:prepare", "brevitas", swept=True),
    Tool("torchao_learned", "torchao pt2e, ranges learned", "torchao:learned", "torchao", True),
    Tool("torchao_modules", "torchao QATConfig", "torchao:modules", "torchao", swept=True),
    Tool("torchao", "torchao pt2e, ranges observed", "torchao:moving", "torchao", swept=True),
)
BY_NAME = {tool.name: tool for tool in TOOLS}
MEASURE = "case"
"""The tool whose time all others are given too."""
