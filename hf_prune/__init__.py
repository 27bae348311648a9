"""Structural pruning for Hugging Face causal language models.

Importing this package teaches transformers to load heterogeneous pruned checkpoints. It imports nothing heavy: names
are resolved when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.autoload import install_on_import

if TYPE_CHECKING:
    from hf_prune.allocation import allocate as allocate
    from hf_prune.allocation import hill_exponents as hill_exponents
    from hf_prune.config import LLMPrunerConfig as LLMPrunerConfig
    from hf_prune.config import MagnitudeConfig as MagnitudeConfig
    from hf_prune.config import OBSConfig as OBSConfig
    from hf_prune.config import PolicyGradientConfig as PolicyGradientConfig
    from hf_prune.config import PruneNetConfig as PruneNetConfig
    from hf_prune.config import PruningConfig as PruningConfig
    from hf_prune.config import RandomConfig as RandomConfig
    from hf_prune.config import REAPConfig as REAPConfig
    from hf_prune.config import WandaConfig as WandaConfig
    from hf_prune.errors import HFPruneError as HFPruneError
    from hf_prune.evaluation.latency import measure_latency as measure_latency
    from hf_prune.evaluation.perplexity import perplexity as perplexity
    from hf_prune.exporting import Exported as Exported
    from hf_prune.exporting import export as export
    from hf_prune.latency import LatencyTable as LatencyTable
    from hf_prune.modeling import PrunedModelForCausalLM as PrunedModelForCausalLM
    from hf_prune.pipeline import PruningResult as PruningResult
    from hf_prune.pipeline import prune as prune
    from hf_prune.plan import PruningPlan as PruningPlan
    from hf_prune.recovery.callback import PruningCallback as PruningCallback
    from hf_prune.recovery.distillation import DistillationTrainer as DistillationTrainer
    from hf_prune.recovery.divergence import DivergenceGuard as DivergenceGuard
    from hf_prune.recovery.lora import lora_config as lora_config
    from hf_prune.recovery.lora import merge_adapters as merge_adapters
    from hf_prune.recovery.recover import recover as recover
    from hf_prune.recovery.resuming import align_to_checkpoint as align_to_checkpoint
    from hf_prune.recovery.resuming import last_checkpoint as last_checkpoint
    from hf_prune.structure.axes import Structure as Structure
    from hf_prune.structure.inference import infer_structure as infer_structure
    from hf_prune.surgery.in_place import apply_plan_ as apply_plan_
    from hf_prune.surgery.pruning import apply_plan as apply_plan
    from hf_prune.vocabulary import kept_tokens as kept_tokens
    from hf_prune.vocabulary import prune_tokenizer as prune_tokenizer

__version__ = "0.1.0"

_WHERE = {
    "DistillationTrainer": "hf_prune.recovery.distillation",
    "DivergenceGuard": "hf_prune.recovery.divergence",
    "Exported": "hf_prune.exporting",
    "HFPruneError": "hf_prune.errors",
    "LLMPrunerConfig": "hf_prune.config",
    "LatencyTable": "hf_prune.latency",
    "MagnitudeConfig": "hf_prune.config",
    "OBSConfig": "hf_prune.config",
    "PolicyGradientConfig": "hf_prune.config",
    "PruneNetConfig": "hf_prune.config",
    "PrunedModelForCausalLM": "hf_prune.modeling",
    "PruningCallback": "hf_prune.recovery.callback",
    "PruningConfig": "hf_prune.config",
    "PruningPlan": "hf_prune.plan",
    "PruningResult": "hf_prune.pipeline",
    "REAPConfig": "hf_prune.config",
    "RandomConfig": "hf_prune.config",
    "Structure": "hf_prune.structure.axes",
    "WandaConfig": "hf_prune.config",
    "align_to_checkpoint": "hf_prune.recovery.resuming",
    "allocate": "hf_prune.allocation",
    "apply_plan": "hf_prune.surgery.pruning",
    "apply_plan_": "hf_prune.surgery.in_place",
    "export": "hf_prune.exporting",
    "hill_exponents": "hf_prune.allocation",
    "infer_structure": "hf_prune.structure.inference",
    "kept_tokens": "hf_prune.vocabulary",
    "last_checkpoint": "hf_prune.recovery.resuming",
    "lora_config": "hf_prune.recovery.lora",
    "measure_latency": "hf_prune.evaluation.latency",
    "merge_adapters": "hf_prune.recovery.lora",
    "perplexity": "hf_prune.evaluation.perplexity",
    "prune": "hf_prune.pipeline",
    "prune_tokenizer": "hf_prune.vocabulary",
    "recover": "hf_prune.recovery.recover",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_prune' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


install_on_import()
