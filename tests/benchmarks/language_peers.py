"""Other tools on a language model: ``python -m tests.benchmarks.language_peers TOOL …``.

SmolLM2-135M with weights of 4 and of 3 bits in groups of 64 (128 do not divide its 576 inputs),
with zero points, and activations of 8 bits with a scale for each token, as GPTQ and AWQ of
llm-compressor and as AutoRound make it: each by its own defaults otherwise, from the calibration
data of ``tests/zoo/smollm2.py``, for which the weights go into transformers' own Llama. The
embedding that is the head, too, stays in float there; ``techniques`` gives it 8 bits. Perplexity is
of the confirm split. Each tool wants its own environment: ``pip install llmcompressor`` or
``auto-round``, beside this package. Rows go into ``reports/language_peers.md``, where those of
other tools stay.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from autoquant.models.data import make_splits
from autoquant.models.task import load_task
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import machines
from tests.zoo import smollm2

REPORT = Path(__file__).resolve().parents[2] / "reports" / "language_peers.md"
HEAD = ["tool", "weight bits", "perplexity", "more than float", "seconds"]
GROUP = 64
BITS = (4, 3)


def llama() -> nn.Module:
    """Return the model as transformers has it: it turns the halves of a head, not neighbours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = smollm2.load_model(smollm2.weights())
    config = LlamaConfig(
        vocab_size=smollm2.VOCABULARY,
        hidden_size=smollm2.SIZE,
        intermediate_size=smollm2.HIDDEN,
        num_hidden_layers=smollm2.BLOCKS,
        num_attention_heads=smollm2.HEADS,
        num_key_value_heads=smollm2.KEYS,
        rms_norm_eps=smollm2.EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": smollm2.BASE},
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": own.token_embd.weight}
    state |= {"model.norm.weight": own.output_norm.weight, "lm_head.weight": own.head.weight}
    for i, block in enumerate(own.blk):
        at = f"model.layers.{i}"
        state |= {
            f"{at}.input_layernorm.weight": block.attn_norm.weight,
            f"{at}.post_attention_layernorm.weight": block.ffn_norm.weight,
            f"{at}.self_attn.q_proj.weight": _halves(block.attn.q.weight),
            f"{at}.self_attn.k_proj.weight": _halves(block.attn.k.weight),
            f"{at}.self_attn.v_proj.weight": block.attn.v.weight,
            f"{at}.self_attn.o_proj.weight": block.attn.output.weight,
            f"{at}.mlp.gate_proj.weight": block.gate.weight,
            f"{at}.mlp.up_proj.weight": block.up.weight,
            f"{at}.mlp.down_proj.weight": block.down.weight,
        }
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of each head with the even ones first."""
    heads = weight.unflatten(0, (-1, smollm2.HEAD // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def perplexity(model: nn.Module) -> float:
    """Return the perplexity on the confirm split."""
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, targets in make_splits(load_task(Path(smollm2.__file__))).confirm:
            scores = model(input_ids=tokens).logits.double().flatten(0, 1)
            total += float(nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum"))
            count += targets.numel()
    return float(torch.tensor(total / count).exp())


def tokenizer() -> Any:
    """Return the tokenizer as transformers has it: these tools ask for one, and read tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer())


def compressed(bits: int, modifier: str) -> nn.Module:
    """Return the model by a modifier of llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import quantization
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=GROUP)
    inputs = QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    tokens = torch.cat(smollm2.calibration_data())
    data = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    nearest = modifier != "gptq"  # what AWQ scales is rounded so
    kind = quantization.QuantizationModifier if nearest else quantization.GPTQModifier
    recipe = [kind(config_groups={"all": scheme}, ignore=["lm_head"])]
    if not torch.accelerator.is_available():  # which AWQ pins memory for
        IntermediatesCache.pin_memory = lambda *_: None
    if modifier == "awq":
        recipe = [AWQModifier(), *recipe]
    with tempfile.TemporaryDirectory() as folder:  # the tool wants a model that was read
        llama().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        oneshot(
            model=model,
            processor=tokenizer(),
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )
    return model


def auto_round(bits: int) -> nn.Module:
    """Return the model by AutoRound."""
    from auto_round import AutoRound

    tokens = torch.cat(smollm2.calibration_data())
    data = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens
    ]
    rounder: Any = AutoRound(
        llama(),
        tokenizer(),
        bits=bits,
        group_size=GROUP,
        sym=False,
        act_bits=8,
        act_group_size=-1,
        act_sym=False,
        act_dynamic=True,
        dataset=data,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
    )
    found = rounder.quantize()
    return found[0] if isinstance(found, tuple) else found


Make = Callable[[int], nn.Module]
TOOLS: dict[str, tuple[str, str, Make]] = {
    "nearest": (
        "round to nearest",
        "llmcompressor",
        lambda b: compressed(b, "nearest"),
    ),
    "gptq": ("GPTQ", "llmcompressor", lambda bits: compressed(bits, "gptq")),
    "awq": ("AWQ", "llmcompressor", lambda bits: compressed(bits, "awq")),
    "auto_round": ("AutoRound", "auto-round", auto_round),
}


def written() -> dict[tuple[str, str], str]:
    """Return the rows of the report by tool and bits."""
    if not REPORT.exists():
        return {}
    rows = [r for r in REPORT.read_text(encoding="utf-8").splitlines() if r.startswith("| ")]
    return {(r.split("|")[1].strip(), r.split("|")[2].strip()): r for r in rows[2:]}


def write(said: str, bits: int, row: str, base: float) -> None:
    """Write the report with a new ``row``: what a tool, as it is ``said``, makes of the model."""
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    known = [f"{tool}, {wide} bits" for tool, wide in written()]
    rows = written() | {(said, str(bits)): row}
    text = [
        "# Other tools on a language model",
        "",
        "By `python -m tests.benchmarks.language_peers TOOL`. SmolLM2-135M, news; groups of 64",
        "with zero points, activations of 8 bits with a scale for each token, embedding and head",
        f"in float; perplexity of the confirm split, in float {base:.2f}. What this tool makes of",
        "the same, its embedding and head with 8 bits, `python -m tests.benchmarks.techniques",
        "smollm2` measures. Other work shared the cores: seconds say little.",
        "",
        machines(before, [f"{said}, {bits} bits"], known),
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *rows.values(),
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*TOOLS]))
def main(names: tuple[str, ...]) -> None:
    """Measure the tools NAMES; each row is written as it comes."""
    base = perplexity(llama())
    for name in names:
        title, package, make = TOOLS[name]
        for bits in BITS:
            began = time.monotonic()
            model = make(bits)
            seconds = time.monotonic() - began
            found = perplexity(model)
            said = f"{title} ({package} {importlib.metadata.version(package)})"
            more = f"{found / base - 1:+.1%}"
            row = line([said, str(bits), f"{found:.2f}", more, f"{seconds:.0f}"])
            print(row, flush=True)
            write(said, bits, row, base)


if __name__ == "__main__":
    main()
