"""Command-line flags of the configuration fields, made from the fields: names, types, defaults and help are theirs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hf_prune.config import CONFIGS, LLMPrunerConfig, PruningConfig
from hf_prune.config.checks import alternatives, did_you_mean
from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNITS, METHOD, TEXT, RUN = "How much, of what", "Which units", "Calibration", "How it runs"
"""Panels of `--help`."""
_SHOWN = {
    "pruning_ratio": (UNITS, "Fraction to remove, above 0 and below 1.", "FRACTION"),
    "budget": (UNITS, "Of decoder, model, active, memory, ...", "NAME"),
    "axes": (UNITS, "mlp, attention, hidden, layer and others.", "KIND,KIND"),
    "layers": (UNITS, "Only these decoder layers, from 0.", "4-29,31"),
    "protect": (UNITS, "Axes that stay whole: layers.0.*, ...", "PATTERN"),
    "round_to": (UNITS, "Widths are multiples of it; auto, none.", "N"),
    "min_units": (UNITS, "Units that every axis keeps at least.", "N"),
    "targets": (UNITS, "For gguf, vllm, plain, int4 or tp=N.", "TARGET"),
    "method": (METHOD, "What scores units: see hf-prune methods.", "NAME"),
    "allocation": (METHOD, "uniform, global, curves, search, ...; JSON.", "NAME"),
    "repair": (METHOD, "least_squares, end_to_end, all, ...", "NAME"),
    "num_steps": (METHOD, "Prune in so many steps, scored anew each.", "N"),
    "seed": (METHOD, "Seed of everything random.", "N"),
    "num_samples": (TEXT, "Windows of text.", "N"),
    "seq_len": (TEXT, "Tokens of each window.", "N"),
}
"""Fields with a flag of their own → panel, help, what its value is called; the others are given by `--set`."""
_FLAGS = {"targets": "--for"}
"""Fields whose flag has another name: theirs would be a word of Python."""


def config_flags() -> list[inspect.Parameter]:
    """Keyword parameters for typer: one for each field with a flag of its own, `None` if not given, and `--set`."""
    kinds = _kinds()
    flags = [_flag(name, list[str] if name == "protect" else kinds[name], *shown) for name, shown in _SHOWN.items()]
    text = "All others: see hf-prune methods NAME."
    return [*flags, _flag("settings", list[str], METHOD, text, "NAME=VALUE", flag="--set")]


def _flag(name: str, kind: Any, panel: str, text: str, metavar: str, flag: str | None = None) -> inspect.Parameter:
    names = [flag or _FLAGS[name]] if flag or name in _FLAGS else []
    option = typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _kinds() -> dict[str, Any]:
    """Every field of any configuration class → the type that the command line reads it as."""
    classes = reversed(CONFIGS.values())
    return {name: _kind(hint) for known in classes for name, hint in get_type_hints(known).items() if name != "_"}


def read_config(path: Path | None, flags: Mapping[str, Any], preset: PruningConfig | None = None) -> PruningConfig:
    """The configuration of `preset`, overridden by the JSON file at `path`, and that by the `flags` that were given.

    Raises:
        ConfigError: the file is not readable JSON, no method is named, or a value is refused.
    """
    values = preset.to_dict() if preset is not None else {}
    values |= _read_fields(path) if path is not None else {}
    values |= read_flags(flags)
    if "method" not in values:
        methods = tuple(name for name in CONFIGS if name != "custom")
        raise ConfigError(f"no method was given: pass --method, one of {methods}, or a --config that names one.")
    return PruningConfig.from_dict(values)


def read_asked(
    model: str,
    flags: Mapping[str, Any],
    *,
    config: Path | None,
    preset: str | None,
    fit: str | None,
    vocabulary: list[str] | None,
    where: dict[str, Any],
) -> PruningConfig:
    """The configuration that flags, file, preset or size ask for; of the model only its config is read.

    Raises:
        ConfigError: two of them say how much goes, or a value is refused.
    """
    fields = dict(flags)
    if fit is not None:
        if fields["pruning_ratio"] is not None or fields["budget"] is not None:
            raise ConfigError("--fit says how much goes: leave out --pruning-ratio and --budget.")
        fields |= {"pruning_ratio": 0.5, "budget": "memory"}
    elif vocabulary and not any((config, preset, fields["method"], fields["pruning_ratio"])):
        fields |= {"pruning_ratio": 0.0, "method": "custom"}  # nothing else goes
    if preset is None and fit is None:
        return read_config(config, fields)
    if preset is not None and fields.get("pruning_ratio") is None:
        raise ConfigError("--preset needs --pruning-ratio: the fraction to remove, above 0 and below 1.")
    from hf_prune.loading import load_config
    from hf_prune.memory import fit_ratio
    from hf_prune.structure.inference import infer_structure

    described, named = load_config(model, **where), None
    if preset is not None:
        num_hidden_layers = described.get_text_config().num_hidden_layers
        named = LLMPrunerConfig.preset(preset, fields["pruning_ratio"], num_hidden_layers)
    chosen = read_config(config, fields, named)
    if fit is None:
        return chosen
    structure = infer_structure(described, cache=True)
    return dataclasses.replace(chosen, pruning_ratio=fit_ratio(structure, fit, chosen))


def read_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given: by their own flags, or as `name=value` in `flags["settings"]`.

    Raises:
        ConfigError: a setting without `=`, of an unknown name, or given twice; or a value that cannot be read.
    """
    values = {
        name: _value(name, value) for name, value in flags.items() if name != "settings" and value not in (None, [])
    }
    kinds = _kinds()
    for text in flags.get("settings") or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in kinds:
            raise ConfigError(
                f"--set: found {text!r}, expected a setting and its value, as search_samples=32."
                f"{did_you_mean(name, kinds)} `hf-prune methods NAME` lists all."
            )
        if name in values:
            raise ConfigError(f"{name} is given twice: by its flag and by --set, or by --set twice.")
        values[name] = _value(name, _read_number(name, value.strip(), kinds[name]))
    return values


