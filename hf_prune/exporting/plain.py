"""Ordinary checkpoints: the stock class, all layers equal. The inverse of pruning, up to the widest layer only."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from hf_prune.atomic import check_free, replaced_directory
from hf_prune.checkpoint.saving import DISK_SHARD
from hf_prune.config.checks import ranges
from hf_prune.errors import HFPruneError, StructureError
from hf_prune.exporting import Exported
from hf_prune.format.building import build_empty, has_own_code
from hf_prune.format.per_layer import DIGESTS
from hf_prune.format.remote_code import own_class
from hf_prune.format.stock_guard import FLAG
from hf_prune.layers.weights import read_weight
from hf_prune.loading import load_config, load_tokenizer, open_model
from hf_prune.plan import PruningPlan, bare_plan, prunable_units
from hf_prune.structure import layouts as lay
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.judging import Judge
from hf_prune.surgery.pruned_config import Shapes, predicted_shapes, pruned_config
from hf_prune.surgery.slicing import pad_tensor, pruned_name
from hf_prune.surgery.width_attributes import family, shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_prune.structure.axes import Axis, Structure

# Classes with the same weights and the same computation whose configs take sizes that the first one's refuses, and the
# values that make them compute the same.
_SAME_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("mistral", {"sliding_window": None})}


def write_plain(checkpoint: str, output: Path, dtype: str | None, trust_remote_code: bool = False) -> Exported:
    """See `hf_prune.export`."""
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    target, structure, plan = plain_config(config)
    source = open_model(checkpoint, layers_on="disk", dtype=dtype, config=config)
    model: Any = build_empty(target)
    if (own := own_class(type(model))) is not None:  # not ours beside it, which has the same name
        own.register_for_auto_class(type(model)._auto_class)  # type: ignore[attr-defined]
        model = build_empty(target, own)
    model = model.to(source.dtype)
    check_free(output, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.generation_config = source.generation_config
    # What transformers takes for weights left on disk it reads one file's worth at a time.
    model.hf_device_map = {"": "disk"}
    weights: Any = _Padded(source, structure, plan)
    add_hook_to_module(model, AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=False))
    tokenizer = load_tokenizer(checkpoint, required=False, trust_remote_code=trust_remote_code)
    with replaced_directory(output) as new:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(new, max_shard_size=DISK_SHARD)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    size = sum(path.stat().st_size for path in output.iterdir())
    name, notes = type(model).__name__, _notes(config, target, structure, plan)
    return Exported(output, name, source.num_parameters(), model.num_parameters(), size, notes)


class _Padded:
    """The weights of the wider model by name, each made when it is asked for."""

    def __init__(self, source: PreTrainedModel, structure: Structure, plan: PruningPlan) -> None:
        self._source, self._structure, self._plan = source, structure, plan

    def __getitem__(self, name: str) -> Tensor:
        if pruned_name(name, self._structure, self._plan) is None:  # of a branch that was removed
            return torch.zeros(self._structure.shape(name), dtype=self._source.dtype)
        return pad_tensor(name, read_weight(self._source, name), self._structure, self._plan)


def plain_config(config: Any) -> tuple[Any, Structure, PruningPlan]:
    """The narrowest ordinary config that can hold the model of `config`.

    Args:
        config: config of a pruned or dense model; not changed.

    Returns:
        The config, its structure, and the plan that makes the model of `config` of it, keeping the first units.

    Raises:
        StructureError: there is none, with the reason.
    """
    found = shapes(config, None)
    if found is None:
        raise StructureError(f"{config.model_type}: the model cannot be built from its config.")
    surgery = (getattr(config, "pruning_config", None) or {}).get("surgery") or {}
    if any(record.get("select_inputs") for record in surgery.get("modules", {}).values()):
        raise StructureError(
            f"{config.model_type}: its heads have position biases of their own, which no ordinary config can give to "
            "just the heads that stay. Prune MLP channels or layers instead."
        )
    reasons = []
    for base, dense, wanted in _attempts(config, found):
        try:
            target = ordinary(pruned_config(base, dense, wanted) if wanted.kept_indices else base)
            structure = infer_structure(target)
            plan = plan_between(structure, found)
            _check_zeros(config, target, structure, plan)
        except HFPruneError as error:
            reasons.append(str(error))
        else:
            return target, structure, plan
    raise StructureError(f"{config.model_type}: no ordinary config can hold this model. {reasons[0]}")


def plan_between(structure: Structure, found: Shapes) -> PruningPlan:
    """The plan that keeps the first units of a model of `structure` and leaves the shapes `found`.

    Raises:
        StructureError: no plan does.
    """
    removed: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    for name, owner in structure.owners.items():
        if owner.branch is not None and name not in found:
            removed[owner.branch].add(owner.layer)
    kept: dict[str, tuple[int, ...]] = {}
    for branch, layers in removed.items():
        if layers:
            kept[f"layers.{branch}"] = tuple(i for i in range(len(structure.layer_paths)) if i not in layers)
    for name in prunable_units(structure):
        axis = structure.axes[name]
        inner = next((x for x in structure.axes.values() if x.block == name and not x.tied and x.prunable), None)
        sizes = [
            (structure.layouts[member.parameter][member.dim], found[member.parameter][member.dim])
            for member in structure.members[name]
            if member.parameter in found
        ]
        widths: dict[str, int] = {}
        if inner is not None:  # two unknowns, of few values
            pairs = ({name: w, inner.name: v} for v in _widths_of(inner) for w in range(axis.num_units, 0, -1))
            widths = next((w for w in pairs if all(lay.size(layout, w) == size for layout, size in sizes)), {})
        elif sizes:
            layout, size = sizes[0]
            one, two = (lay.size(layout, {name: width}) for width in (1, 2))
            widths = {name: 1 + (size - one) // (two - one)}
        kept.update(
            (own, structure.axes[own].first(w)) for own, w in widths.items() if 0 < w < structure.axes[own].num_units
        )
    plan = bare_plan(structure, kept)
    expected = predicted_shapes(structure, plan)
    wrong = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
    if wrong is not None:
        raise StructureError(
            f"{wrong} has the shape {found.get(wrong)}, expected {expected.get(wrong)} with layers that differ in "
            "the numbers of their units only."
        )
    return plan


def _widths_of(axis: Axis) -> range:
    """Widths of an axis in blocks, the largest first."""
    return range(axis.num_units, 0, -axis.num_blocks)


def _attempts(config: Any, found: Shapes) -> Iterator[tuple[Any, Structure, PruningPlan]]:
    """Ordinary configs with plans that narrow their layers to the widest one's sizes: the narrowest model first.

    The later ones leave more and more axes as wide as the base: not every config can say how many heads there are.
    """
    others = [_SAME_WEIGHTS[config.model_type]] if config.model_type in _SAME_WEIGHTS else []
    narrowed: list[tuple[Any, Structure, PruningPlan, dict[str, int]]] = []
    for kind in ((None, None), *others):
        try:
            base = ordinary(config, *kind)
            structure = infer_structure(base)
            plan = plan_between(structure, found)
        except StructureError:
            if not narrowed:
                raise
            continue  # the other class has no place for some tensor
        widest: dict[str, int] = {}
        for name in plan.num_units.keys() - plan.vanished_axes:
            if structure.axes[name].kind != "layer":
                key = family(structure.axes[name])
                widest[key] = max(plan.widths[name], widest.get(key, 0))
        narrowed.append((base, structure, plan, widest))
    names = sorted({name for *_, widest in narrowed for name in widest} - {"hidden"})
    for count in range(len(names) + 1):
        for wide in itertools.combinations(names, count):
            for base, structure, plan, widest in narrowed:
                kept = {
                    name: structure.axes[name].first(widest[key])
                    for name, total in plan.num_units.items()
                    if (key := family(structure.axes[name])) in widest and key not in wide and widest[key] < total
                }
                yield base, structure, dataclasses.replace(plan, kept_indices=kept)


def ordinary(config: Any, model_type: str | None = None, values: Mapping[str, Any] | None = None) -> Any:
    """`config` without what pruning wrote into it: all layers as wide as the base model's; of another type if given."""
    from transformers import CONFIG_MAPPING

    if getattr(config, "quantization_config", None):
        raise StructureError("found a quantised checkpoint, expected one that is not. Export first, quantise then.")
    ours = ["per_layer_config", "pruning_config", FLAG, DIGESTS]
    ours += [] if has_own_code(type(config)) else ["auto_map"]
    own = {key: value for key, value in config.to_dict().items() if key not in (*ours, "model_type")}
    kind = type(config) if model_type is None else CONFIG_MAPPING[model_type]
    try:
        plain = kind.from_dict({**own, **(values or {})})
        plain._name_or_path = config._name_or_path
        return plain
    except Exception as error:  # config classes refuse in any way they like
        raise StructureError(f"{kind.__name__} refuses these sizes: {error}") from error


