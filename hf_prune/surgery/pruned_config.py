"""The config of a pruned model: widths in transformers' own `per_layer_config`, the rest in `pruning_config`."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError, StructureError
from hf_prune.format.building import build_empty, decoder_config, decoder_values, fresh_config
from hf_prune.format.per_layer import surgery_of
from hf_prune.format.stock_guard import make_stock_refuse
from hf_prune.plan import PruningPlan, bare_plan, vanishes
from hf_prune.structure import layouts as lay
from hf_prune.structure.forward import Forward, TraceError
from hf_prune.structure.inference import infer_structure, traceable_config
from hf_prune.structure.layouts import Concat, Layout, Product, Units
from hf_prune.surgery.judging import Judge
from hf_prune.surgery.slicing import on_axis, pruned_name, renamed, renumber
from hf_prune.surgery.tokens import renumbered
from hf_prune.surgery.width_attributes import WidthAttributes, family, find_width_attributes, shapes, with_layer_values

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from hf_prune.structure.axes import Axis, Structure
    from hf_prune.structure.layouts import Widths

Shapes = dict[str, tuple[int, ...]]


def pruned_config(config: Any, structure: Structure, plan: PruningPlan, cls: type | None = None) -> Any:
    """The config that describes the model pruned by `plan`.

    Uniform widths become global values: a plain config that needs nothing of ours. Otherwise per-layer values, and for
    what no attribute can say `pruning_config["surgery"]`. The result is checked: a model built from it has the
    planned shapes.

    Args:
        config: config of the dense model; not changed.
        structure: structure of the dense model.
        plan: kept units.
        cls: model class, by default the one `AutoModelForCausalLM` chooses.

    Raises:
        StructureError: no config describes the pruned model.
    """
    wanted = predicted_shapes(structure, plan)
    knobs = find_width_attributes(config, structure, cls, plan.kept_indices) if _touched(structure, plan) else {}
    start, reason = _without_layers(config, structure, plan, cls)
    if "vocab" in plan.kept_indices:
        config, start = renumbered(config, plan), _with_fewer_tokens(start, structure, plan, cls)
    judge = Judge(config, structure, plan, cls)
    best: tuple[int, Any] | None = None
    why = ""
    tried: list[dict[str, Any]] = []
    for candidate in _candidates(start, structure, plan, knobs):
        if (values := candidate.to_dict()) in tried:
            continue
        tried.append(values)
        found = shapes(candidate, cls)
        if found is None or set(found) != set(wanted):
            continue
        if any(
            size < needed for name, shape in wanted.items() for size, needed in zip(found[name], shape, strict=True)
        ):
            continue  # resizing only takes away
        wrong = sum(found[name] != shape for name, shape in wanted.items())
        sizes = [getattr(decoder_config(one), "hidden_size", None) for one in (candidate, config)]
        other_hidden = sizes[0] != sizes[1]
        if (best is not None and wrong >= best[0]) or (other_hidden and wrong):
            continue  # what a class derives from its hidden size must stay
        if values == start.to_dict() or not (why := judge.difference(candidate)):
            best = (wrong, candidate)
            if wrong == 0:
                break
    if best is None:
        if not why:
            build_empty(type(config).from_dict(tried[0]), cls)  # says why it cannot be built, if that is in the way
        raise StructureError(
            f"{config.model_type}: no config describes a model with the planned layers and widths{why and ': '}{why}."
        )
    wrong, result = best
    if wrong:
        result.pruning_config["surgery"]["modules"] = _surgery(result, config, structure, plan, cls, wanted, judge)
    if not result.pruning_config["surgery"]:
        del result.pruning_config["surgery"]
    values = {**result.to_dict(), "model_type": config.model_type}
    own = decoder_values(result, values)
    if own.get("per_layer_config"):
        own.setdefault("pruning_config", {"format": 1})  # what is ours is checked when it is read
    try:
        values = make_stock_refuse(values, type(config), cls)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {reason}.") if reason else error from None
    result = type(config).from_dict(values)
    if shapes(result, cls) != wanted:
        raise StructureError(f"{config.model_type}: the pruned layers cannot be resized to the planned shapes.")
    _check_generates(result, cls)
    return result


def _check_generates(config: Any, cls: type | None) -> None:
    """Refuse layers that differ where the model keeps what it has seen of all of them in tensors of one width."""
    if not (decoder_values(config, config.to_dict()).get("per_layer_config")):
        return
    model = build_empty(traceable_config(config), cls)
    if "past_key_values" in inspect.signature(model.forward).parameters:
        return  # a cache of its own for each layer
    try:
        Forward().run(model, use_cache=True)
    except TraceError as error:
        raise StructureError(
            f"{config.model_type}: with layers of different widths the model does not run token by token: {error}. "
            "Prune all layers to one width (allocation 'uniform'), or other axes."
        ) from error


def unresizable(config: Any, structure: Structure, cls: type | None = None, *, held: bool = True) -> dict[str, str]:
    """Families of axes that were inferred, but which the model's code does not let go: each with the cause.

    One layer of each family gives away what it can give away least, and the config of that is looked for: what would
    fail after scoring is known before it.

    Args:
        config: config of the dense model.
        structure: its structure.
        cls: model class, by default the one that `auto_class` chooses.
        held: try those too whose width an attribute of the config holds.
    """
    knobs = {} if held else find_width_attributes(config, structure, cls)
    first: dict[str, Axis] = {}
    for axis in structure.axes.values():
        less = axis.num_units // axis.num_blocks - axis.multiple_of
        if axis.layer is not None and axis.prunable and not axis.is_inner and less >= axis.least:
            first.setdefault(family(axis), axis)
    kept = {
        a.name: a.first(a.num_units - a.multiple_of * a.num_blocks) for name, a in first.items() if name not in knobs
    }
    reasons: dict[str, str] = {}
    for chosen in [[*kept], *[[name] for name in kept]] if kept else []:
        try:
            pruned_config(config, structure, bare_plan(structure, {name: kept[name] for name in chosen}), cls)
        except (StructureError, CheckpointError) as error:
            reasons |= {
                family(structure.axes[name]): str(error) for name in chosen if len(kept) == 1 or len(chosen) == 1
            }
        else:
            if len(chosen) == len(kept):
                break
    return reasons


def predicted_shapes(structure: Structure, plan: PruningPlan) -> Shapes:
    """Shape of every tensor of the pruned model, by its new name."""
    widths = {name: len(kept) for name, kept in plan.kept_indices.items()}
    names = {name: pruned_name(name, structure, plan) for name in structure.layouts}
    return {new: structure.shape(name, widths) for name, new in names.items() if new is not None}


def _with_fewer_tokens(config: Any, structure: Structure, plan: PruningPlan, cls: type | None) -> Any:
    """The config, renumbered; `StructureError` if more than the embedding and the head counts tokens."""
    fewer = renumbered(config, plan)
    before, after = shapes(config, cls) or {}, shapes(fewer, cls) or {}
    carriers = {pruned_name(name, structure, plan) for name in structure.layouts if on_axis("vocab", structure, name)}
    found = {name for name, shape in before.items() if after.get(name) != shape}
    if found != carriers:
        other = min(found ^ carriers, default="no tensor", key=str)
        raise StructureError(
            f"{config.model_type}: the vocabulary cannot be pruned: with another vocab_size {len(found)} tensors of "
            f"the model change, expected the embedding and the head; not so {other}."
        )
    return fewer


def _touched(structure: Structure, plan: PruningPlan) -> bool:
    return any(structure.axes[name].layer is not None for name in plan.kept_indices)


def _record(plan: PruningPlan) -> dict[str, Any]:
    from hf_prune import __version__

    return {
        "format": 1,
        "hf_prune_version": __version__,
        "base_model_name_or_path": plan.base_model_name_or_path,
        "method": plan.config.method,
        "settings": plan.config.to_dict(),
        "achieved": dict(plan.achieved),
        "widths": plan.widths,
    }


# --- candidates -----------------------------------------------------------------------------------------------------


_INDEX_LIST = ("layer", "indices", "idx")
_FROM_THE_START = ("first_k_dense", "dense_layers", "layer_start", "window_layers")
_BY_PLACE = (*_FROM_THE_START, "layer_end", "shared_layers", "period", "interval", "step", "freq", "offset", "every")


def depends_on_depth(config: Any, structure: Structure, cls: type | None = None) -> str:
    """What layers of this model compute from their place; "" if a plain config describes it without the first one."""
    n = len(structure.layer_paths)
    if n < 2:
        return ""
    try:
        plan = bare_plan(structure, {"layers": tuple(range(1, n))})
        result, reason = _without_layers(config, structure, plan, cls)
    except StructureError as error:
        return str(error)
    return f"built as at their old place: {reason}" if "layers" in surgery_of(decoder_config(result)) else ""


def _without_layers(config: Any, structure: Structure, plan: PruningPlan, cls: type | None) -> tuple[Any, str]:
    """A copy of `config` without the layers that go: its model computes what the dense one does with them bypassed.

    `pruning_config` is the one of this plan, with the surgery of an earlier pruning. What tells how layers are built
    stands in the config that they are built from: where a model of images has one for its text, in that.

    Returns:
        The config, and why a plainer one does not do.

    Raises:
        StructureError: no config describes that model.
    """
    values = fresh_config(config).to_dict()
    own = decoder_values(config, values)
    n = len(structure.layer_paths)
    stay = [layer for layer in range(n) if layer not in plan.removed_layers]
    if overrides := {int(k): v for k, v in (own.get("per_layer_config") or {}).items()}:
        own["per_layer_config"] = {str(stay.index(k)): v for k, v in overrides.items() if k in stay}
    skipped = {
        branch for override in (own.get("per_layer_config") or {}).values() for branch in override.get("skip", ())
    }
    earlier = surgery_of(config) | surgery_of(decoder_config(config))
    branches = {branch: record for branch, record in earlier.get("branches", {}).items() if branch in skipped}
    branches.update(_branches(structure, plan))
    paths = {path: _new_path(path, structure, plan) for path in earlier.get("modules", {})}
    modules = {new: earlier["modules"][path] for path, new in paths.items() if new is not None}
    before = earlier.get("layers") or {"kept": list(range(n)), "num_hidden_layers": n}
    layers = {**before, "kept": [before["kept"][layer] for layer in stay]}
    own.pop("pruning_config", None)
    values["pruning_config"] = {**_record(plan), "surgery": {"modules": modules} if modules else {}}
    _add_surgery(own, {"branches": branches, "layers": earlier.get("layers") and layers})
    if len(stay) == n:
        return type(config).from_dict(values), ""
    if (first := _image_layers(values)) > min(plan.removed_layers):
        raise StructureError(
            f"{config.model_type}: images enter after each of the first {first} decoder layers, found layers "
            f"{sorted(plan.removed_layers)} to remove. Remove later ones, or prune widths."
        )
    alone = replace(plan, kept_indices={"layers": tuple(stay)})
    judge, wanted = Judge(config, structure, alone, cls, sizes=True), predicted_shapes(structure, alone)
    reasons: list[tuple[int, str]] = []  # the further a candidate came, the more its reason tells
    for changed in _with_fewer_layers(config, values, n, stay, layers, own):
        try:
            candidate = type(config).from_dict(copy.deepcopy(changed))
        except Exception as error:  # config classes refuse in any way they like
            reasons.append((0, f"its config class refuses it: {error}"))
            continue
        found = shapes(candidate, cls)
        if found is None or found.keys() != wanted.keys():
            reasons.append((1, "the layers that stay have other tensors"))
        elif other := [name for name, shape in wanted.items() if found[name] != shape]:
            reasons.append((2, f"{other[0]} has shape {found[other[0]]}, expected {wanted[other[0]]}"))
        elif reason := judge.difference(candidate):
            reasons.append((3, reason))
        else:
            return candidate, max(reasons, key=lambda found: found[0], default=(0, ""))[1]
    by_place = [
        f"{name}={value}"
        for name, value in {**values, **own}.items()
        if type(value) is int and 0 < value <= n and any(word in name for word in _BY_PLACE)
    ]
    follows = f" Layers follow their place: {', '.join(by_place)}." if by_place else ""
    _, reason = max(reasons, key=lambda found: found[0], default=(0, "no attribute holds their number"))
    raise StructureError(
        f"{config.model_type}: no config describes the model without layers {sorted(plan.removed_layers)}: {reason}."
        f"{follows} Remove other layers, or prune widths."
    )


def _add_surgery(own: dict[str, Any], records: Mapping[str, Any]) -> None:
    """Add to the values of a config those records that say something. Modifies `own` in place."""
    if found := {key: record for key, record in records.items() if record}:
        section = own.get("pruning_config") or {"format": 1}
        own["pruning_config"] = {**section, "surgery": {**section.get("surgery", {}), **found}}


def _with_fewer_layers(
    config: Any, values: dict[str, Any], n: int, stay: list[int], layers: dict[str, Any], decoder: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Values of configs that may have only the layers `stay` of `n`, the plainest first.

    Rewritten are lists with one entry per layer, lists of layer indices, patterns that repeat, and numbers of layers
    from the start or to the end. Where that does not do, each layer is built with its dense index, as it was.
    """
    usual = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    inner = [key for key, value in values.items() if isinstance(value, dict) and all(isinstance(k, str) for k in value)]
    for place in (None, *inner):  # a table of labels has numbers for keys
        own = values if place is None else values[place]
        listed: dict[str, Any] = {}
        mapped: dict[str, Any] = {}
        for name, value in own.items():
            if _is_index_list(name, value, n):
                gone = [layer for layer in range(n) if layer not in stay]
                mapped[name] = [layer - sum(i < layer for i in gone) for layer in value if layer not in gone]
            elif isinstance(value, list) and len(value) == n:
                listed[name] = [value[layer] for layer in stay]
            elif isinstance(value, (list, str)) and 1 < len(value) <= n and ("types" in name or "pattern" in name):
                full = [value[layer % len(value)] for layer in stay]
                mapped[name] = "".join(full) if isinstance(value, str) else full
            elif type(value) is int and value > 0 and any(word in name for word in _FROM_THE_START):
                mapped[name] = sum(layer < value for layer in stay)
            elif type(value) is int and "shared_layers" in name:
                mapped[name] = sum(layer >= n - value for layer in stay)
        as_built = {"pruning_config": own.get("pruning_config")}
        _add_surgery(as_built, {"layers": layers})
        counts = [name for name, value in own.items() if type(value) is int and value == n and "layer" in name]
        counts.sort(key=lambda name: name != usual)
        variants = [{**listed, **mapped}, *([{**listed, **as_built}] if own is decoder else [])]
        for count, variant in itertools.product(counts or ([""] if listed else []), variants):
            changed = {**own, **variant, **({count: len(stay)} if count else {})}
            yield changed if place is None else {**values, place: changed}


