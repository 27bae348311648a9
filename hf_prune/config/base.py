"""`PruningConfig`: what is asked of a pruning run. JSON round trip; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from hf_prune.errors import ConfigError

Budget = Literal["decoder", "model", "units"]
Allocation = Literal["uniform", "global"]
AxisKind = Literal["mlp", "attention", "hidden", "layer", "layer_attention", "layer_mlp"]


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
        from hf_prune.config import CONFIGS

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


def _is_tuple_of(value: object, kind: type) -> bool:
    return isinstance(value, tuple) and all(type(item) is kind for item in value)
