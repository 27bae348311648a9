"""How widths are written down in a config: which attributes hold them is found by probing, not listed.

An attribute holds an axis's width if a model built with that attribute changed has exactly the shapes that slicing
gives. What no attribute can say (head counts where `head_dim` is `hidden_size // num_heads`) becomes `surgery`: the
layer is built at its dense size and resized.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from hf_prune.errors import StructureError
from hf_prune.format.building import build_empty, decoder_config, decoder_values, fresh_config
from hf_prune.structure.axes import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hf_prune.structure.axes import Axis, Structure

_FLAG = "allow_global_per_layer_attribute_access"
_MOST_PROBES = 24


@dataclass(frozen=True)
class WidthAttributes:
    """Config attributes that hold the width of an axis, in every layer that has it.

    `factors` maps each attribute to its value per unit: `num_attention_heads` is 4 per unit with 4 queries per KV
    group.
    """

    factors: tuple[tuple[str, int], ...]
    pins: tuple[tuple[str, int], ...] = ()
    """Global attributes that must be written out although the dense config leaves them to a default (`head_dim`)."""

    def values(self, width: int) -> dict[str, int]:
        """The attributes' values at `width` units."""
        return {name: width * factor for name, factor in self.factors}

    def __str__(self) -> str:
        return ", ".join(name if factor == 1 else f"{name} / {factor}" for name, factor in self.factors)


def shapes(config: Any, cls: type | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state dict of the model that `config` describes; `None` if it cannot be built."""
    try:
        model = build_empty(fresh_config(config), cls)
    except StructureError:
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def family(axis: Axis) -> str:
    """The name of an axis without its layer: axes of one family share their config attributes."""
    return axis.name if axis.layer is None else axis.name.removeprefix(f"layers.{axis.layer}.")


def find_width_attributes(
    config: Any, structure: Structure, cls: type | None, pruned: Iterable[str] = ()
) -> dict[str, WidthAttributes]:
    """Config attributes that hold the width of each family of axes in one layer, found by probing.

    Axes inside of the units of others are only looked at, and come last, if one of them is in `pruned`.

    Returns:
        Family (`mlp`, `attention`, `mlp.experts`, ...) → knob; families whose width no attribute holds are absent.
    """
    inner = any(structure.axes[name].is_inner for name in pruned)
    key = ("knobs", repr(config.to_dict()), cls, inner)
    return structure.once(key, lambda: _find_width_attributes(config, structure, cls, inner))


def _find_width_attributes(
    config: Any, structure: Structure, cls: type | None, inner: bool
) -> dict[str, WidthAttributes]:
    knobs = {}
    for kind in get_args(Kind):
        first: dict[str, Axis] = {}
        for axis in structure.axes_of(kind):
            if axis.prunable and axis.layer is not None and not axis.tied and (inner or not axis.block):
                first.setdefault(family(axis), axis)
        for name, axis in first.items():
            if (knob := _probe(config, structure, cls, axis)) is not None:
                knobs[name] = knob
    return knobs


def _probe(config: Any, structure: Structure, cls: type | None, axis: Axis) -> WidthAttributes | None:
    width = max(axis.least, axis.num_units // axis.num_blocks // 2) * axis.num_blocks
    wanted = {name: structure.shape(name, {axis.name: width}) for name in structure.layouts}
    for knob in itertools.islice(_candidates(config, axis), _MOST_PROBES):
        probe = with_layer_values(config, {None: dict(knob.pins), axis.layer: knob.values(width)})
        if probe is not None and shapes(probe, cls) == wanted:
            return knob
    return None


def with_layer_values(config: Any, per_layer: Mapping[int | None, Mapping[str, Any]]) -> Any | None:
    """A copy of `config` whose layers have these values; `None` if the config refuses.

    Key `None` sets values of the whole model, in place of those that layers had.
    """
    values = config.to_dict()
    own_values = decoder_values(config, values)
    of_model = per_layer.get(None, {})
    own_values.update(of_model)
    earlier = (own_values.get("per_layer_config") or {}).items()
    overrides = {str(int(k)): {name: v for name, v in own.items() if name not in of_model} for k, own in earlier}
    for layer, changed in per_layer.items():
        if layer is not None and changed:
            overrides.setdefault(str(layer), {}).update(changed)
    if overrides:
        own_values["per_layer_config"] = overrides
        own_values[_FLAG] = True
    try:
        return type(config).from_dict(values)
    except Exception:  # a config class refuses in any way it likes; then the attribute is not the one
        return None


def _candidates(config: Any, axis: Axis) -> Iterator[WidthAttributes]:
    """Attribute sets worth trying, the likeliest first."""
    n, config = axis.num_units, decoder_config(config)
    everything = config.to_dict()
    overrides = {int(k): own for k, own in (everything.get("per_layer_config") or {}).items()}
    if axis.layer is not None:
        everything.update(overrides.get(axis.layer, {}))
    values = {k: v for k, v in everything.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}
    whole = {name: v // n for name, v in values.items() if v % n == 0}
    if axis.branch == "attention":
        heads = [name for name in whole if ("head" in name or "group" in name) and "dim" not in name]
        usual = {config.attribute_map.get(name, name) for name in ("num_attention_heads", "num_key_value_heads")}
        heads.sort(key=lambda name: (name not in usual, whole[name]))
        pins = _head_dim(config, values)
        for count in (2, 1, 3):
            for chosen in itertools.combinations(heads, count):
                factors = tuple((name, whole[name]) for name in chosen)
                yield WidthAttributes(factors)
                if pins:
                    yield WidthAttributes(factors, pins)
    else:
        likely = ("expert",) if axis.kind == "expert" else ("intermediate", "ffn", "inner", "ff", "mlp")
        exact = [name for name, factor in whole.items() if factor in (1, 2)]
        unset = [k for k, v in everything.items() if v is None and any(word in k for word in likely)]
        exact.sort(key=lambda name: (not any(word in name for word in likely), whole[name]))
        yield from (WidthAttributes(((name, whole[name]),)) for name in exact)
        yield from (WidthAttributes(((name, 1),)) for name in unset)


def _head_dim(config: Any, values: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """`head_dim` written out where the config leaves it to `hidden_size // num_attention_heads`."""
    hidden = values.get(config.attribute_map.get("hidden_size", "hidden_size"))
    heads = values.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    derived = isinstance(getattr(type(config), "head_dim", None), property)  # falcon: cannot be set
    if "head_dim" in values or derived or hidden is None or heads is None or hidden % heads:
        return ()
    return (("head_dim", hidden // heads),)