def _image_layers(values: Mapping[str, Any]) -> int:
    """After how many of the first decoder layers images enter, beside those that stand among the tokens."""
    parts = [part for part in values.values() if isinstance(part, dict)]
    found = [
        len(v) for part in (values, *parts) for k, v in part.items() if "deepstack" in str(k) and isinstance(v, list)
    ]
    return max(found, default=0)


def _is_index_list(name: str, value: Any, n: int) -> bool:
    """Whether `value` lists layers by their index."""
    if not isinstance(value, list) or not any(word in name for word in _INDEX_LIST):
        return False
    whole = len(value) > 0 and all(type(entry) is int and entry >= 0 for entry in value)
    return whole and value[0] < n and all(left < right for left, right in itertools.pairwise(value))


def _new_path(path: str, structure: Structure, plan: PruningPlan) -> str | None:
    """Path of a module in the pruned model; `None` if it goes."""
    for layer, branch in plan.removed_branches:
        module = structure.branch_modules[f"layers.{layer}.{branch}"].path
        if f"{path}.".startswith(f"{structure.layer_paths[layer]}.{module}."):
            return None
    return renamed(path, structure, plan)


def _candidates(
    trimmed: Any, structure: Structure, plan: PruningPlan, knobs: dict[str, WidthAttributes]
) -> Iterator[Any]:
    """Configs that may describe the pruned model, the plainest first."""
    new_index = {
        old: new for new, old in enumerate(i for i in range(len(structure.layer_paths)) if i not in plan.removed_layers)
    }
    skips: dict[int, list[str]] = {}
    for layer, branch in sorted(plan.removed_branches):
        skips.setdefault(new_index[layer], []).append(branch)
    for hidden, hoist in itertools.product(_hidden_values(trimmed, structure, plan), (True, False)):
        per_layer: dict[int | None, dict[str, Any]] = {None: dict(hidden)}
        for name, knob in knobs.items():
            widths = _family_widths(name, structure, plan)
            if all(widths[layer] == structure.axes[f"layers.{layer}.{name}"].num_units for layer in widths):
                continue
            per_layer[None].update(knob.pins)
            inside = any(structure.axes[f"layers.{layer}.{name}"].block for layer in widths)
            if len(set(widths.values())) == 1 and hoist:
                per_layer[None].update(knob.values(next(iter(widths.values()))))
                for layer in widths if inside else ():  # the axis outside has spoken of the same attributes
                    for attribute in knob.values(1):
                        per_layer.get(new_index[layer], {}).pop(attribute, None)
                continue
            for layer, width in widths.items():
                if inside or width != structure.axes[f"layers.{layer}.{name}"].num_units:
                    per_layer.setdefault(new_index[layer], {}).update(knob.values(width))
        for layer, branches in skips.items():
            per_layer.setdefault(layer, {})["skip"] = branches
        if (candidate := with_layer_values(trimmed, per_layer)) is not None:
            yield candidate
    yield trimmed


