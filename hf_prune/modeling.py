"""`PrunedModelForCausalLM`: the facade that users touch. What it returns are transformers' own classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.hub import push_to_hub
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.checkpoint.verifying import OF_CONFIG, load_verified
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
            **kwargs: arguments of `from_pretrained`, such as `trust_remote_code` and `quantization_config`.

        Raises:
            CheckpointError: the checkpoint is damaged, or a tensor is missing.
            HFPruneError: what `hf_prune.prune` refuses.
        """
        source = str(pretrained_model_name_or_path)
        if pruning_config is None:
            if calibration is not None:
                raise ConfigError("calibration was given without a pruning_config; pass one, or leave out calibration.")
            return load_verified(source, **kwargs)  # type: ignore[return-value]
        from hf_prune.calibration import asks_model, is_text
        from hf_prune.format.building import build_empty
        from hf_prune.gate import check_config, check_windows
        from hf_prune.loading import load_config, load_tokenizer
        from hf_prune.pipeline import calibration_data

        where = {name: kwargs[name] for name in OF_CONFIG if name in kwargs}
        config = kwargs.get("config") or load_config(source, **where)
        check_config(config, kwargs.get("quantization_config"))
        text = is_text(calibration)
        if text or calibration is None:
            tokenizer = tokenizer or load_tokenizer(source, required=text, **where)
        if not (text and asks_model(calibration)):  # type: ignore[arg-type]  # the model's own answers are not known yet
            batches = calibration_data(pruning_config, tokenizer, calibration, batch_size=8)
            check_windows(build_empty(config), batches or ())
        model: Any = load_verified(source, **kwargs)
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
