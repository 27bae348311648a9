"""Build models without memory, and copies of configs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_prune.errors import StructureError

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def decoder_config(config: Any) -> Any:
    """The config of the decoder: `config` itself, or the part for the text of a model that reads images."""
    place = _decoder_place(config)
    return config if place is None else getattr(config, place)


def decoder_values(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What `values`, of `config.to_dict()`, say of the decoder: all of them, or a dictionary among them."""
    place = _decoder_place(config)
    return values if place is None else values[place]


def _decoder_place(config: Any) -> str | None:
    text = config.get_text_config(decoder=True)
    return next((name for name, value in vars(config).items() if value is text), None)


def needs_plugin(config: Any) -> bool:
    """Whether stock transformers cannot build this model: its widths differ per layer, or it needs surgery."""
    from hf_prune.format.per_layer import surgery_of

    decoder = decoder_config(config)
    surgery = (surgery_of(config), surgery_of(decoder))
    return any(surgery) or bool(decoder.to_dict().get("per_layer_config"))


def auto_class(config: Any) -> Any:
    """The auto class that loads the model of `config`: of causal LMs, or of models that read images and text.

    Where transformers has both for a config, `architectures` decides.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = (AutoModelForCausalLM, AutoModelForImageTextToText)
    classes = {auto: auto._model_mapping.get(type(config), None) for auto in known}
    for auto in known:
        if getattr(classes[auto], "__name__", None) in (config.architectures or ()):
            return auto
    own_code = getattr(config, "auto_map", None) or {}
    return next((auto for auto in known if auto.__name__ in own_code or classes[auto] is not None), known[0])


def has_own_code(cls: type) -> bool:
    """Whether the code of a class came with a checkpoint: whoever loaded it trusted it."""
    return cls.__module__.startswith("transformers_modules.")


@contextmanager
def unsharded() -> Iterator[None]:
    """Make whole models inside, also under DeepSpeed ZeRO-3.

    There transformers splits every model that it makes, whatever `zero3_init_flag` says; the pieces have no shapes, and
    no engine that would put them together.
    """
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def build_empty(config: Any, cls: type | None = None) -> PreTrainedModel:
    """Build the model of `config` on the meta device; heterogeneous configs build heterogeneous layers.

    Args:
        config: the config; not shared with the model.
        cls: the model class; by default the one that `auto_class` chooses.

    Raises:
        StructureError: the class refuses the config.
    """
    import torch

    from hf_prune.format import per_layer

    per_layer.install()
    try:
        with torch.device("meta"), unsharded():
            if cls is not None:
                model = cls(config)
            else:  # whether its code may run is never asked of the one who sits there
                model = auto_class(config).from_config(config, trust_remote_code=has_own_code(type(config)))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise StructureError(
            f"{config.model_type}: the model cannot be built from its config: {type(error).__name__}: {reason}"
        ) from error
    return model.eval()  # type: ignore[no-any-return]