def _family_widths(name: str, structure: Structure, plan: PruningPlan) -> dict[int, int]:
    """Width by layer of the axes of one family, removed ones left out; in blocks, what is left in those that stay."""
    widths = {**structure.widths, **plan.widths}
    for axis in (structure.axes[name] for name in plan.kept_indices):
        if axis.tied:
            widths[axis.tied] = widths[axis.name] // axis.num_blocks
    return {
        axis.layer: widths[axis.name] * widths.get(axis.block, axis.num_blocks) // axis.num_blocks
        for axis in structure.axes.values()
        if axis.layer is not None
        and family(axis) == name
        and not vanishes(axis.name, plan.removed_layers, plan.removed_branches)
    }


def _hidden_values(config: Any, structure: Structure, plan: PruningPlan) -> Iterator[dict[str, int]]:
    """Global values that may express the hidden width."""
    if "hidden" not in plan.kept_indices:
        yield {}
        return
    n, width = structure.axes["hidden"].num_units, len(plan.kept_indices["hidden"])
    config = decoder_config(config)
    values = config.to_dict()
    attribute = config.attribute_map.get("hidden_size", "hidden_size")
    same = {k: width for k, v in values.items() if type(v) is int and v == n and "vocab" not in k}
    heads = values.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    pins: dict[str, int] = {}
    if isinstance(heads, int):
        pins["head_dim"] = values.get("head_dim") or n // heads
    mlp = [axis.num_units for axis in structure.axes_of("mlp")]
    for name, value in values.items():
        if value is None and "inner" in name and mlp:
            pins[name] = mlp[0]
    yield {attribute: width, **pins}
    yield {**same, **pins}
    yield {}


