"""Structural pruning for Hugging Face causal language models.

Importing this package teaches transformers to load heterogeneous pruned checkpoints. It imports nothing heavy: names
are resolved when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.autoload import install_on_import

if TYPE_CHECKING:
    from hf_prune.allocation import allocate
    from hf_prune.config import LLMPrunerConfig, MagnitudeConfig, PruningConfig, RandomConfig, WandaConfig
    from hf_prune.errors import HFPruneError
    from hf_prune.evaluation.perplexity import perplexity
    from hf_prune.modeling import PrunedModelForCausalLM
    from hf_prune.pipeline import PruningResult, prune
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.inference import infer_structure
    from hf_prune.structure.structure import Structure
    from hf_prune.surgery.pruning import apply_plan

__version__ = "0.1.0"

_WHERE = {
    "HFPruneError": "hf_prune.errors",
    "LLMPrunerConfig": "hf_prune.config",
    "MagnitudeConfig": "hf_prune.config",
    "PrunedModelForCausalLM": "hf_prune.modeling",
    "PruningConfig": "hf_prune.config",
    "PruningPlan": "hf_prune.plan",
    "PruningResult": "hf_prune.pipeline",
    "RandomConfig": "hf_prune.config",
    "Structure": "hf_prune.structure.structure",
    "WandaConfig": "hf_prune.config",
    "allocate": "hf_prune.allocation",
    "apply_plan": "hf_prune.surgery.pruning",
    "infer_structure": "hf_prune.structure.inference",
    "perplexity": "hf_prune.evaluation.perplexity",
    "prune": "hf_prune.pipeline",
}

__all__ = [
    "HFPruneError",
    "LLMPrunerConfig",
    "MagnitudeConfig",
    "PrunedModelForCausalLM",
    "PruningConfig",
    "PruningPlan",
    "PruningResult",
    "RandomConfig",
    "Structure",
    "WandaConfig",
    "allocate",
    "apply_plan",
    "infer_structure",
    "perplexity",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_prune' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


install_on_import()
