"""What can be pruned in a model and what cannot: the answer of `hf-prune inspect`, from a config alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from hf_prune.allocation import allocate
from hf_prune.config import AxisKind, PruningConfig, RandomConfig, axes_of_kind, selected_axes
from hf_prune.errors import BudgetError, CheckpointError, ConfigError, StructureError
from hf_prune.format.building import decoder_config
from hf_prune.gate import check_model, quantised, unwrapped
from hf_prune.layers.masking import masked
from hf_prune.layers.weights import inference, input_device
from hf_prune.memory import count_memory, fit_ratio, memory_of, usable_bytes
from hf_prune.scores import score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruned_config import depends_on_depth, unresizable
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.width_attributes import family, find_width_attributes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.structure.axes import Axis, Structure

_ROUNDING = 1000
"""A difference up to this many machine epsilons of the largest logit counts as rounding."""
_CHOICES: tuple[tuple[AxisKind, ...], ...] = (("mlp", "attention"), ("mlp",), ("attention",), ("hidden",), ("layer",))


@dataclass(frozen=True)
class FamilyReport:
    """Axes of one family that look alike: same units, same verdict."""

    name: str
    """Axis name without its layer: `attention`, `mlp`, `mlp.experts`, `hidden`, `layers`, ..."""
    layers: tuple[int, ...]
    """Decoder layers that have such an axis; empty for axes of the whole model."""
    num_units: int
    """Units of each axis."""
    parameters_per_unit: int
    """Parameters that go with one unit (the mean over layers, if the units are layers)."""
    exact: bool
    """Removing units equals masking them; false where a norm mixes all units."""
    prunable: bool
    reason: str
    """Why it cannot be pruned, why it is not exact, or what layers compute from their place; empty otherwise."""
    attributes: str
    """Config attributes that hold the width; empty where no attribute does (the layer is built and resized)."""


@dataclass(frozen=True)
class InspectionReport:
    """Everything `hf-prune inspect` shows."""

    model_type: str
    num_layers: int
    num_parameters: int
    num_decoder_parameters: int
    """Attention and MLP parameters of the decoder layers: what budget `decoder` counts."""
    families: tuple[FamilyReport, ...]
    missing: tuple[str, ...]
    """Kinds of which no axis was found."""
    unsupported_ops: dict[str, str]
    """Operations that no tracing rule covers → the module that ran them. The axes they touch are not prunable."""
    quantised: str = ""
    """By which method: `prune` refuses such a model. Empty otherwise."""
    mtp_layers: int = 0
    """Layers that predict further tokens, by the config: transformers loads them apart from the model."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Verification:
    """Masked against sliced, for a random plan over the axes of one kind."""

    kind: AxisKind
    difference: float = math.nan
    """Largest difference between the logits of the masked and of the sliced model."""
    effect: float = math.nan
    """Largest difference between the logits of the dense and of the sliced model: what pruning itself changes."""
    tolerance: float = math.nan
    """What counts as rounding."""
    refused: str = ""
    """Why no checkpoint can hold what that plan leaves; nothing was compared then."""

    @property
    def equal(self) -> bool:
        """Whether masked equals sliced, within rounding."""
        return self.difference <= self.tolerance


