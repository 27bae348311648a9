"""Recipes by model name, docs/recipes.md: sizes, memory and cost counted from the models' configs, without weights.

python tests/benchmarks/recipes.py
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scale import RATES
from transformers import AutoConfig

from hf_prune import OBSConfig, PruningConfig, REAPConfig, allocate, infer_structure
from hf_prune.cli.inspection import inspect_fit
from hf_prune.config import selected_axes
from hf_prune.layers.boundaries import MEMORY_BYTES
from hf_prune.layers.price import count_price
from hf_prune.memory import count_memory, memory_of
from hf_prune.report.tables import markdown_table

if TYPE_CHECKING:
    from hf_prune.structure.axes import Structure

DOCS = Path(__file__).parents[2] / "docs"
KINDS = {"mlp": "MLP channels", "attention": "KV groups", "expert": "experts"}
CONTEXT = 8192
"""Tokens in the cache of the one sequence that is served."""


@dataclass(frozen=True)
class Recipe:
    """One model, and what is recommended for it."""

    title: str
    model: str
    """Hub id, of which the config below is."""
    published: int
    """Number of parameters that the Hub shows: what is counted here has to be the same."""
    settings: dict[str, Any]
    """Of the model's config, as published."""
    fit: str
    """A memory that the dense model at 4 bits is too large for."""
    ratios: tuple[float, ...]
    """The second one is what the command asks for."""
    config: PruningConfig
    after: tuple[str, ...]
    """Commands after pruning; `OUT` stands for the checkpoint."""
    notes: tuple[str, ...]
    flags: tuple[str, ...] = ("--calibration", "texts.txt", "--calibration", "chats.jsonl")
    measured: bool = field(default=False)


LONG = {"num_samples": 128, "seq_len": 2048}
RECOVER = "hf-prune recover OUT OUT-recovered --train texts.txt --train chats.jsonl --tokens 20M --preset lora"
RECIPES = (
    Recipe(
        "Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B",
        8_030_261_248,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        "6GB",
        (0.2, 0.3, 0.5),
        OBSConfig(0.3, targets=("gguf",), **LONG),
        (RECOVER, "hf-prune export OUT-recovered OUT.gguf --format gguf --dtype q8_0"),
        (
            "llama.cpp reads layers that differ, as its architecture `deci`. For engines that want equal layers prune "
            "with `--for plain --allocation uniform`.",
        ),
    ),
    Recipe(
        "Qwen3-8B",
        "Qwen/Qwen3-8B",
        8_190_735_360,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
        "6GB",
        (0.2, 0.3, 0.5),
        OBSConfig(0.3, targets=("gguf", "plain"), **LONG),
        (RECOVER, "hf-prune export OUT-recovered OUT.gguf --format gguf --dtype q8_0"),
        (
            "llama.cpp has no architecture for a Qwen3 with its own head whose layers differ: hence "
            "`--for gguf,plain`, all layers alike. Without `plain` the export fills up with zeros.",
        ),
    ),
    Recipe(
        "Gemma-3-4B",
        "google/gemma-3-4b-it",
        4_300_079_472,
        {
            "model_type": "gemma3",
            "text_config": {
                "vocab_size": 262208,
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 896,
                "vision_use_head": False,
            },
        },
        "4GB",
        (0.2, 0.3, 0.5),
        OBSConfig(0.3, targets=("plain",), **LONG),
        (RECOVER, "hf-prune export OUT-recovered OUT-plain --format plain"),
        (
            "Images stay: the vision tower and its projector keep their bits, and `hidden`, which both share, is not "
            "prunable. Calibration by text alone knows nothing of images; batches with images in Python "
            "([`prune`](api.md#pruning)).",
            "16 % of the parameters are the embedding (262,208 tokens). Its tokenizer is not byte-level BPE, so "
            "`--vocabulary` is refused.",
            "GGUF: by llama.cpp's own converter from the plain checkpoint; not tried.",
        ),
    ),
    Recipe(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        20_914_757_184,
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        "12GB",
        (0.125, 0.25, 0.5),
        REAPConfig(0.25, targets=("vllm",), **LONG),
        (),
        (
            "Whole experts go, equally many in each layer; four are still chosen for a token, so memory falls and time "
            "hardly does.",
            "The checkpoint is MXFP4 (about 14 GB). `--dequantise` makes bfloat16 of it layer by layer, and the pruned "
            "model is saved so: it is smaller than the original only once it is quantised again, which hf_prune "
            "does not do for experts.",
            "On a [mixture that we trained](experts.md#measured) REAP lost next to nothing at 25 %; its routers "
            "hardly used some experts, which gpt-oss need not have.",
        ),
        ("--calibration", "texts.txt", "--calibration", "chats.jsonl", "--dequantise"),
    ),
    Recipe(
        "SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        "",
        (0.2, 0.3, 0.5),
        OBSConfig(0.3),
        ("hf-prune export OUT OUT.gguf --format gguf --dtype q8_0",),
        (
            "Small models that were trained well lose at once: [results](results.md), [recovery](recovery.md#results).",
            "A vocabulary for English alone takes 4 to 8 % more ([measured](vocabulary.md#what-english-needs)).",
        ),
        ("--calibration", "texts.txt", "--calibration", "chats.jsonl", "--recover", "2M"),
        measured=True,
    ),
)


