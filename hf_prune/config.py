"""What is asked of a pruning run: `PruningConfig`, one subclass per method, JSON round trip, unknown keys refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_prune.errors import ConfigError, StructureError

if TYPE_CHECKING:
    from hf_prune.structure.structure import Axis, Structure

Budget = Literal["decoder", "model", "units"]
Allocation = Literal["uniform", "global"]
AxisKind = Literal["mlp", "attention", "hidden", "layer", "layer_attention", "layer_mlp"]

LAYER_AXES: dict[str, str] = {"layer": "layers", "layer_attention": "layers.attention", "layer_mlp": "layers.mlp"}
"""Kinds whose units are decoder layers (or one branch of them) → name of the axis in the structure."""


@dataclass(frozen=True)
class PruningConfig:
    """What to remove, and how much. Frozen; every value is checked when it is made.

    This class is for scores that the caller brings; each method has its own subclass.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    pruning_ratio: float
    """Fraction to remove, above 0 and below 1, of what `budget` names."""
    _: KW_ONLY
    method: str = "custom"
    """Name of the method that scores the units; fixed by the class."""
    budget: Budget = "decoder"
    """What the ratio is a fraction of: `decoder` (attention and MLP parameters of all decoder layers), `model` (all
    parameters) or `units` (units of each touched axis)."""
    axes: tuple[AxisKind, ...] = ("mlp", "attention")
    """Kinds of axes to prune: `mlp` channels, `attention` KV groups, `hidden` channels, whole decoder layers
    (`layer`), or only their attention or MLP (`layer_attention`, `layer_mlp`)."""
    allocation: Allocation = "uniform"
    """`uniform`: the same fraction from every axis; `global`: scores per parameter removed compete across axes."""
    round_to: int | Literal["auto"] | None = None
    """Pruned MLP and hidden widths become multiples of this; `auto` picks the largest of 128, 64, 32, 16, 8 that is
    at most 1/32 of the axis. Attention groups and layers go one by one whatever this says."""
    min_units: int = 1
    """Units that every axis keeps at least (rounded up to `round_to`), 1 or more."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that may lose units, counted from 0 (default: all). Does not restrict the `hidden` axis."""
    protect: tuple[str, ...] = ()
    """Patterns (`*`, `?`, `[...]`) of axes that stay whole, such as `layers.0.*`; they protect whole layers too."""
    seed: int = 0
    """Seed of everything random, 0 or more."""
    num_samples: int = 128
    """Calibration windows, 1 or more."""
    seq_len: int = 256
    """Tokens of each calibration window, 1 or more."""
    num_steps: int = 1
    """Prune in so many equal steps, scores recomputed on the pruned model before each."""

    def __post_init__(self) -> None:
        for name in ("axes", "layers", "protect"):  # lists, as JSON gives them, become tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        own_method = type(self).__dataclass_fields__["method"].default
        self._check(self.method == own_method, "method", f"{own_method!r} (the method of {type(self).__name__})")
        ratio = self.pruning_ratio
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        self._check(number and math.isfinite(ratio) and 0 < ratio < 1, "pruning_ratio", "a number above 0 and below 1")
        self._check_choice("budget", get_args(Budget))
        self._check_choice("allocation", get_args(Allocation))
        kinds = get_args(AxisKind)
        known = _is_tuple_of(self.axes, str) and len(self.axes) > 0 and all(kind in kinds for kind in self.axes)
        self._check(known and len(set(self.axes)) == len(self.axes), "axes", f"one or more different kinds of {kinds}")
        if self.round_to not in (None, "auto"):
            self._check_int("round_to", 1, 'or "auto" or None')
        for name, lowest in (("min_units", 1), ("seed", 0), ("num_samples", 1), ("seq_len", 1), ("num_steps", 1)):
            self._check_int(name, lowest)
        if self.layers is not None:
            valid = _is_tuple_of(self.layers, int) and len(self.layers) > 0 and min(self.layers) >= 0
            self._check(valid and len(set(self.layers)) == len(self.layers), "layers", "different layer numbers from 0")
        self._check(_is_tuple_of(self.protect, str) and all(self.protect), "protect", "a tuple of non-empty patterns")

    def _check(self, valid: bool, name: str, expected: str) -> None:
        if not valid:
            raise ConfigError(f"{name}: found {getattr(self, name)!r}, expected {expected}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        self._check(isinstance(value, str) and value in choices, name, f"one of {choices}")

    def _check_int(self, name: str, lowest: int, otherwise: str = "") -> None:
        value = getattr(self, name)
        self._check(type(value) is int and value >= lowest, name, f"a whole number from {lowest} {otherwise}".strip())

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `method` says which class reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningConfig:
        """Make the configuration whose class `values["method"]` names (without the key: `cls`).

        Raises:
            ConfigError: an unknown method or key, or a value that the class refuses.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a pruning configuration is a JSON object of fields, found {type(values).__name__}.")
        method = values.get("method", cls.__dataclass_fields__["method"].default)
        config_class = CONFIGS.get(method) if isinstance(method, str) else None
        if config_class is None or not issubclass(config_class, cls):
            allowed = [name for name, known in CONFIGS.items() if issubclass(known, cls)]
            raise ConfigError(f"method: found {method!r}, expected one of {allowed}.")
        known_keys = [field.name for field in dataclasses.fields(config_class)]
        unknown = [key for key in values if key not in known_keys]
        if unknown:
            raise ConfigError(f"unknown keys {unknown} for method {method!r}; expected keys are {known_keys}.")
        if "pruning_ratio" not in values:
            raise ConfigError("pruning_ratio is missing: give the fraction to remove, above 0 and below 1.")
        return config_class(**values)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """`from_dict` of JSON text; `ConfigError` if the text is not JSON."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a pruning configuration must be JSON: {error}.") from error
        return cls.from_dict(values)