# --- what no attribute can say --------------------------------------------------------------------------------------


def _branches(structure: Structure, plan: PruningPlan) -> dict[str, Any]:
    """The branches that go: which module each is, and what its stand-in returns."""
    branches = {}
    for layer, branch in sorted(plan.removed_branches):
        module = structure.branch_modules[f"layers.{layer}.{branch}"]
        outputs = module.outputs
        # A stand-in adds nothing to the residual stream; what else the module returns (attention weights) is absent.
        branches[branch] = {
            "module": module.path,
            "outputs": ["zeros", *[None] * (len(outputs) - 1)] if isinstance(outputs, list) else "zeros",
        }
    return branches


def _surgery(
    config: Any, dense: Any, structure: Structure, plan: PruningPlan, cls: type | None, wanted: Shapes, judge: Judge
) -> dict[str, Any]:
    """Shapes, attributes and selected inputs of modules that the config builds too large, and all earlier surgery."""
    model = build_empty(fresh_config(config), cls)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    wrong = {name for name, shape in wanted.items() if found[name] != shape}
    modules: dict[str, Any] = copy.deepcopy(config.pruning_config["surgery"].get("modules", {}))
    for name in sorted(wrong):
        path, _, tensor = name.rpartition(".")
        modules.setdefault(path, {}).setdefault("shapes", {})[tensor] = list(wanted[name])
    attributes: dict[str, dict[str, int]] = {}
    known: dict[str, list[nn.Module | None]] = {}
    wider: dict[str, nn.Module | None] = {}
    for name, kept in plan.kept_indices.items():
        axis = structure.axes[name].tied or name
        layer = structure.axes[axis].layer
        if layer is None:
            continue
        places = {pruned_name(m.parameter, structure, plan) for m in structure.members[axis]}
        if not places & wrong:
            continue
        for use in structure.selected_inputs.get(axis, ()):
            path = renumber(use.module_path, layer, structure, plan)
            record = {"dim": use.dim, "sizes": list(use.sizes), "factor": use.factor, "kept": list(kept)}
            inputs = modules.setdefault(path, {}).setdefault("select_inputs", {})
            if use.name in inputs:  # selected before: `kept` counts among what was kept then
                record = {**inputs[use.name], "kept": [inputs[use.name]["kept"][unit] for unit in kept]}
            inputs[use.name] = record
        pairs = _resized(structure, axis, plan.widths)
        for path, matched in _attributes(model, sorted(p for p in places if p), pairs).items():
            if len(set(matched.values())) < len(matched) or structure.axes[axis].block:  # sizes that coincide
                if axis not in wider:  # layers of another kind may take their sizes from other attributes
                    alike = known.setdefault(family(structure.axes[axis]), [])
                    fitting = [probe for probe in alike if probe is None or _has_twice(probe, structure, axis)]
                    if not fitting:
                        fitting = [_wider(dense, structure, axis, cls)]
                        alike += fitting
                    wider[axis] = fitting[0]
                if (probe := wider[axis]) is not None:
                    here = probe.get_submodule(_old_path(path, layer, structure, plan))
                    sizes = _resized(structure, axis, {axis: 2 * structure.axes[axis].num_units})
                    matched = {k: size for k, size in matched.items() if getattr(here, k) == sizes[size]}
                elif structure.axes[axis].block:  # rather the number of blocks than that of units in each
                    matched = {k: size for k, size in matched.items() if size != structure.axes[axis].num_blocks}
            attributes.setdefault(path, {}).update({k: pairs[size] for k, size in matched.items()})
    return _that_runs(config, judge, model, modules, attributes)


