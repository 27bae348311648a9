"""`PruningConfig`: what is asked of a pruning run. JSON round trip; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from hf_prune.config.checks import Range, check_fields, did_you_mean, parse_layers
from hf_prune.config.targets import SPELLING, Target, together
from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

Budget = Literal["decoder", "model", "active", "units", "latency", "memory"]
AllocationName = Literal["uniform", "global", "spectral", "curves", "search"]
Allocation = AllocationName | Mapping[str, float] | tuple[tuple[str, float], ...]
Standardise = Literal["none", "sum", "mean", "zscore"]
Repair = Literal["none", "least_squares", "end_to_end", "train", "all", "data_free"]
Selection = Literal["scores", "obs"]
RepairTarget = Literal["own", "asymmetric", "residual"]
AxisKind = Literal[
    "mlp",
    "attention",
    "query_heads",
    "expert_channels",
    "expert",
    "hidden",
    "layer",
    "layer_attention",
    "layer_mlp",
]


@dataclass(frozen=True)
class PruningConfig:
    """What to remove, and how much. Frozen; every value is checked when it is made.

    Each method has its own subclass, which `method` chooses: `PruningConfig(0.3, method="wanda")` is a `WandaConfig`.
    Without it the configuration is for scores that the caller brings.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    cost: ClassVar[str] = "none"
    """What scoring takes, in words."""

    pruning_ratio: Annotated[float, Range(0, 1)]
    """Fraction to remove, above 0 and below 1, of what `budget` names; 0 (in this class alone) where nothing but tokens
    of the vocabulary are to go."""
    _: KW_ONLY
    method: str = "custom"
    """Name of the method that scores the units; fixed by the class."""
    budget: Budget = "decoder"
    """What the ratio is a fraction of: `decoder` (attention and MLP parameters of all decoder layers), `model` (all
    parameters), `active` (those of the decoder that each token meets: of experts, as many as it is sent to), `units`
    (units of each touched axis), `latency` (predicted seconds of a request: prompt and new tokens) or `memory` (bytes
    of weights and key-value cache at `bits`, `context` and `batch`)."""
    axes: tuple[AxisKind, ...] = ("mlp", "attention")
    """Kinds of axes to prune: `mlp` channels (of stacked experts the same ones of all), `attention` KV groups with
    their query heads, `query_heads` (the same number in each KV group, each its own), `expert_channels` (the same
    number in each expert, each its own), whole experts (`expert`), `hidden` channels, whole decoder layers (`layer`),
    or only their attention or MLP (`layer_attention`, `layer_mlp`)."""
    allocation: Allocation = "uniform"
    """`uniform`: the same fraction from every axis; `global`: scores per parameter removed compete across axes;
    `spectral`: layers with heavier eigenvalue tails keep more; `curves`: what the output loses by each axis alone, per
    parameter, competes across axes; `search`: widths that change the output least; or a JSON object of weights,
    `{"mlp": 2, "layers.*.attention": 1}`: the fraction of a kind as a whole, or of each axis that a pattern matches,
    relative to each other."""
    standardise: Standardise = "none"
    """How scores of different axes are made comparable where they compete: not at all, score per parameter (`none`);
    share of the axis's total score, per parameter (`sum`); score over the mean (`mean`), or deviations from the mean
    (`zscore`), of its axis."""
    spectral_epsilon: Annotated[float, Range(0, 1)] = 0.3
    """Spread of `spectral`: layers lose 1 − ε to 1 + ε of the mean fraction; 0 or more, below 1."""
    search_evaluations: Annotated[int, Range(1)] = 200
    """Plans that `search` tries, 1 or more: forward passes over its calibration windows."""
    search_samples: Annotated[int, Range(1)] = 16
    """Calibration windows on which `search` and `curves` compare plans, 1 or more."""
    round_to: Annotated[int, Range(1)] | Literal["auto"] | None = None
    """Pruned MLP and hidden widths become multiples of this; `auto` picks the largest of 128, 64, 32, 16, 8 that is
    at most 1/32 of the axis. Attention groups and layers go one by one whatever this says."""
    min_units: Annotated[int, Range(1)] = 1
    """Units that every axis keeps at least (rounded up to `round_to`), 1 or more."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that may lose units, counted from 0, or a text such as "4-29,31" (default: all). Does not
    restrict the `hidden` axis."""
    targets: tuple[str, ...] = ()
    """Engines and formats that must be able to serve the result: `gguf`, `vllm`, `plain` (an ordinary checkpoint),
    `int4`, `tp=N` (tensor parallel on N devices); what one of them cannot serve is not done."""
    context: Annotated[int, Range(1)] = 4096
    """Budget `memory`: tokens in the cache of each sequence, 1 or more."""
    batch: Annotated[int, Range(1)] = 1
    """Budget `memory`: sequences at a time, 1 or more."""
    bits: int = 16
    """Budget `memory`: bits of each weight in the matrices of decoder layers: 4, 8, 16 or 32; scales come on
    top (see `memory.GROUP`), and the rest and the cache have 16 (at 32 bits all have 32)."""
    protect: tuple[str, ...] = ()
    """Patterns (`*`, `?`, `[...]`) of axes that stay whole, such as `layers.0.*`; they protect whole layers too."""
    seed: Annotated[int, Range(0)] = 0
    """Seed of everything random, 0 or more."""
    num_samples: Annotated[int, Range(1)] = 128
    """Calibration windows, 1 or more."""
    seq_len: Annotated[int, Range(1)] = 256
    """Tokens of each calibration window, 1 or more."""
    num_steps: Annotated[int, Range(1)] = 1
    """Prune in so many equal steps, scores recomputed on the pruned (and, where asked, repaired) model before each."""
    selection: Selection = "scores"
    """Which units stay on an axis of a given width: the best `scores`, or the ones that repair can least do without
    (`obs`, by calibration data; the scores then decide only the widths)."""
    repair: Repair = "none"
    """`least_squares`: refit the weights that read pruned units (`o_proj`, `down_proj`, experts) to the dense model on
    the calibration data, in closed form; `end_to_end`: then one step of all of them at once towards the dense model's
    predictions, as far as held-out batches gain; `train`: in its place train all weights of each layer towards the
    dense residual stream, as long as they gain; `all`: that, then the step of `end_to_end`; `data_free`: on noise in
    place of hidden states, worth less."""
    repair_target: RepairTarget = "residual"
    """What repaired weights are fitted to: the dense layer on the pruned model's hidden states (`own`), on the dense
    model's (`asymmetric`), or that and what the residual stream lacks so far (`residual`)."""
    repair_ridge: Annotated[float, Range(0)] = 1e-2
    """Pull towards the weights before repair, 0 or more: a fraction of the mean squared norm of their inputs."""

    def __new__(cls, *args: Any, method: object = None, **fields: Any) -> Self:
        """An instance of the class that `method` names, where this one names none."""
        from hf_prune.config import CONFIGS

        chosen = CONFIGS.get(method) if cls is PruningConfig and isinstance(method, str) else None
        return object.__new__(chosen or cls)  # type: ignore[return-value]  # a subclass

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", parse_layers(self.layers))
        for name in ("axes", "layers", "protect", "targets"):  # lists, as JSON gives them, and "mlp,attention"
            value = getattr(self, name)
            value = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.allocation, (Mapping, list)):
            object.__setattr__(self, "allocation", _pairs(self.allocation))
        if self.method != type(self).__dataclass_fields__["method"].default:
            raise _wrong_method(self.method, type(self))
        if isinstance(self.allocation, tuple):
            self._check(_are_weights(self.allocation), "allocation", "patterns of axes, each with a weight from 0")
        else:
            choices = get_args(AllocationName)
            self._check(self.allocation in choices, "allocation", f"one of {choices}", choices)
        check_fields(self)
        self._check(self.pruning_ratio > 0 or self.method == "custom", "pruning_ratio", "a number above 0 and below 1")
        kinds = get_args(AxisKind)
        known = _is_tuple_of(self.axes, str) and len(self.axes) > 0 and all(kind in kinds for kind in self.axes)
        self._check(
            known and len(set(self.axes)) == len(self.axes), "axes", f"one or more different kinds of {kinds}", kinds
        )
        self._check(_is_tuple_of(self.targets, str) and together(self.targets) is not None, "targets", SPELLING)
        for kind in sorted(self.target.keeps & set(self.axes)):
            raise ConfigError(f"axes: found {kind!r}, which {self.target.name} cannot serve: ask for other axes.")
        if self.budget == "latency":
            inner = {"query_heads", "expert_channels"} & set(self.axes)
            self._check(not inner, "axes", "none of query_heads and expert_channels where the budget is latency")
        if self.target.uniform & set(self.axes):
            self._check(self.allocation != "spectral", "allocation", f"one that {self.target.name} leaves equal widths")
        self._check(type(self.bits) is int and self.bits in (4, 8, 16, 32), "bits", "4, 8, 16 or 32")
        if self.repair == "data_free":
            self._check("hidden" not in self.axes, "repair", "'least_squares' with hidden channels")
        if self.repairs_end_to_end:
            expected = f"'asymmetric' or 'residual' with {self.repair!r}"
            self._check(self.repair_target != "own", "repair_target", expected)
        if self.repairs_with_data and "hidden" in self.axes:
            self._check(self.repair_target != "own", "repair_target", "'asymmetric' or 'residual' with hidden channels")
        if self.layers is not None:
            valid = _is_tuple_of(self.layers, int) and len(self.layers) > 0 and min(self.layers) >= 0
            self._check(valid and len(set(self.layers)) == len(self.layers), "layers", "different layer numbers from 0")
        self._check(_is_tuple_of(self.protect, str) and all(self.protect), "protect", "a tuple of non-empty patterns")

    def _check(self, valid: bool, name: str, expected: str, choices: Sequence[str] = ()) -> None:
        if not valid:
            value = getattr(self, name)
            wrong = [part for part in (value if isinstance(value, tuple) else (value,)) if part not in choices]
            hint = did_you_mean(wrong[0], choices) if wrong else ""
            raise ConfigError(f"{name}: found {value!r}, expected {expected}.{hint}")

    @property
    def target(self) -> Target:
        """What `targets` ask for, as one."""
        found = together(self.targets)
        assert found is not None  # checked
        return found

    @property
    def compares_outputs(self) -> bool:
        """Whether allocation runs the model on calibration text."""
        return self.allocation in ("curves", "search")

    @property
    def repairs_with_data(self) -> bool:
        """Whether repair needs calibration text."""
        return self.repair not in ("none", "data_free")

    @property
    def repairs_by_training(self) -> bool:
        """Whether repair trains all weights of each layer."""
        return self.repair in ("train", "all")

    @property
    def repairs_end_to_end(self) -> bool:
        """Whether repair ends with a step towards the dense model's predictions."""
        return self.repair in ("end_to_end", "all")

    @property
    def allocation_name(self) -> str:
        """The allocation in one word: `mapping` where it is one."""
        return self.allocation if isinstance(self.allocation, str) else "mapping"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `method` says which class reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.allocation, tuple):
            values["allocation"] = dict(self.allocation)
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
        from hf_prune.config import CONFIGS

        method = values.get("method", cls.__dataclass_fields__["method"].default)
        config_class = CONFIGS.get(method) if isinstance(method, str) else None
        if config_class is None or not issubclass(config_class, cls):
            raise _wrong_method(method, cls)
        known_keys = [field.name for field in dataclasses.fields(config_class)]
        unknown = [key for key in values if key not in known_keys]
        if unknown:
            hint = did_you_mean(unknown[0], known_keys)
            raise ConfigError(f"unknown keys {unknown} for method {method!r}; expected keys are {known_keys}.{hint}")
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


def _wrong_method(method: object, config_class: type[PruningConfig]) -> ConfigError:
    from hf_prune.config import CONFIGS

    allowed = [name for name, known in CONFIGS.items() if issubclass(known, config_class)]
    return ConfigError(f"method: found {method!r}, expected one of {allowed}.{did_you_mean(method, allowed)}")


def _is_tuple_of(value: object, kind: type) -> bool:
    return isinstance(value, tuple) and all(type(item) is kind for item in value)


def _pairs(weights: Mapping[str, float] | list[Any]) -> tuple[Any, ...]:
    """A mapping as pairs, which do not change; whatever else is in a list is left to the check."""
    items = list(weights.items()) if isinstance(weights, Mapping) else weights
    return tuple(tuple(item) if isinstance(item, (list, tuple)) else item for item in items)


def _are_weights(pairs: tuple[Any, ...]) -> bool:
    known = all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] for pair in pairs)
    if not known or len({name for name, _ in pairs}) != len(pairs):
        return False
    return all(Range(0).holds(weight) for _, weight in pairs) and any(weight > 0 for _, weight in pairs)