@dataclass(frozen=True)
class RandomConfig(PruningConfig):
    """Random scores, drawn from `seed`: the baseline that every method has to beat."""

    method: str = "random"
    """Name of the method that scores the units; fixed by the class."""


@dataclass(frozen=True)
class MagnitudeConfig(PruningConfig):
    """Norm of all weights of a group."""

    method: str = "magnitude"
    """Name of the method that scores the units; fixed by the class."""
    norm: Literal["l1", "l2"] = "l2"
    """Norm over the whole group: sum of absolute values (`l1`) or root of the sum of squares (`l2`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("norm", ("l1", "l2"))


@dataclass(frozen=True)
class WandaConfig(PruningConfig):
    """Weight times input norm, summed over each unit (Wanda, arXiv 2306.11695, eq. 1, by structures). Calibrated."""

    method: str = "wanda"
    """Name of the method that scores the units; fixed by the class."""


@dataclass(frozen=True)
class LLMPrunerConfig(PruningConfig):
    """Gradient importance of coupled groups (LLM-Pruner, arXiv 2305.11627). Calibrated.

    The defaults are our recommended preset; `preset` gives the paper's.
    """

    method: str = "llm_pruner"
    """Name of the method that scores the units; fixed by the class."""
    allocation: Allocation = "global"
    """`uniform`: the same fraction from every axis; `global`: scores per parameter removed compete across axes."""
    criterion: Literal["vector", "first_order", "second_order", "mixed", "fisher"] = "fisher"
    """Importance of a unit: the paper's `vector` |Σ w·g|, `first_order` Σ|w·g|, `second_order` Σ w²·F, `mixed`
    Σ|w·g − ½·w²·F|, or our `fisher`: Fisher information of the unit's mask, from activations alone."""
    aggregation: Literal["sum", "mean", "max", "product", "last", "first"] = "sum"
    """How the scores of a group's matrices become one: `last` is the consumer (`down_proj`, `o_proj`) alone, `first`
    the first matrix. Not used by `fisher`, which has one score per unit."""
    normalisation: Literal["mean", "sum"] = "mean"
    """F is the `mean` (the released code) or the `sum` (the paper, eq. 5) of squared sample gradients; matters to
    `mixed` only, whose two terms it weighs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("criterion", ("vector", "first_order", "second_order", "mixed", "fisher"))
        self._check_choice("aggregation", ("sum", "mean", "max", "product", "last", "first"))
        self._check_choice("normalisation", ("mean", "sum"))

    @classmethod
    def preset(cls, name: str, pruning_ratio: float, num_hidden_layers: int) -> LLMPrunerConfig:
        """A named setting.

        Args:
            name: `paper_block`: Element¹ on KV groups and MLP channels, the same ratio of units in every layer but the
                first 4 and last 2; `paper_channel`: Element¹ on the hidden axis; `paper_vector`, `paper_second_order`:
                `paper_block` with those criteria. 10 samples of 64 tokens, seed 42, as in the released runs.
                `recommended`: Fisher information of the unit masks, global, 128 samples of 256 tokens.
            pruning_ratio: of units for the paper's presets (0.25 gives its "20 %"), of decoder parameters for ours.
            num_hidden_layers: decoder layers of the model; the paper's presets need more than 6.

        Raises:
            ConfigError: an unknown name, or too few layers.
        """
        if name == "recommended":
            return cls(pruning_ratio)
        criteria = {
            "paper_block": "first_order",
            "paper_channel": "first_order",
            "paper_vector": "vector",
            "paper_second_order": "second_order",
        }
        if name not in criteria:
            raise ConfigError(f"preset: found {name!r}, expected 'recommended' or one of {tuple(criteria)}.")
        if num_hidden_layers <= 6:
            raise ConfigError(f"preset {name!r} protects 6 layers; found a model with {num_hidden_layers}.")
        channel = name == "paper_channel"
        return cls(
            pruning_ratio,
            budget="units",
            allocation="uniform",
            axes=("hidden",) if channel else ("mlp", "attention"),
            layers=None if channel else tuple(range(4, num_hidden_layers - 2)),
            criterion=criteria[name],  # type: ignore[arg-type]
            num_samples=10,
            seq_len=64,
            seed=42,
        )


CONFIGS: dict[str, type[PruningConfig]] = {
    "custom": PruningConfig,
    "random": RandomConfig,
    "magnitude": MagnitudeConfig,
    "wanda": WandaConfig,
    "llm_pruner": LLMPrunerConfig,
}
"""Method → its configuration class."""


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layer numbers from ranges, both ends included: `"4-6,9"` → `(4, 5, 6, 9)`.

    Raises:
        ConfigError: something else than numbers and rising ranges, separated by commas.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first.strip(), last.strip() if dash else first.strip()]
        if not all(end.isascii() and end.isdigit() for end in ends) or int(ends[0]) > int(ends[1]):
            raise ConfigError(f'layers: found {part!r} in {text!r}, expected numbers and ranges such as "4-29,31".')
        layers.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(layers))


def field_help(config_class: type[PruningConfig]) -> dict[str, str]:
    """The docstring under each field of `config_class`, on one line: the command line shows them as help."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[statement.target.id] = " ".join(text.value.split())
    return found