def _resized(structure: Structure, axis: str, widths: Widths) -> dict[int, int]:
    """Sizes in which `axis` takes part (heads, heads × head_dim, a fused projection) → those at `widths`."""
    layouts = [structure.layouts[member.parameter][member.dim] for member in structure.members[axis]]
    runs = [run for layout in layouts for run in _runs_with(layout, axis)]
    pairs: dict[int, int] = {}
    for part in (*layouts, *sorted(runs, key=_has_parts)):  # of equal sizes the likelier one to be kept as a number
        pairs.setdefault(lay.size(part, {}), lay.size(part, widths))
    return pairs


def _has_parts(layout: Layout) -> bool:
    return isinstance(layout, Concat) or (isinstance(layout, Product) and any(map(_has_parts, layout.factors)))


def _runs_with(layout: Layout, axis: str) -> Iterator[Layout]:
    """Every run of factors, and every part, of `layout` that carries `axis`."""
    if isinstance(layout, Product):
        for start, end in itertools.combinations(range(len(layout.factors) + 1), 2):
            run = layout.factors[start:end]
            if any(axis in lay.axes(factor) for factor in run):
                yield Product(run)
        for factor in layout.factors:
            yield from _runs_with(factor, axis)
    elif isinstance(layout, Concat):
        for part in layout.parts:
            if axis in lay.axes(part):
                yield part
                yield from _runs_with(part, axis)
    elif isinstance(layout, Units) and layout.axis == axis:
        yield layout


