"""Blockwise: the blocks of a model are trained one after another, each to give its float output.

Blocks are taken in the order in which they run. X̂ is what a block sees with all before it quantized
and trained, Z what it gives in the float model, for the same samples. First the layers of the block
are fitted to X̂ anew, then all of them are trained together, so that the block gives Z on X̂: its
layers make up for each other, which fitting one at a time can't. Only one block runs at a time, so
many steps are little work, and what a block learns it learns from a loss that is near.
Sources: Li et al. 2021 (BRECQ, arXiv 2102.05426) for blocks; Wei et al. 2022 (QDrop, arXiv
2203.05740) for ``drop``; for the rest ``methods.training``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autoquant.methods.training import Training
from autoquant.spec.techniques import RECONSTRUCTIONS, option


@RECONSTRUCTIONS.register("blockwise")
@dataclass(frozen=True)
class Blockwise(Training):
    """Train one block after another, by options that all training has (``Training``), and these.

    - ``steps`` are those of each block, and ``batch`` are the samples of one in which inputs and
      outputs are as many numbers as in the median block: of larger ones it has fewer, at least 1.
    - ``most`` is how many quantized layers a block has at most.
    - ``drop`` is the share of numbers of a block's input that are as in the float model, drawn for
      each step.
    """

    method: ClassVar[str] = "blockwise"
    steps: int = option(200, 1, 10**7)
    weight_rate: float = option(3e-3, 0.0, 1.0)
    scale_rate: float = option(1e-3, 0.0, 1.0)
    bias_rate: float = option(1e-3, 0.0, 1.0)
    activation_rate: float = option(1e-3, 0.0, 1.0)
    most: int = option(8, 1, 10**6)
    drop: float = option(0.0, 0.0, 1.0)
