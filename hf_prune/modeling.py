"""`PrunedModelForCausalLM`: the facade that users touch. What it returns are transformers' own classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.hub import push_to_hub
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.checkpoint.verifying import load_verified
from hf_prune.errors import ConfigError
from hf_prune.pipeline import prune

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.config import PruningConfig
    from hf_prune.pipeline import Calibration


class _Pruned(type):
    """Makes `isinstance(model, PrunedModelForCausalLM)` answer for any pruned model, whatever its class."""

    def __instancecheck__(cls, instance: Any) -> bool:
        config = getattr(instance, "config", None)
        return getattr(config, "pruning_config", None) is not None


class PrunedModelForCausalLM(metaclass=_Pruned):
    """Prune, load, save and share pruned causal LMs. Never instantiated: models keep their own class.

    Example:
        >>> from hf_prune import MagnitudeConfig, PrunedModelForCausalLM
        >>> model = PrunedModelForCausalLM.from_pretrained("dense-id", pruning_config=MagnitudeConfig(0.3))
        >>> PrunedModelForCausalLM.save_pretrained(model, "pruned")
        >>> model = AutoModelForCausalLM.from_pretrained("pruned")  # after `import hf_prune`
    """

    def __new__(cls) -> PrunedModelForCausalLM:
        """Refuse: there are no instances of this class."""
        raise TypeError("PrunedModelForCausalLM is not instantiated; use from_pretrained() or prune().")

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        pruning_config: PruningConfig | None = None,
        calibration: Calibration | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a pruned model, or load a dense one and prune it (as `quantization_config` quantises while loading).

        Args:
            pretrained_model_name_or_path: directory or Hub id.
            pruning_config: prune the loaded model by this; without it the checkpoint is loaded as it is.
            calibration: see `hf_prune.prune`.
            tokenizer: for calibration text; by default the checkpoint's own.
            **kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: the checkpoint is damaged, or a tensor is missing.
            HFPruneError: what `hf_prune.prune` refuses.
        """
        from transformers import AutoTokenizer

        source = str(pretrained_model_name_or_path)
        if pruning_config is None and calibration is not None:
            raise ConfigError("calibration was given without a pruning_config; pass one, or leave out calibration.")
        model: Any = load_verified(source, **kwargs)
        if pruning_config is None:
            return model  # type: ignore[no-any-return]
        if tokenizer is None and isinstance(calibration, str):
            shared = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
            tokenizer = AutoTokenizer.from_pretrained(source, **{k: kwargs[k] for k in shared if k in kwargs})
        return PrunedModelForCausalLM.prune(model, pruning_config, tokenizer=tokenizer, calibration=calibration)

    @staticmethod
    def prune(
        model: PreTrainedModel,
        pruning_config: PruningConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        calibration: Calibration | None = None,
    ) -> PreTrainedModel:
        """A pruned copy of a model in memory; `hf_prune.prune` also returns the plan and the scores."""
        return prune(model, pruning_config, tokenizer=tokenizer, calibration=calibration).model

    save_pretrained = staticmethod(save_pruned)
    push_to_hub = staticmethod(push_to_hub)