def section(recipe: Recipe) -> str:
    """What the page says about one model.

    Raises:
        ValueError: the config does not give the published number of parameters.
    """
    settings = {"tie_word_embeddings": recipe.settings["model_type"] == "gemma3", **recipe.settings}
    config = AutoConfig.for_model(**settings)
    structure = infer_structure(config, cache=True)
    if structure.num_parameters() != recipe.published:
        raise ValueError(f"{recipe.model}: {structure.num_parameters():,} parameters, published {recipe.published:,}")
    parts = [f"## {recipe.title}", _facts(structure), f"```bash\n{_commands(recipe, structure)}\n```"]
    parts += [f"Sizes, {'measured and counted' if recipe.measured else 'predicted'}:", _sizes(recipe, structure)]
    parts += [_measured()] if recipe.measured else [_cost(recipe, structure)]
    if recipe.fit:
        rows = inspect_fit(config, recipe.fit, context=CONTEXT, batch=1, bits=4)
        axes = ", ".join(recipe.config.axes)
        found = next((row for row in rows if row["axes"] == axes), {})
        if "decoder_ratio" in found:
            parts.append(
                f"To fit {recipe.fit} at 4 bits with {CONTEXT:,} tokens of cache, "
                f"{_percent(found['decoder_ratio'])} of the decoder have to go: "
                f"`--fit {recipe.fit} --set context={CONTEXT} --set bits=4` in place of the ratio."
            )
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in recipe.notes)])


def _facts(structure: Structure) -> str:
    units = {name.split(".", 2)[2]: axis.num_units for name, axis in structure.axes.items() if axis.layer == 0}
    words = [f"{units['attention']} KV groups ({units['attention.queries']} query heads)"]
    words += [f"{units['experts']} experts"] if "experts" in units else []
    words += [f"{units['mlp']:,} MLP channels{' of each expert' if 'experts' in units else ''}"]
    total, decoder = structure.num_parameters(), structure.num_parameters(budget="decoder")
    return (
        f"{total:,} parameters, {_percent(decoder / total)} of them in attention and MLP. "
        f"{len(structure.layer_paths)} layers of {', '.join(words)}."
    )


def _commands(recipe: Recipe, structure: Structure) -> str:
    out = recipe.title.lower() + "-pruned"
    config = recipe.config
    words = ["hf-prune", "prune", recipe.model, out, "--method", config.method]
    words += ["--pruning-ratio", str(config.pruning_ratio), *recipe.flags]
    words += ["--for", ",".join(config.targets)] if config.targets else []
    if not recipe.measured:
        words += ["--set", f"seq_len={config.seq_len}", "--layers-on", "disk", "--work-dir", f"{out}-work"]
    fit = f" --fit {recipe.fit} --context {CONTEXT} --bits 4" if recipe.fit else ""
    after = [line.replace("OUT", out) for line in recipe.after]
    return "\n".join(map(_wrapped, [f"hf-prune inspect {recipe.model}{fit}", shlex.join(words), *after]))


def _wrapped(command: str) -> str:
    lines = textwrap.wrap(command, 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return " \\\n".join(lines)


def _sizes(recipe: Recipe, structure: Structure) -> str:
    """Dense and pruned; which units go does not matter to sizes, so all scores are equal."""
    serving = {"context": CONTEXT, "batch": 1}
    dense = [count_memory(structure, dataclasses.replace(recipe.config, bits=bits, **serving)) for bits in (16, 4)]
    rows = [_row("dense", structure.num_parameters(), "", dense)]
    for ratio in recipe.ratios:
        config = dataclasses.replace(recipe.config, pruning_ratio=ratio, allocation="uniform", **serving)
        scores = {axis.name: torch.ones(axis.num_units) for axis in selected_axes(structure, config)}
        plan = allocate(scores, structure, config)
        found = [
            memory_of(dataclasses.replace(plan, config=dataclasses.replace(config, bits=b)), structure) for b in (16, 4)
        ]
        left = structure.num_parameters() - round(plan.achieved["decoder"] * structure.num_parameters(budget="decoder"))
        kinds = {axis.kind: plan.widths.get(axis.name, axis.num_units) for axis in selected_axes(structure, config)}
        widths = ", ".join(f"{width:,} {KINDS[kind]}" for kind, width in kinds.items())
        rows.append(_row(f"{100 * ratio:g} %", left, widths, found))
    return markdown_table(rows).rstrip()


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"


def _row(name: str, parameters: int, widths: str, found: list[Any]) -> dict[str, str]:
    return {
        "removed": name,
        "parameters": f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.4g} M",
        "last layer, if all lose alike": widths,
        "16 bits, GB": f"{found[0].weights / 1e9:.3g}",
        "4 bits, GB": f"{found[1].weights / 1e9:.3g}",
        "cache, GB": f"{found[0].cache / 1e9:.2g}",
    }