def _attributes(model: nn.Module, names: list[str], pairs: Container[int]) -> dict[str, dict[str, int]]:
    """Integers that the modules around the parameters `names` keep and that are one of the sizes `pairs`."""
    owners = {name.rpartition(".")[0] for name in names}
    matched = {}
    for path in sorted({path for owner in owners for path in (owner, owner.rpartition(".")[0])}):
        module = model.get_submodule(path)
        if type(module).__module__.startswith("torch.") or (
            not any(module.children()) and path in owners and not _has_forward_sizes(module)
        ):
            continue
        own = {k: v for k, v in vars(module).items() if type(v) is int and v in pairs and "layer" not in k}
        if own:
            matched[path] = own
    return matched


def _old_path(path: str, layer: int, structure: Structure, plan: PruningPlan) -> str:
    """The path that `renumber` made `path` of."""
    old = structure.layer_paths[layer]
    return old + path.removeprefix(renumber(old, layer, structure, plan))


def _wider(config: Any, structure: Structure, axis: str, cls: type | None) -> nn.Module | None:
    """The dense model with twice the units of `axis` (and whatever else the same attributes hold), if one is found."""
    num_units, decoder = structure.axes[axis].num_units, decoder_config(config)
    values, sizes = decoder.to_dict(), _resized(structure, axis, {})
    hidden = decoder.attribute_map.get("hidden_size", "hidden_size")
    dense = _sizes_planned(structure, axis, num_units)
    alone = [(k,) for k, v in values.items() if type(v) is int and v in sizes and k != hidden and "token" not in k]
    useful: set[str] = set()  # those that change the sizes of the axis
    for names in itertools.chain(alone, _pairs(useful)):  # pairs are asked for when `useful` is complete
        for changed in (names, *([(*names, hidden)] if hidden in values else ())):
            trial = with_layer_values(config, {None: {name: 2 * values[name] for name in changed}})
            if trial is None:
                continue
            with contextlib.suppress(StructureError, KeyError, IndexError):
                model: nn.Module = build_empty(trial, cls)
                if _has_twice(model, structure, axis) and infer_structure(model).axes[axis].num_units == 2 * num_units:
                    return model  # not one whose units are twice as large
                found = _sizes_along(model, structure, axis)
                if found != dense:
                    useful.update(names)
    return None


