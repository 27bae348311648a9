"""Make sure that a pruned checkpoint cannot load wrongly where its loader is missing.

transformers alone ignores `skip`, `surgery` and per-layer widths when it builds a model. It then either stops (it reads
a width that differs between layers, or a tensor has another shape) or, where whole branches are missing, fills them
with random numbers and only logs it. `make_loud` finds out which by building the model without memory, as transformers
alone would.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig

FLAG = "allow_global_per_layer_attribute_access"

# Attributes that only the removed branch reads: any value will do there, so one unlike the model's serves as sentinel.
_SENTINELS: dict[str, tuple[tuple[str, int], ...]] = {
    "attention": (("num_key_value_heads", 1),),
    "mlp": (("intermediate_size", 8), ("n_inner", 8), ("ffn_dim", 8), ("ffn_hidden_size", 8)),
}

Shapes = dict[str, tuple[int, ...]]


def make_loud(values: Mapping[str, Any], cls: type | None = None) -> dict[str, Any]:
    """Add what a pruned config needs to parse in stock transformers, and not to load wrongly there.

    - `allow_global_per_layer_attribute_access`, if the config class or the model reads the model-wide value of an
      attribute that differs between layers;
    - otherwise, if stock transformers would build the model without complaint (layers only skip branches, or are built
      as at another depth), a harmless per-layer override in such layers, which it refuses.

    Args:
        values: config.json of the pruned model, with `model_type` (and `per_layer_config`, `pruning_config`).
        cls: model class, by default the one `AutoModelForCausalLM` chooses.

    Returns:
        A copy of `values` with these additions, and without the flag where it is not needed.

    Raises:
        CheckpointError: the config or the model cannot be built, or there is no sentinel for this family.
    """
    from hf_prune.checkpoint import per_layer

    per_layer.install()
    result = copy.deepcopy(dict(values))
    result.pop(FLAG, None)
    shapes = _shapes_or_none(result, cls)
    if shapes is None:
        result[FLAG] = True
        shapes = _shapes_or_none(result, cls)
    if shapes is None:
        raise CheckpointError(f"{values['model_type']}: {FLAG} does not suffice to build the pruned model.")
    if _is_loud(result, cls, shapes):
        return result
    for candidate in _with_sentinels(result):
        with suppress(CheckpointError):  # a value that the family does not take
            if _shapes_or_none(candidate, cls) == shapes and _is_loud(candidate, cls, shapes):
                return candidate
    raise CheckpointError(
        f"{values['model_type']}: without hf_prune this checkpoint would load with random weights in the skipped "
        "branches, or with constants of another depth, and the config has no attribute to prevent that. Prune widths "
        "instead of whole branches, or other layers."
    )


def _build(values: Mapping[str, Any], cls: type | None, stock: bool = False) -> Shapes:
    """Shapes of the state dict of the model, built on the meta device; as transformers alone would if `stock`."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: PreTrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(dict(values)))
    model_class = cls or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if stock:
        # Reading a per-layer attribute still raises, but our wrappers take the config for an ordinary one.
        config.__class__ = type(type(config).__name__, (type(config),), {"is_heterogeneous": False})
        config.pruning_config = None
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shapes_or_none(values: Mapping[str, Any], cls: type | None) -> Shapes | None:
    """Shapes of the pruned model; `None` if something read an attribute that differs between layers."""
    from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

    try:
        return _build(values, cls)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # validators of config classes raise it from within
            if isinstance(cause, AmbiguousGlobalPerLayerAttributeError):
                return None
            cause = cause.__cause__
        raise CheckpointError(
            f"{values['model_type']}: the pruned model cannot be built from its config: {error}"
        ) from error


def _is_loud(values: Mapping[str, Any], cls: type | None, shapes: Shapes) -> bool:
    """Whether stock transformers refuses the checkpoint: it cannot build the model, or finds other shapes."""
    try:
        stock = _build(values, cls, stock=True)
    except Exception:
        return True
    if stock == shapes and not (values.get("pruning_config") or {}).get("surgery"):
        return True  # an ordinary model: nothing to lose
    return any(stock.get(name, shape) != shape for name, shape in shapes.items())


def _with_sentinels(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    overrides = values.get("per_layer_config") or {}
    places = [
        (_SENTINELS[branch], [key for key, override in overrides.items() if branch in override.get("skip", ())])
        for branch in ("mlp", "attention")
    ]
    if "layers" in ((values.get("pruning_config") or {}).get("surgery") or {}):
        places.append(((), [next(iter(overrides), "0")]))
    for sentinels, keys in places:
        for name, value in (*sentinels, *_almost_equal(values)) if keys else ():
            candidate = copy.deepcopy(dict(values))
            for key in keys:
                candidate.setdefault("per_layer_config", {}).setdefault(key, {})[name] = value
            yield candidate


def _almost_equal(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Dropout probabilities and the like, changed too little to matter."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name, value in CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(dict(values))).to_dict().items():
        if isinstance(value, float) and "drop" in name:
            yield name, value + 1e-9