def _cost(recipe: Recipe, structure: Structure) -> str:
    """What the run reads, writes and computes, as `prune` says at its start, and how much memory it needs."""
    config = recipe.config
    hidden = structure.axes["hidden"].num_units
    tokens = [config.seq_len] * config.num_samples
    price = count_price(structure, config, tokens, hidden, 2, 8 * config.seq_len)
    layers = [0] * len(structure.layer_paths)
    for name, owner in structure.owners.items():
        layers[owner.layer] += 2 * structure.numel(name)
    outside = 2 * structure.num_parameters() - sum(layers)
    held = price.boundary_bytes if price.boundary_bytes <= MEMORY_BYTES else 0
    solving = 4 if config.repair != "none" or config.method == "obs" else 1
    memory = 2.5 * max(layers) * solving + outside + held
    hours = (price.bytes_read + price.pruned_bytes_read + price.bytes_written) / RATES["disk"] / 3600
    hours += price.operations / RATES["passes"] / 3600 + price.gram_operations / RATES["gram"] / 3600
    hours += price.solving_operations / RATES["solving"] / 3600
    left = structure.num_parameters() - config.pruning_ratio * structure.num_parameters(budget="decoder")
    return (
        f"The run, predicted: {price.text.removeprefix('this run ')}; about {60 * hours:.0f} minutes on one card "
        f"at the rates that [scale](scale.md#counted-one-24-gb-card) assumes. Memory with the layers on disk: up to "
        f"{memory / 1e9:.0f} GB (in memory: {2 * structure.num_parameters() / 1e9:.0f} GB for the weights alone). "
        f"Training all that is left takes {16 * left / 1e9:.0f} GB for float32 weights, gradients and Adam; adapters "
        f"{2 * left / 1e9:.0f} GB and what their activations need."
    )


def _measured() -> str:
    """The rows of docs/recovery_smollm2.json."""
    found = json.loads((DOCS / "recovery_smollm2.json").read_text(encoding="utf-8"))
    means: dict[str, dict[str, float]] = {}
    for name, row in found["rows"].items():
        kind, ratio = name.split(" ", 1)
        means.setdefault(ratio, {})[kind] = row["ratio"]
    rows = [
        {"removed": ratio, "repaired": f"{row['none']:.2f}", "after 2 M tokens": f"{row['distill']:.2f}"}
        for ratio, row in means.items()
        if "none" in row  # of other starts only the trained models are there
    ]
    return (
        "Measured on one H200, calibrated on 128 × 256 tokens: perplexity over that of the dense model, geometric mean "
        f"of four texts ([how](recovery.md#results)):\n\n{markdown_table(rows).rstrip()}"
    )


INTRO = f"""# Recipes

Commands for five models, derived from their configs by `tests/benchmarks/recipes.py`, which writes this page.
`texts.txt` and `chats.jsonl` stand for a mixture like what the model is to read ([calibration](calibration.md)).

**Predicted** means counted from `config.json` alone, no weights at hand. Sizes are exact for the ratio: predicted =
actual parameters is one of the [laws](laws.md), and the dense number is the one that the Hub shows. Memory and cost are
counted as [scale](scale.md) explains, sizes at 4 bits and of the cache ({CONTEXT:,} tokens of one sequence, 16 bits) as
[serving](serving.md#fit-a-card) does. What a ratio costs in **quality** is not predicted: only SmolLM2 was measured.

Recovery by adapters (`--preset lora`) fits one card; `--preset distill`, the one that was measured, trains all weights
([recovery](recovery.md))."""


def write_page() -> None:
    """Write docs/recipes.md."""
    page = "\n\n".join([INTRO, *map(section, RECIPES)])
    (DOCS / "recipes.md").write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_page()
