"""What is asked of a pruning run: `PruningConfig`, and one subclass per method."""

from __future__ import annotations

from hf_prune.config.base import Allocation, AxisKind, Budget, PruningConfig
from hf_prune.config.methods import LLMPrunerConfig, MagnitudeConfig, OBSConfig, RandomConfig, REAPConfig, WandaConfig
from hf_prune.config.policy_gradient import PolicyGradientConfig
from hf_prune.config.prunenet import PruneNetConfig
from hf_prune.config.selection import LAYER_AXES, axes_of_kind, is_protected, removable, selected_axes
from hf_prune.config.targets import multiple_for

CONFIGS: dict[str, type[PruningConfig]] = {
    "custom": PruningConfig,
    "random": RandomConfig,
    "magnitude": MagnitudeConfig,
    "wanda": WandaConfig,
    "llm_pruner": LLMPrunerConfig,
    "obs": OBSConfig,
    "reap": REAPConfig,
    "policy_gradient": PolicyGradientConfig,
    "prunenet": PruneNetConfig,
}
"""Method → its configuration class."""

__all__ = [
    "CONFIGS",
    "LAYER_AXES",
    "Allocation",
    "AxisKind",
    "Budget",
    "LLMPrunerConfig",
    "MagnitudeConfig",
    "OBSConfig",
    "PolicyGradientConfig",
    "PruneNetConfig",
    "PruningConfig",
    "REAPConfig",
    "RandomConfig",
    "WandaConfig",
    "axes_of_kind",
    "is_protected",
    "multiple_for",
    "removable",
    "selected_axes",
]