def _read_number(name: str, text: str, kind: type) -> Any:
    """`text` as the number or switch that the field takes; other texts as they are."""
    if kind not in (int, float, bool):
        return None if text == "none" and name != "round_to" and "None" in str(kind) else text
    try:
        return json.loads(text.lower())
    except ValueError as error:
        expected = "true or false" if kind is bool else "a number"
        raise ConfigError(f"{name}: found {text!r}, expected {expected}.") from error


def read_sweep(
    methods: str, ratios: str, allocations: Sequence[str], repairs: str, flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `sweep` in the flags of its command.

    Raises:
        ConfigError: a ratio that is no number, or a value that cannot be read.
    """
    try:
        numbers = [float(ratio) for ratio in ratios.split(",")]
    except ValueError as error:
        raise ConfigError(f"ratios: found {ratios!r}, expected numbers such as 0.2,0.3,0.5.") from error
    names = [part for text in allocations for part in ([text] if "{" in text else text.split(","))]
    return {
        "methods": [name.strip() for name in methods.split(",")],
        "ratios": numbers,
        "allocations": [parse_allocation(name.strip()) for name in names],
        "repairs": [name.strip() for name in repairs.split(",") if name.strip()],
        "settings": read_flags(flags),
    }


def _value(name: str, value: Any) -> Any:
    """What a field takes, from what its flag gives."""
    if name == "allocation":
        return parse_allocation(value)
    if name == "round_to" and value != "auto":
        if value != "none" and not value.isdecimal():
            raise ConfigError(f"round_to: found {value!r}, expected a whole number from 1, auto or none.")
        return None if value == "none" else int(value)
    return value


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} is not a readable JSON file: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds a JSON {type(values).__name__}, expected an object of fields.")
    return values


def _kind(hint: Any) -> type:
    """The type that typer parses: numbers and switches as such, everything else as text."""
    kinds = [kind for kind in alternatives(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool) else str


def parse_allocation(text: str) -> Any:
    """Read an allocation: a name, a JSON object of weights, or the name of a `.json` file that holds one.

    Raises:
        ConfigError: JSON that cannot be read.
    """
    if not text.lstrip().startswith("{") and not text.endswith(".json"):
        return text
    try:
        return json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'allocation: {text!r} is not readable JSON ({error}), expected {{"mlp": 2, "attention": 1}}.'
        ) from error


def describe_methods() -> list[dict[str, str]]:
    """A row for each method: what it does, what it costs, and the defaults in which it differs from others."""
    return [
        {
            "method": name,
            "what": str(inspect.getdoc(known)).split("\n\n", 1)[0].replace("\n", " "),
            "cost": known.cost,
            "allocation": str(known.__dataclass_fields__["allocation"].default),
            "repair": str(known.__dataclass_fields__["repair"].default),
        }
        for name, known in CONFIGS.items()
        if name != "custom"
    ]


def describe_settings(method: str) -> list[dict[str, str]]:
    """A row for each setting of `method`: its flag, its default for this method, and what it means.

    Raises:
        ConfigError: no such method.
    """
    if method not in CONFIGS:
        raise ConfigError(f"no method {method!r}, expected one of {list(CONFIGS)}.{did_you_mean(method, CONFIGS)}")
    meanings, rows = field_help(CONFIGS[method]), []
    for field in dataclasses.fields(CONFIGS[method]):
        if field.name == "method":
            continue
        flag = _FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
        default = "" if field.default is dataclasses.MISSING else field.default
        rows.append(
            {
                "setting": flag if field.name in _SHOWN else f"--set {field.name}=",
                "default": ",".join(default) if isinstance(default, tuple) else str(default),
                "meaning": meanings[field.name],
            }
        )
    return rows


def field_help(config_class: type) -> dict[str, str]:
    """The docstring under each field of `config_class`, on one line: the command line shows them as help."""
    found = [_own_help(base) for base in reversed(config_class.__mro__[:-1])]
    return {name: text for own in found for name, text in own.items()}


@functools.cache
def _own_help(config_class: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, following in itertools.pairwise(definition.body):
        match field, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