def _has_twice(model: nn.Module, structure: Structure, axis: str) -> bool:
    return _sizes_along(model, structure, axis) == _sizes_planned(structure, axis, 2 * structure.axes[axis].num_units)


def _sizes_planned(structure: Structure, axis: str, num_units: int) -> list[int]:
    """Of every parameter dimension that carries an axis, with so many units."""
    layouts = [structure.layouts[member.parameter][member.dim] for member in structure.members[axis]]
    return [lay.size(layout, {axis: num_units}) for layout in layouts]


def _sizes_along(model: nn.Module, structure: Structure, axis: str) -> list[int]:
    """The same in a model."""
    state = model.state_dict(keep_vars=True)
    return [state[member.parameter].shape[member.dim] for member in structure.members[axis]]


def _pairs(names: set[str]) -> Iterator[tuple[str, str]]:
    yield from itertools.combinations(sorted(names), 2)


def _has_forward_sizes(module: nn.Module) -> bool:
    """Whether a module without children computes with its own integers (an experts module, not a projection)."""
    from transformers.pytorch_utils import Conv1D

    return not isinstance(module, Conv1D)


def _that_runs(
    config: Any,
    judge: Judge,
    model: PreTrainedModel,
    modules: dict[str, Any],
    attributes: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Add to `modules` the attributes with which the resized model computes what the dense one does.

    Numbers alone do not tell what an attribute means. Tried are: all but sizes of one head; of these all but those
    named after the residual stream; all but those of its size; all; none.
    """
    hidden = getattr(decoder_config(config), "hidden_size", None)

    def without(words: tuple[str, ...], size: int | None = None) -> dict[str, dict[str, int]]:
        return {
            path: {
                name: value
                for name, value in found.items()
                if not any(word in name for word in words) and getattr(model.get_submodule(path), name) != size
            }
            for path, found in attributes.items()
        }

    one_head, stream = ("head_dim", "head_size"), ("hidden", "embed", "d_model")
    variants: tuple[dict[str, dict[str, int]], ...]
    variants = (without(one_head), without((*one_head, *stream)), without(one_head, hidden), attributes, {})
    reasons = []
    for chosen in variants:
        result = {path: dict(record) for path, record in modules.items()}
        for path, found in chosen.items():
            if found:
                record = result.setdefault(path, {})
                record["attributes"] = {**record.get("attributes", {}), **found}
        trial = fresh_config(config)
        trial.pruning_config["surgery"] = {**trial.pruning_config.get("surgery", {}), "modules": result}
        if reason := judge.difference(trial):
            reasons.append(reason)
        else:
            return result
    raise StructureError(f"{config.model_type}: the resized layers do not compute the same: {reasons[0]}")
