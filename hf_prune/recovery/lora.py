"""LoRA recovery through peft: which modules get adapters, the paper's recipe, and merging at the end."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError, StructureError
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from hf_prune.structure.axes import Structure

PRESETS: dict[str, dict[str, Any]] = {"llm_pruner": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"}}
"""Name → settings of `peft.LoraConfig`: LLM-Pruner (arXiv 2305.11627, section 4.1 and its released recovery script)."""


def lora_config(model: PreTrainedModel, preset: Literal["llm_pruner"] = "llm_pruner", **overrides: Any) -> LoraConfig:
    """A `peft.LoraConfig` that puts adapters on every linear module of attention and MLP, whatever it is called.

    The modules are found from the model's structure: q, k, v, o, gate, up and down in a Llama; fused projections and
    `Conv1D` elsewhere. Stacked matrices of experts get adapters too, one for each expert (`target_parameters`):
    these know no dropout, so that there is none then.

    Args:
        model: dense or pruned causal LM, without adapters.
        preset: `llm_pruner`: rank 8, alpha 16, dropout 0.05, no biases.
        **overrides: settings of `LoraConfig` in place of the preset's.

    Raises:
        ConfigError: an unknown preset, or a setting that peft refuses.
        StructureError: the model has no linear module on an attention or MLP axis.
    """
    from peft import LoraConfig, TaskType

    if preset not in PRESETS:
        raise ConfigError(f"preset: found {preset!r}, expected one of {tuple(PRESETS)}.")
    structure = infer_structure(model)
    paths = linear_members(model, structure)
    modules = {path: model.get_submodule(path) for path in paths}
    settings: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "target_modules": _short_names(model, paths),
        "fan_in_fan_out": all(isinstance(module, Conv1D) for module in modules.values()),
        **PRESETS[preset],
    }
    if experts := _stacked(structure):
        settings |= {"target_parameters": experts, "lora_dropout": 0.0}
    settings |= overrides
    if settings.get("target_parameters") and settings["lora_dropout"]:
        raise ConfigError(
            f"lora_dropout: found {settings['lora_dropout']}, expected 0: peft has no dropout for matrices of experts. "
            "Leave it at 0, or experts without adapters (target_parameters=None)."
        )
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft refuses this LoRA configuration: {error}. Check {sorted(overrides)}.") from error


def linear_members(model: nn.Module, structure: Structure) -> list[str]:
    """Paths of the linear modules of attention and MLP, in the model's order: those whose weight carries such an axis.

    With one KV head, keys and values carry none; so everything linear inside of an attention counts too. In an MLP it
    does not: routers choose experts, and stay as they are.

    Raises:
        StructureError: there is none.
    """
    weights = {
        member.parameter
        for axis in structure.axes.values()
        if axis.kind in ("attention", "mlp")
        for member in structure.members[axis.name]
    }
    weights |= {name for name, owner in structure.owners.items() if owner.branch == "attention"}
    found = [
        path
        for path, module in model.named_modules()
        if f"{path}.weight" in weights and isinstance(module, (nn.Linear, Conv1D))
    ]
    if not found:
        raise StructureError(
            f"this {structure.model_type} model has no linear module on an attention or MLP axis: LoRA has nothing "
            "to adapt. Train all weights instead (preset 'full')."
        )
    return found


def _stacked(structure: Structure) -> list[str]:
    """Last two words of the names of stacked expert weights `[experts, ...]` on an MLP axis."""
    members = [member for axis in structure.axes_of("mlp") for member in structure.members[axis.name]]
    names = [member.parameter for member in members if len(structure.layouts[member.parameter]) == 3]
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def add_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """Put adapters into `model` and freeze everything else. Modifies `model` in place.

    The adapters' first values come from `seed`; the global generator is left as it was.
    """
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, copy.deepcopy(config))


def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights they adapt; afterwards the model is an ordinary one, with its plan.

    Raises:
        ConfigError: a merged weight is not finite.
    """
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(f"the adapters cannot be merged: {error} Go back to an earlier checkpoint.") from error
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(merged).pop(name, None)
    return merged


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names where they mean just these modules (peft matches suffixes), whole paths otherwise."""
    leaves = {path.rpartition(".")[2] for path in paths}
    meant = [path for path, module in model.named_modules() if path.rpartition(".")[2] in leaves]
    return sorted(leaves) if set(meant) == set(paths) else paths