def _check_zeros(config: Any, target: Any, structure: Structure, plan: PruningPlan) -> None:
    """Raise `StructureError` unless units of zeros, and the class of `target`, leave the logits as they are."""
    for name in plan.kept_indices:
        axis = structure.axes[name]
        if axis.kind == "expert":
            raise StructureError(
                f"{name}: found {plan.widths[name]} experts, expected {axis.num_units} as in other layers: a router "
                "would choose experts of zeros. Prune with the target 'plain', which leaves equally many."
            )
        if axis.kind != "layer" and not axis.exact:
            raise StructureError(
                f"{name}: found {plan.widths[name]} units, expected {axis.num_units} as the config of this class gives "
                "to all layers; a norm sees them all, so that units of zeros would change what it computes."
            )
    if difference := Judge(target, structure, plan, None).difference(config):
        raise StructureError(f"the {target.model_type} class computes something else: {difference}.")


def _notes(config: Any, target: Any, structure: Structure, plan: PruningPlan) -> tuple[str, ...]:
    notes = []
    if target.model_type != config.model_type:
        notes.append(
            f"written as {target.model_type}: the same weights and computation, but the {config.model_type} config "
            "refuses these sizes"
        )
    padded = sorted(
        {family(structure.axes[name]) for name in plan.kept_indices if structure.axes[name].layer is not None}
    )
    notes += [f"units of zeros were added to {name} in layers narrower than the widest" for name in padded]
    for branch in ("attention", "mlp"):
        layers = [layer for layer, gone in sorted(plan.removed_branches) if gone == branch]
        if layers:
            notes.append(f"the {branch} of layers {ranges(layers)}, which was removed, is written as zeros")
    return tuple(notes)
