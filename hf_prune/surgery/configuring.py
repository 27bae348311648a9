"""The config of a pruned model: widths in transformers' own `per_layer_config`, the rest in `pruning_config`."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.loud import make_loud
from hf_prune.errors import StructureError
from hf_prune.structure import layouts as lay
from hf_prune.structure.building import build_empty, fresh_config
from hf_prune.structure.forward import Forward, TraceError
from hf_prune.structure.inference import infer_structure, traceable_config
from hf_prune.structure.layouts import Concat, Layout, Product, Units
from hf_prune.surgery.expressing import Knob, family, find_knobs, shapes, with_layer_values
from hf_prune.surgery.slicing import pruned_name, renumber

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

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
    knobs = find_knobs(config, structure, cls) if _touched(structure, plan) else {}
    best: tuple[int, Any] | None = None
    tried: list[dict[str, Any]] = []
    starts = _without_layers(config, structure, plan)
    for trimmed, candidate in ((start, c) for start in starts for c in _candidates(start, structure, plan, knobs)):
        if (values := candidate.to_dict()) in tried:
            continue
        tried.append(values)
        found = shapes(candidate, cls)
        if found is None or set(found) != set(wanted):
            continue
        wrong = sum(found[name] != shape for name, shape in wanted.items())
        other_hidden = getattr(candidate, "hidden_size", None) != getattr(config, "hidden_size", None)
        if other_hidden and (wrong or scales(candidate, cls) != scales(trimmed, cls)):
            continue  # what a class derives from its hidden size (head_dim, the scale of embeddings) must stay
        if best is None or wrong < best[0]:
            best = (wrong, candidate)
        if wrong == 0:
            break
    if best is None:
        raise StructureError(f"{config.model_type}: no config describes a model with the planned layers and widths.")
    wrong, result = best
    if wrong:
        result.pruning_config["surgery"]["modules"] = _surgery(result, config, structure, plan, cls, wanted)
    if not result.pruning_config["surgery"]:
        del result.pruning_config["surgery"]
    result = type(config).from_dict(make_loud({**result.to_dict(), "model_type": config.model_type}))
    if shapes(result, cls) != wanted:
        raise StructureError(f"{config.model_type}: the pruned layers cannot be resized to the planned shapes.")
    return result


def predicted_shapes(structure: Structure, plan: PruningPlan) -> Shapes:
    """Shape of every tensor of the pruned model, by its new name."""
    widths = {name: len(kept) for name, kept in plan.kept_indices.items()}
    names = {name: pruned_name(name, structure, plan) for name in structure.layouts}
    return {new: structure.shape(name, widths) for name, new in names.items() if new is not None}


def _touched(structure: Structure, plan: PruningPlan) -> bool:
    return any(structure.axes[name].kind in ("attention", "mlp") for name in plan.kept_indices)


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


def _without_layers(config: Any, structure: Structure, plan: PruningPlan) -> Iterator[Any]:
    """Copies of `config` without the layers that go, one for each attribute that may hold their number.

    Every list with one entry per layer loses those of the layers that go. `pruning_config` is the one of this plan,
    with the surgery of an earlier pruning.
    """
    values = fresh_config(config).to_dict()
    n = len(structure.layer_paths)
    stay = [layer for layer in range(n) if layer not in plan.removed_layers]
    usual = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    counts = [name for name, value in values.items() if type(value) is int and value == n and "layer" in name]
    if len(stay) < n:
        for name, value in values.items():
            if isinstance(value, list) and len(value) == n:
                values[name] = [value[layer] for layer in stay]
        overrides = {int(k): v for k, v in (values.get("per_layer_config") or {}).items()}
        if overrides:
            values["per_layer_config"] = {str(stay.index(k)): v for k, v in overrides.items() if k in stay}
    skipped = {
        branch for override in (values.get("per_layer_config") or {}).values() for branch in override.get("skip", ())
    }
    earlier = (values.get("pruning_config") or {}).get("surgery") or {}
    branches = {branch: record for branch, record in earlier.get("branches", {}).items() if branch in skipped}
    branches.update(_branches(structure, plan))
    paths = {path: _new_path(path, structure, plan) for path in earlier.get("modules", {})}
    modules = {new: earlier["modules"][path] for path, new in paths.items() if new is not None}
    surgery = {"branches": branches, "modules": modules}
    values["pruning_config"] = {
        **_record(plan),
        "surgery": {key: records for key, records in surgery.items() if records},
    }
    if len(stay) == n:
        yield type(config).from_dict(values)
        return
    for attribute in sorted(counts, key=lambda name: name != usual):
        with contextlib.suppress(Exception):  # config classes refuse in any way they like
            yield type(config).from_dict({**values, attribute: len(stay)})


def _new_path(path: str, structure: Structure, plan: PruningPlan) -> str | None:
    """Path of a module in the pruned model; `None` if it goes."""
    for layer, layer_path in enumerate(structure.layer_paths):
        if f"{path}.".startswith(f"{layer_path}."):
            gone = [structure.branch_modules[f"layers.{i}.{b}"].path for i, b in plan.removed_branches if i == layer]
            if layer in plan.removed_layers or any(f"{path}.".startswith(f"{layer_path}.{module}.") for module in gone):
                return None
            return renumber(path, layer, structure, plan)
    return path


def _candidates(trimmed: Any, structure: Structure, plan: PruningPlan, knobs: dict[str, Knob]) -> Iterator[Any]:
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
            if len(set(widths.values())) == 1 and hoist:
                per_layer[None].update(knob.values(next(iter(widths.values()))))
                continue
            for layer, width in widths.items():
                if width != structure.axes[f"layers.{layer}.{name}"].num_units:
                    per_layer.setdefault(new_index[layer], {}).update(knob.values(width))
        for layer, branches in skips.items():
            per_layer.setdefault(layer, {})["skip"] = branches
        if (candidate := with_layer_values(trimmed, per_layer)) is not None:
            yield candidate
    yield trimmed


def scales(config: Any, cls: type | None) -> dict[tuple[str, str], float]:
    """Floats that the modules of the model of `config` keep, by module and name."""
    modules = build_empty(fresh_config(config), cls).named_modules()
    return {(path, k): v for path, module in modules for k, v in vars(module).items() if isinstance(v, float)}


def _family_widths(name: str, structure: Structure, plan: PruningPlan) -> dict[int, int]:
    """Width by layer of the axes of one family, removed ones left out."""
    widths = plan.widths
    return {
        axis.layer: widths.get(axis.name, axis.num_units)
        for axis in structure.axes.values()
        if axis.layer is not None and family(axis) == name and axis.name not in plan.vanished_axes
    }


def _hidden_values(config: Any, structure: Structure, plan: PruningPlan) -> Iterator[dict[str, int]]:
    """Global values that may express the hidden width."""
    if "hidden" not in plan.kept_indices:
        yield {}
        return
    n, width = structure.axes["hidden"].num_units, len(plan.kept_indices["hidden"])
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
    config: Any, dense: Any, structure: Structure, plan: PruningPlan, cls: type | None, wanted: Shapes
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
    wider: dict[str, nn.Module | None] = {}
    for axis, kept in plan.kept_indices.items():
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
        pairs, name = _resized(structure, axis, len(kept)), family(structure.axes[axis])
        for path, matched in _attributes(model, sorted(p for p in places if p), pairs).items():
            if len(set(matched.values())) < len(matched):  # sizes that coincide
                if name not in wider:
                    wider[name] = _wider(dense, structure, axis, cls)
                if (probe := wider[name]) is not None:
                    here = probe.get_submodule(_old_path(path, layer, structure, plan))
                    sizes = _resized(structure, axis, 2 * structure.axes[axis].num_units)
                    matched = {k: size for k, size in matched.items() if getattr(here, k) == sizes[size]}
            attributes.setdefault(path, {}).update({k: pairs[size] for k, size in matched.items()})
    return _that_runs(config, cls, model, modules, attributes)


def _resized(structure: Structure, axis: str, width: int) -> dict[int, int]:
    """Sizes in which `axis` takes part (heads, heads × head_dim, a fused projection) → their pruned sizes."""
    pairs: dict[int, int] = {}
    for member in structure.members[axis]:
        layout = structure.layouts[member.parameter][member.dim]
        for part in (layout, *_runs_with(layout, axis)):
            pairs.setdefault(lay.size(part, {}), lay.size(part, {axis: width}))
    return pairs


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
    num_units = structure.axes[axis].num_units
    values, sizes = config.to_dict(), _resized(structure, axis, num_units)
    hidden = config.attribute_map.get("hidden_size", "hidden_size")
    places = [(m.parameter, m.dim, structure.layouts[m.parameter][m.dim]) for m in structure.members[axis]]
    dense, wanted = ([lay.size(layout, {axis: n}) for *_, layout in places] for n in (num_units, 2 * num_units))
    alone = [(k,) for k, v in values.items() if type(v) is int and v in sizes and k != hidden and "token" not in k]
    useful: set[str] = set()  # those that change the sizes of the axis
    for names in itertools.chain(alone, _pairs(useful)):  # pairs are asked for when `useful` is complete
        for changed in (names, *([(*names, hidden)] if hidden in values else ())):
            trial = with_layer_values(config, {None: {name: 2 * values[name] for name in changed}})
            if trial is None:
                continue
            with contextlib.suppress(StructureError, KeyError, IndexError):
                model: nn.Module = build_empty(trial, cls)
                state = model.state_dict(keep_vars=True)
                found = [state[parameter].shape[dim] for parameter, dim, _ in places]
                if found == wanted and infer_structure(model).axes[axis].num_units == 2 * num_units:
                    return model  # not one whose units are twice as large
                if found != dense:
                    useful.update(names)
    return None


def _pairs(names: set[str]) -> Iterator[tuple[str, str]]:
    yield from itertools.combinations(sorted(names), 2)


def _has_forward_sizes(module: nn.Module) -> bool:
    """Whether a module without children computes with its own integers (an experts module, not a projection)."""
    from transformers.pytorch_utils import Conv1D

    return not isinstance(module, Conv1D)


def _that_runs(
    config: Any,
    cls: type | None,
    model: PreTrainedModel,
    modules: dict[str, Any],
    attributes: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Add to `modules` the attributes with which a forward pass of the resized model runs.

    Numbers alone do not tell what an attribute means. Tried are: all but sizes of one head; of these all but those
    named after the residual stream; all but those of its size; all; none.
    """
    hidden = getattr(config, "hidden_size", None)

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
        try:
            Forward().run(build_empty(traceable_config(trial), cls))
        except (StructureError, TraceError) as error:
            reasons.append(str(error))
            continue
        return result
    raise StructureError(f"{config.model_type}: the resized layers do not run: {reasons[0]}")
