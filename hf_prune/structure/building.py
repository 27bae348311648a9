"""Build models without memory, and copies of configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.errors import StructureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fresh_config(config: Any) -> Any:
    """An independent copy of `config`, never shared with a model (one used for a model cannot build a second one).

    Raises:
        StructureError: the config class refuses the values.
    """
    try:
        duplicate = type(config).from_dict(config.to_dict())
    except Exception as error:
        raise StructureError(
            f"{config.model_type}: its config class refuses this config: {type(error).__name__}: {error}"
        ) from error
    for name in ("_name_or_path",):
        setattr(duplicate, name, getattr(config, name, ""))
    return duplicate


def build_empty(config: Any, cls: type | None = None) -> PreTrainedModel:
    """Build the causal LM of `config` on the meta device; heterogeneous configs build heterogeneous layers.

    Args:
        config: the config; not shared with the model.
        cls: the model class; by default the one that `AutoModelForCausalLM` chooses.

    Raises:
        StructureError: the class refuses the config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hf_prune.checkpoint import per_layer

    per_layer.install()
    try:
        with torch.device("meta"):
            model = cls(config) if cls is not None else AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise StructureError(
            f"{config.model_type}: the model cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    return model.eval()  # type: ignore[no-any-return]