def selected_axes(structure: Structure, config: PruningConfig) -> list[Axis]:
    """The axes that `config` lets lose units: of its kinds, prunable, in its layers, not protected.

    Raises:
        StructureError: the model has no axis of a kind asked for, or all of them are blocked.
        ConfigError: `layers` names a layer, or `protect` an axis, that the model does not have.
    """
    _check_names(structure, config)
    selected: list[Axis] = []
    for kind in config.axes:
        candidates = axes_of_kind(structure, kind)
        if not candidates:
            raise StructureError(
                f"this {structure.model_type} model has no axis of kind {kind!r}: none was found. "
                f"Ask for other axes than {config.axes}."
            )
        if not any(axis.prunable for axis in candidates):
            reasons = sorted({axis.blocker or f"it has {axis.num_units} unit" for axis in candidates})
            raise StructureError(
                f"no axis of kind {kind!r} of this {structure.model_type} model can be pruned: {'; '.join(reasons)}. "
                f"Ask for other axes than {config.axes}."
            )
        selected += [axis for axis in candidates if axis.prunable and _is_selected(axis, config)]
    return selected


def axes_of_kind(structure: Structure, kind: AxisKind) -> list[Axis]:
    """All axes of `structure` that a kind of `PruningConfig.axes` means, prunable or not, in layer order."""
    if kind in LAYER_AXES:
        return [structure.axes[LAYER_AXES[kind]]] if LAYER_AXES[kind] in structure.axes else []
    return [axis for axis in structure.axes.values() if axis.kind == kind]


def is_protected(config: PruningConfig, *names: str) -> bool:
    """Whether a pattern of `config.protect` matches one of `names`."""
    return any(fnmatchcase(name, pattern) for pattern in config.protect for name in names)


def layer_unit_names(structure: Structure, axis_name: str, layer: int) -> list[str]:
    """What one unit of a layer axis goes by in `protect`: the layer, its branches, and the axes that go with it."""
    inside = [axis.name for axis in structure.axes.values() if axis.layer == layer]
    branches = [f"layers.{layer}.attention", f"layers.{layer}.mlp"]
    if axis_name == "layers":
        return [f"layers.{layer}", *branches, *inside]
    branch = f"layers.{layer}.{axis_name.partition('.')[2]}"
    return [branch, *(name for name in inside if name == branch or name.startswith(branch + "."))]


def _is_selected(axis: Axis, config: PruningConfig) -> bool:
    outside = axis.layer is not None and config.layers is not None and axis.layer not in config.layers
    return not outside and not is_protected(config, axis.name)


def _check_names(structure: Structure, config: PruningConfig) -> None:
    num_layers = len(structure.layer_paths)
    if config.layers is not None and max(config.layers) >= num_layers:
        raise ConfigError(
            f"layers: found {max(config.layers)}, expected 0 to {num_layers - 1}: so many has this model."
        )
    names = {name for layer in range(num_layers) for name in layer_unit_names(structure, "layers", layer)}
    names.update(structure.axes)
    for pattern in config.protect:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"protect: {pattern!r} matches none of the axes: {', '.join(sorted(names)[:8])}, ...")


def _is_tuple_of(value: object, kind: type) -> bool:
    return isinstance(value, tuple) and all(type(item) is kind for item in value)
