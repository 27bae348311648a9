"""`PruningPlan`: which units stay. A value that is saved, inspected, and applied without any further decision."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_prune.config import LAYER_AXES, PruningConfig, selected_axes
from hf_prune.errors import ConfigError, PlanError
from hf_prune.reading import load_text_file, parse_json, save_text_file
from hf_prune.structure.axes import BRANCH_OF, BRANCHES

if TYPE_CHECKING:
    import os

    from hf_prune.structure.axes import Counted, Structure
    from hf_prune.structure.layouts import Widths

FORMAT = 1
_KEYS = ("model_type", "base_model_name_or_path", "num_units", "kept_indices", "config", "achieved")
_MANY = ".channels"
"""How the axes of the channels of all experts are called."""
_MEANINGS = ("decoder", "model", "units")
_PER_LAYER = re.compile(r"layers\.(\d{1,4})\.(attention|mlp|experts)(\..+)?")
_MOST_UNITS = {"layer": 10_000, "other": 2**24}
"""More units than any model has; layers are counted one by one, the units of other axes are only listed."""


@dataclass(frozen=True)
class PruningPlan:
    """Kept units per axis, and where they came from. Checked when it is made; applying it twice gives the same bits.

    Raises:
        PlanError: kept indices that are not ascending, out of range, or of an unknown axis; or no attention stays.
    """

    model_type: str
    """`config.model_type` of the model the plan is for."""
    base_model_name_or_path: str | None
    """Where that model came from, if known."""
    num_units: dict[str, int]
    """Units of every prunable axis of the dense model: the fingerprint that `check` compares."""
    kept_indices: dict[str, tuple[int, ...]]
    """Ascending units that stay, only for axes that lose units and do not go with a removed layer or branch."""
    config: PruningConfig
    """What was asked."""
    achieved: dict[str, float]
    """Fraction removed, 0 to 1: of `decoder` parameters, of all `model` parameters, of the selected axes' `units`; of
    the predicted `latency` where that is known, of `memory` or `active` parameters where that is the budget."""

    def __post_init__(self) -> None:
        for name, num_units in self.num_units.items():
            if name not in ("hidden", "vocab", *LAYER_AXES.values()) and not _PER_LAYER.fullmatch(name):
                raise PlanError(f"the plan counts units of {name[:60]!r}, which no axis of a model is called.")
            most = _MOST_UNITS["layer" if name in LAYER_AXES.values() else "other"]
            if type(num_units) is not int or not 1 <= num_units <= most:
                raise PlanError(f"{name}: the plan says {num_units!r} units, expected a whole number from 1 to {most}.")
        for name, kept in self.kept_indices.items():
            self._check_kept(name, kept)
        for name in self.kept_indices.keys() & self.vanished_axes:
            raise PlanError(f"{name}: the plan keeps units of it and also removes the layer or branch that holds it.")
        if self.widths.get(LAYER_AXES["layer_attention"]) == 0:
            raise PlanError("the plan removes the attention of all layers, expected one that keeps it. Remove less.")
        known = set(self.achieved) - {"latency", "memory", "active"} == set(_MEANINGS)
        if not known or not all(_is_fraction(value) for value in self.achieved.values()):
            raise PlanError(f"achieved: found {self.achieved!r}, expected fractions from 0 to 1 for {_MEANINGS}.")

    def _check_kept(self, name: str, kept: tuple[int, ...]) -> None:
        if name not in self.num_units:
            raise PlanError(f"the plan keeps units of {name!r} but does not say how many units that axis has.")
        if not isinstance(kept, tuple) or not all(type(unit) is int for unit in kept):
            raise PlanError(f"{name}: kept indices must be a tuple of whole numbers.")
        ascending = all(left < right for left, right in itertools.pairwise(kept))
        if not kept or not ascending or kept[0] < 0 or kept[-1] >= self.num_units[name]:
            raise PlanError(f"{name}: kept indices must be one or more, ascending, and below {self.num_units[name]}.")
        if len(kept) == self.num_units[name]:
            raise PlanError(f"{name}: the plan lists all {len(kept)} units; list only axes that lose some.")

    @cached_property
    def removed_layers(self) -> frozenset[int]:
        """Decoder layers that go as a whole."""
        return self._removed("layers")

    @cached_property
    def removed_branches(self) -> frozenset[tuple[int, str]]:
        """`(layer, "attention" | "mlp")` of the branches that go while their layer stays."""
        return frozenset(
            (layer, branch)
            for branch in ("attention", "mlp")
            for layer in self._removed(f"layers.{branch}") - self.removed_layers
        )

    @cached_property
    def vanished_axes(self) -> frozenset[str]:
        """Per-layer axes that go with a removed layer or branch."""
        return frozenset(name for name in self.num_units if vanishes(name, self.removed_layers, self.removed_branches))

    @property
    def widths(self) -> dict[str, int]:
        """Width of every axis of `num_units` after pruning; 0 for axes that vanish with their layer."""
        widths = {name: len(self.kept_indices.get(name, range(total))) for name, total in self.num_units.items()}
        widths.update(dict.fromkeys(self.vanished_axes, 0))
        for name in set(LAYER_AXES.values()) & set(widths):
            widths[name] = self.num_units[name] - len(self._removed(name) | self.removed_layers)
        return widths

    def check(self, structure: Structure) -> None:
        """Raise `PlanError` unless the plan was made for a model of this structure."""
        origin = f"The plan was made for {self.base_model_name_or_path or f'another {self.model_type} model'!r}"
        remedy = f"{origin}; pass that model or make a new plan."
        if structure.model_type != self.model_type:
            raise PlanError(f"the plan is for model type {self.model_type!r}, found {structure.model_type!r}. {remedy}")
        found = counted_units(structure, self.num_units)
        experts = {axis.name for axis in structure.axes_of("expert")}  # earlier plans do not know them: they stay
        for name in sorted((found.keys() - experts) ^ (self.num_units.keys() - (experts & found.keys()))):
            where = "the plan" if name in found else "this model"
            raise PlanError(f"{name}: {where} has no such prunable axis. {remedy}")
        for name, units in self.kept_indices.items():
            if (tied := structure.axes[name].tied) in self.kept_indices:
                raise PlanError(f"{name}: the plan keeps channels of each expert, and of {tied} the same ones of all.")
            if (num_blocks := structure.axes[name].num_blocks) == 1:
                continue
            of_block = Counter(unit * num_blocks // self.num_units[name] for unit in units)
            counts = [of_block[block] for block in range(num_blocks)]
            if len(set(counts)) > 1:
                raise PlanError(f"{name}: the plan keeps {counts} units of its blocks, expected equally many of each.")
        for name, num_units in self.num_units.items():
            kept, axis = len(self.kept_indices.get(name, range(num_units))), structure.axes[name]
            least = axis.least * axis.num_blocks
            if kept < least:
                raise PlanError(
                    f"{name}: the plan keeps {kept} experts, expected {least} or more: each token is sent to so many. "
                    "Remove fewer."
                )
            if found[name] != num_units:
                raise PlanError(
                    f"{name}: the plan keeps {kept} of {num_units} units but this model has {found[name]}. {remedy}"
                )

    def num_parameters(self, structure: Structure, budget: Counted = "model") -> int:
        """Exact parameter count after pruning, removed layers and branches included; tied parameters count once."""
        return count_parameters(structure, self.widths, self.removed_layers, self.removed_branches, budget)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "format": FORMAT,
            "model_type": self.model_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            "num_units": dict(self.num_units),
            "kept_indices": {name: self._as_json(name, kept) for name, kept in self.kept_indices.items()},
            "config": self.config.to_dict(),
            "achieved": dict(self.achieved),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningPlan:
        """Read a plan back; `PlanError` for another format, missing or unknown keys, or values that do not fit."""
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise PlanError(f"found plan format {found!r}, expected {FORMAT}. Use the hf_prune that wrote the plan.")
        unknown, missing = set(values) - {"format", *_KEYS}, set(_KEYS) - set(values)
        if unknown or missing:
            raise PlanError(f"a plan has the keys {_KEYS}; unknown: {sorted(unknown)}, missing: {sorted(missing)}.")
        for name, kind in (("model_type", str), ("num_units", dict), ("kept_indices", dict), ("achieved", dict)):
            if not isinstance(values[name], kind):
                raise PlanError(f"{name}: found {type(values[name]).__name__} in the plan, expected {kind.__name__}.")
        base = values["base_model_name_or_path"]
        if base is not None and not isinstance(base, str):
            raise PlanError(f"base_model_name_or_path: found {base!r} in the plan, expected a text or null.")
        try:
            config = PruningConfig.from_dict(values["config"])
        except ConfigError as error:
            raise PlanError(f"the plan's config is damaged: {error}") from error
        kept_indices = {
            name: tuple(kept) if isinstance(kept, list) else kept for name, kept in values["kept_indices"].items()
        }
        for name in kept_indices:
            if name == "vocab" or (name.endswith(_MANY) and isinstance(kept_indices[name], str)):
                kept_indices[name] = _bits(name, kept_indices[name], values["num_units"].get(name))
        return cls(
            model_type=values["model_type"],
            base_model_name_or_path=base,
            num_units=dict(values["num_units"]),
            kept_indices=kept_indices,
            config=config,
            achieved=dict(values["achieved"]),
        )

    def to_json(self) -> str:
        """The plan as JSON text, one line per top-level key and per axis."""
        values = self.to_dict()
        kept = [f"    {json.dumps(name)}: {json.dumps(units)}" for name, units in values.pop("kept_indices").items()]
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        body = "{\n" + ",\n".join(kept) + "\n  }" if kept else "{}"
        return "{\n" + ",\n".join([*lines, f'  "kept_indices": {body}']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """`from_dict` of JSON text; `PlanError` if the text is not JSON."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise PlanError(f"a plan must be JSON, but the text is damaged: {error}.") from error
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`; an interrupted write leaves an older file intact."""
        save_text_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan from `path`; `PlanError` if it is missing or damaged."""
        return cls.from_json(load_text_file(path, "plan", PlanError))

    def _as_json(self, name: str, kept: tuple[int, ...]) -> list[int] | str:
        """Units as they are written: a list; of many, tokens and channels of experts, one bit each, in base 64."""
        if name != "vocab" and not name.endswith(_MANY):
            return list(kept)
        bits = bytearray(-(-self.num_units[name] // 8))
        for token in kept:
            bits[token // 8] |= 1 << token % 8
        return base64.b64encode(bits).decode()

    def _removed(self, name: str) -> frozenset[int]:
        kept = self.kept_indices.get(name)
        return frozenset() if kept is None else frozenset(range(self.num_units[name])) - frozenset(kept)


def make_plan(
    structure: Structure,
    kept_indices: dict[str, tuple[int, ...]],
    config: PruningConfig,
    base_model_name_or_path: str | None,
) -> PruningPlan:
    """A plan for a model of `structure`, its achieved ratios counted exactly."""
    names = [axis.name for axis in selected_axes(structure, config)] if config.pruning_ratio else []
    plan = PruningPlan(
        model_type=structure.model_type,
        base_model_name_or_path=base_model_name_or_path,
        num_units=counted_units(structure, {*kept_indices, *names}),
        kept_indices=kept_indices,
        config=config,
        achieved=dict.fromkeys(_MEANINGS, 0.0),
    )
    achieved: dict[str, float] = {}
    budgets: tuple[Counted, ...] = ("decoder", "model", "active")
    for budget in budgets if config.budget == "active" else budgets[:2]:
        dense = structure.num_parameters(budget=budget)
        achieved[budget] = (dense - plan.num_parameters(structure, budget)) / dense if dense else 0.0
    units = sum(plan.num_units[name] for name in names)
    achieved["units"] = (units - sum(plan.widths[name] for name in names)) / units if units else 0.0
    return dataclasses.replace(plan, achieved=achieved)


def bare_plan(structure: Structure, kept_indices: dict[str, tuple[int, ...]]) -> PruningPlan:
    """A plan that says what stays and no more: the ratio is a placeholder, and what it achieves is not counted."""
    nothing = dict.fromkeys(_MEANINGS, 0.0)
    num_units = counted_units(structure, kept_indices)
    return PruningPlan(structure.model_type, None, num_units, kept_indices, PruningConfig(0.0), nothing)


def with_tokens(plan: PruningPlan, structure: Structure, kept: tuple[int, ...]) -> PruningPlan:
    """`plan`, and of the vocabulary only the tokens `kept` (ascending ids); what it achieves is counted anew.

    Raises:
        PlanError: the vocabulary of this model cannot be pruned, or `kept` is not of it.
    """
    blocker = structure.axes["vocab"].blocker if "vocab" in structure.axes else "it has no embedding and head"
    if not blocker and len(kept) == structure.axes["vocab"].num_units:
        blocker = "all tokens are needed; give less text, or a lower coverage"
    if blocker:
        raise PlanError(f"the vocabulary of this {structure.model_type} model stays whole: {blocker}.")
    made = make_plan(structure, {**plan.kept_indices, "vocab": kept}, plan.config, plan.base_model_name_or_path)
    return dataclasses.replace(made, achieved=plan.achieved | {budget: made.achieved[budget] for budget in _MEANINGS})


def prunable_units(structure: Structure) -> dict[str, int]:
    """Units of every axis of the dense model that is pruned by score, those inside of the units of others left out."""
    return {name: axis.num_units for name, axis in structure.axes.items() if axis.prunable and not axis.is_inner}


def counted_units(structure: Structure, names: Container[str]) -> dict[str, int]:
    """What `PruningPlan.num_units` holds: `prunable_units`, and of the other axes those in `names`."""
    others = {
        name: axis.num_units
        for name, axis in structure.axes.items()
        if (axis.is_inner or axis.kind == "vocab") and not axis.blocker and name in names
    }
    return prunable_units(structure) | others


def vanishes(axis_name: str, layers: frozenset[int], branches: frozenset[tuple[int, str]]) -> bool:
    """Whether a per-layer axis goes when these layers and `(layer, branch)` pairs go."""
    match = _PER_LAYER.fullmatch(axis_name)
    if match is None:
        return False
    return int(match[1]) in layers or (int(match[1]), BRANCH_OF[match[2]]) in branches


def first_change(structure: Structure, plan: PruningPlan) -> tuple[int, int]:
    """`(layer, branch)` of the first thing that the plan changes; earlier layers are unchanged."""
    if "hidden" in plan.kept_indices:
        return 0, 0
    changes = [(layer, 0) for layer in plan.removed_layers]
    changes += [(layer, BRANCHES.index(branch)) for layer, branch in plan.removed_branches]  # type: ignore[arg-type]
    for name in plan.kept_indices:
        axis = structure.axes[name]
        if axis.layer is not None and axis.branch is not None:
            changes.append((axis.layer, BRANCHES.index(axis.branch)))
    return min(changes, default=(len(structure.layer_paths), 0))


def count_parameters(
    structure: Structure,
    widths: Widths,
    removed_layers: frozenset[int],
    removed_branches: frozenset[tuple[int, str]],
    budget: Counted,
) -> int:
    """Exact parameter count at `widths` without the removed layers and branches; tied parameters count once."""
    names = remaining_parameters(structure, removed_layers, removed_branches, budget)
    size = structure.size_in(budget)
    return sum(size(name, widths) for name in names)


def remaining_parameters(
    structure: Structure,
    removed_layers: frozenset[int],
    removed_branches: frozenset[tuple[int, str]],
    budget: Counted = "model",
) -> list[str]:
    """Names (in the dense model) of the parameters that `budget` counts and that do not go with a layer or branch."""

    def stays(name: str) -> bool:
        owner = structure.owners.get(name)
        return owner is None or not (owner.layer in removed_layers or (owner.layer, owner.branch) in removed_branches)

    return [name for name in structure.counted(budget) if stays(name)]


def _bits(name: str, text: object, num_units: object) -> tuple[int, ...]:
    """The inverse of `PruningPlan._as_json` for many units."""
    try:
        bits = base64.b64decode(text, validate=True)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: kept units must be bits in base 64 ({error}).") from error
    if type(num_units) is not int or len(bits) != -(-num_units // 8):
        raise PlanError(f"{name}: found {8 * len(bits)} bits of kept units for {num_units!r} units.")
    return tuple(8 * index + bit for index, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
