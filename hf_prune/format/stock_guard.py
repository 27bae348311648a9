"""Make sure that a pruned checkpoint cannot load wrongly where its loader is missing.

transformers alone ignores `skip`, `surgery` and per-layer widths when it builds a model. It then either stops (it reads
a width that differs between layers, or a tensor has another shape) or, where whole branches are missing, fills them
with random numbers and only logs it. `make_stock_refuse` finds out which by building the model without memory, as
transformers alone would.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError
from hf_prune.format.building import auto_class, decoder_config
from hf_prune.format.per_layer import parts_of_ours

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


def make_stock_refuse(values: Mapping[str, Any], kind: type | None = None, cls: type | None = None) -> dict[str, Any]:
    """Add what a pruned config needs to parse in stock transformers, and not to load wrongly there.

    - `allow_global_per_layer_attribute_access`, if the config class or the model reads the model-wide value of an
      attribute that differs between layers;
    - otherwise, if stock transformers would build the model without complaint (layers only skip branches, or are built
      as at another depth), a harmless per-layer override in such layers, which it refuses.

    Args:
        values: config.json of the pruned model, with `model_type` (and `per_layer_config`, `pruning_config`).
        kind: config class, by default the one that transformers has for `model_type`.
        cls: model class, by default the one that `auto_class` chooses.

    Returns:
        A copy of `values` with these additions, and without the flag where it is not needed.

    Raises:
        CheckpointError: the config or the model cannot be built, or there is no sentinel for this family.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from hf_prune.format import per_layer

    per_layer.install()
    kind = kind or CONFIG_MAPPING[values["model_type"]]
    result = copy.deepcopy(dict(values))
    _decoder(result).pop(FLAG, None)
    shapes = _shapes_or_none(result, kind, cls)
    if shapes is None:
        _decoder(result)[FLAG] = True
        shapes = _shapes_or_none(result, kind, cls)
    if shapes is None:
        raise CheckpointError(f"{values['model_type']}: {FLAG} does not suffice to build the pruned model.")
    if _is_refused(result, kind, cls, shapes):
        return result
    for candidate in _with_sentinels(result, kind):
        with suppress(CheckpointError):  # a value that the family does not take
            if _shapes_or_none(candidate, kind, cls) == shapes and _is_refused(candidate, kind, cls, shapes):
                return candidate
    raise CheckpointError(
        f"{values['model_type']}: without hf_prune this checkpoint would load with random weights in the skipped "
        "branches, or with constants of another depth, and the config has no attribute to prevent that. Prune widths "
        "instead of whole branches, or other layers."
    )


def _decoder(values: Mapping[str, Any]) -> Any:
    """What tells how layers are built: all of `values`, or the part for the text of a model of images."""
    return next((part for _, part in parts_of_ours(values)), values)


def _build(values: Mapping[str, Any], kind: type, cls: type | None, stock: bool = False) -> Shapes:
    """Shapes of the state dict of the model, built on the meta device; as transformers alone would if `stock`."""
    import torch

    config: PreTrainedConfig = kind.from_dict(copy.deepcopy(dict(values)))  # type: ignore[attr-defined]
    model_class = cls or auto_class(config)._model_mapping[type(config)]
    for part in {id(one): one for one in (config, decoder_config(config)) if stock}.values():
        # Reading a per-layer attribute still raises, but our wrappers take the config for an ordinary one.
        part.__class__ = type(type(part).__name__, (type(part),), {"is_heterogeneous": False})
        part.pruning_config = None
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shapes_or_none(values: Mapping[str, Any], kind: type, cls: type | None) -> Shapes | None:
    """Shapes of the pruned model; `None` if something read an attribute that differs between layers."""
    from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

    try:
        return _build(values, kind, cls)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # validators of config classes raise it from within
            if isinstance(cause, AmbiguousGlobalPerLayerAttributeError):
                return None
            cause = cause.__cause__
        raise CheckpointError(
            f"{values['model_type']}: the pruned model cannot be built from its config: {error}"
        ) from error


def _is_refused(values: Mapping[str, Any], kind: type, cls: type | None, shapes: Shapes) -> bool:
    """Whether stock transformers refuses the checkpoint: it cannot build the model, or finds other shapes."""
    try:
        stock = _build(values, kind, cls, stock=True)
    except Exception:
        return True
    surgery = [(part.get("pruning_config") or {}).get("surgery") for part in (values, _decoder(values))]
    if stock == shapes and not any(surgery):
        return True  # an ordinary model: nothing to lose
    return any(stock.get(name, shape) != shape for name, shape in shapes.items())


def _with_sentinels(values: Mapping[str, Any], kind: type) -> Iterator[dict[str, Any]]:
    own = _decoder(values)
    overrides = own.get("per_layer_config") or {}
    places = [
        (_SENTINELS[branch], [key for key, override in overrides.items() if branch in override.get("skip", ())])
        for branch in ("mlp", "attention")
    ]
    if "layers" in ((own.get("pruning_config") or {}).get("surgery") or {}):
        places.append(((), [next(iter(overrides), "0")]))
    for sentinels, keys in places:
        for name, value in (*sentinels, *_almost_equal(values, kind)) if keys else ():
            candidate = copy.deepcopy(dict(values))
            for key in keys:
                _decoder(candidate).setdefault("per_layer_config", {}).setdefault(key, {})[name] = value
            yield candidate


def _almost_equal(values: Mapping[str, Any], kind: type) -> Iterator[tuple[str, float]]:
    """Dropout probabilities and the like, changed too little to matter."""
    config = kind.from_dict(copy.deepcopy(dict(values)))  # type: ignore[attr-defined]
    for name, value in decoder_config(config).to_dict().items():
        if isinstance(value, float) and "drop" in name:
            yield name, value + 1e-9