def inspect_config(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> InspectionReport:
    """Find the axes of the model that `config` describes, without weights.

    Args:
        config: config of a causal LM.
        cls: model class; by default the one `AutoModelForCausalLM` chooses.

    Returns:
        One row per family of axes; a family whose layers differ in units or verdict has several.

    Raises:
        StructureError: the model cannot be built or traced from its config.
    """
    structure = infer_structure(config)
    refused = unresizable(config, structure, cls, held=False)
    axes = {
        n: dataclasses.replace(a, blocker=a.blocker or refused.get(family(a), "")) for n, a in structure.axes.items()
    }
    structure = dataclasses.replace(structure, axes=axes)
    knobs = {name: str(knob) for name, knob in find_width_attributes(config, structure, cls, structure.axes).items()}
    counted = frozenset(structure.counted("model"))
    alike: dict[tuple[Any, ...], list[Axis]] = {}
    for axis in structure.axes.values():
        facts = (family(axis), axis.num_units, _parameters_per_unit(structure, axis, counted), axis.exact, axis.blocker)
        alike.setdefault(facts, []).append(axis)
    families = [
        FamilyReport(
            name=name,
            layers=tuple(axis.layer for axis in axes if axis.layer is not None),
            num_units=num_units,
            parameters_per_unit=per_unit,
            exact=exact,
            prunable=axes[0].prunable or (name == "vocab" and not axes[0].blocker),  # by text, not by score
            reason=_reason(axes[0]) or (name == "layers" and depends_on_depth(config, structure, cls)) or "",
            attributes=knobs.get(name, "") if axes[0].layer is not None and axes[0].prunable else "",
        )
        for (name, num_units, per_unit, exact, _), axes in alike.items()
    ]
    return InspectionReport(
        model_type=structure.model_type,
        num_layers=len(structure.layer_paths),
        num_parameters=structure.num_parameters(),
        num_decoder_parameters=structure.num_parameters(budget="decoder"),
        families=tuple(sorted(families, key=lambda row: (not row.layers, row.name, row.layers))),
        missing=tuple(kind for kind in get_args(AxisKind) if not axes_of_kind(structure, kind)),
        quantised=quantised(config),
        unsupported_ops=dict(structure.unsupported_ops),
        mtp_layers=getattr(decoder_config(config), "num_mtp_layers", None) or 0,
    )


def inspect_fit(config: PreTrainedConfig, fit: str, *, context: int, batch: int, bits: int) -> list[dict[str, Any]]:
    """Whether the model of `config` fits into memory, and at which ratios it would; without weights.

    Args:
        config: config of a causal LM.
        fit: bytes, such as `8GB`, of which `MARGIN` is left free.
        context: this, `batch` and `bits`: see `PruningConfig`.
        batch: sequences at a time.
        bits: of each weight.

    Returns:
        A row for the dense model; if it does not fit one per choice of axes, of equal fractions: what has to go of the
        bytes (`memory`) and of the parameters, and what is left; or a `note` why that does not do.

    Raises:
        ConfigError: a number out of range.
        StructureError: the model cannot be traced, or keeps no key-value cache.
    """
    structure = infer_structure(config, cache=True)
    asked = PruningConfig(0.5, budget="memory", context=context, batch=batch, bits=bits)
    dense, usable = count_memory(structure, asked), usable_bytes(fit)
    verdict = "fits" if dense.total <= usable else "does not fit"
    note = f"{verdict}: {usable:,} bytes of {fit} are usable"
    rows: list[dict[str, Any]] = [{"axes": "none", "weights": dense.weights, "cache": dense.cache, "note": note}]
    for axes in _CHOICES if dense.total > usable else ():
        row: dict[str, Any] = {"axes": ", ".join(axes)}
        try:
            own = dataclasses.replace(asked, axes=axes, pruning_ratio=fit_ratio(structure, fit, asked))
            scores = {axis.name: torch.ones(axis.num_units) for axis in selected_axes(structure, own)}
            plan = allocate(scores, structure, own)
            row |= dataclasses.asdict(memory_of(plan, structure))
            row |= {f"{name}_ratio": plan.achieved[name] for name in ("memory", "decoder", "model")}
        except (BudgetError, StructureError) as error:
            row["note"] = str(error)
        rows.append(row)
    return rows


def verify(model: PreTrainedModel, *, pruning_ratio: float = 0.3, seed: int = 0) -> list[Verification]:
    """Prove on this very model that slicing equals masking: one random plan for each kind of exact axes.

    Args:
        model: the dense model, its weights in memory, float32 or float64.
        pruning_ratio: fraction of units removed.
        seed: of the plans and of the tokens.

    Returns:
        One entry per kind that can be verified (`hidden` cannot: norms see every channel).

    Raises:
        ConfigError: the model is in half precision, where rounding hides errors.
        StructureError: nothing can be verified; with the causes.
    """
    model = unwrapped(model)
    if model.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"verification compares logits; found {model.dtype}, expected float32 or float64.")
    structure = infer_structure(model)
    check_model(model, structure, RandomConfig(pruning_ratio), None)
    refused = unresizable(model.config, structure, type(model), held=False)
    generator = torch.Generator().manual_seed(seed)
    vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment]
    ids = torch.randint(vocab_size, (2, 16), generator=generator).to(input_device(model))
    found = []
    for kind in get_args(AxisKind):
        if not any(axis.prunable and axis.exact for axis in axes_of_kind(structure, kind)):
            continue
        kept = tuple(
            a.name for a in axes_of_kind(structure, kind) if a.prunable and (not a.exact or family(a) in refused)
        )
        config = RandomConfig(pruning_ratio, budget="units", axes=(kind,), protect=kept, seed=seed)
        try:
            plan = allocate(score(model, structure, config), structure, config)
        except BudgetError:  # too few units to remove any of them
            continue
        try:
            pruned = apply_plan(model, structure, plan)
        except (StructureError, CheckpointError) as error:
            found.append(Verification(kind, refused=str(error)))
            continue
        with inference(model), inference(pruned):
            dense, sliced = _logits(model, ids), _logits(pruned, ids)
            with masked(model, structure, plan):
                expected = _logits(model, ids)
        tolerance = _ROUNDING * torch.finfo(model.dtype).eps * max(1.0, expected.abs().max().item())
        difference, effect = (sliced - expected).abs().max().item(), (sliced - dense).abs().max().item()
        found.append(Verification(kind, difference, effect, tolerance))
    if all(check.refused for check in found):
        causes = [f"{check.kind}: {check.refused}" for check in found]
        raise StructureError(" ".join([f"this {structure.model_type} model has no exact axis to verify.", *causes]))
    return found


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _parameters_per_unit(structure: Structure, axis: Axis, counted: frozenset[str]) -> int:
    if axis.kind == "layer":
        branch = axis.name.partition(".")[2]
        owned = sum(
            structure.numel(name)
            for name, owner in structure.owners.items()
            if name in counted and branch in ("", owner.branch)
        )
        return round(owned / axis.num_units)
    names = {member.parameter for member in structure.members[axis.name]} & counted
    less = {axis.name: axis.num_units - axis.num_blocks}
    return sum(structure.numel(name) - structure.numel(name, less) for name in names) // axis.num_blocks


def _reason(axis: Axis) -> str:
    if axis.blocker:
        return axis.blocker
    if axis.num_units == 1:
        return "it has only one unit"
    return "" if axis.exact else "norms see every unit: removing units is not the same as zeroing them"
