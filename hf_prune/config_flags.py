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
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from hf_prune.config import CONFIGS, PruningConfig
from hf_prune.config.checks import alternatives
from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_METHODS = tuple(name for name in CONFIGS if name != "custom")
_METAVARS = {
    "method": "|".join(_METHODS),
    "allocation": "NAME|JSON|FILE.json",
    "axes": "KIND,KIND",
    "layers": "4-29,31",
    "protect": "PATTERN",
    "targets": "TARGET,TARGET",
}
_FLAGS = {"targets": "--for"}
"""Fields whose flag has another name: theirs would be a word of Python."""


def config_flags() -> list[inspect.Parameter]:
    """One keyword parameter for typer per field of any configuration class; its value is `None` if not given."""
    owners: dict[str, list[str]] = {}
    for method, config_class in CONFIGS.items():
        for field in dataclasses.fields(config_class):
            owners.setdefault(field.name, []).append(method)
    return [_flag(name, CONFIGS[methods[0]], methods) for name, methods in owners.items()]


def _flag(name: str, config_class: type[PruningConfig], methods: list[str]) -> inspect.Parameter:
    hint = get_type_hints(config_class)[name]
    help_text = field_help(config_class)[name]
    default = next(field.default for field in dataclasses.fields(config_class) if field.name == name)
    if name == "method":
        help_text = "Method that scores the units."
    elif default is not dataclasses.MISSING and default not in (None, ()):
        shown = ",".join(default) if isinstance(default, tuple) else default
        help_text += f" Default: {shown}."
    if len(methods) < len(CONFIGS):
        help_text = f"Only {', '.join(methods)}: {help_text}"
    kind: Any = list[str] if name == "protect" else _kind(hint)
    flags = [_FLAGS[name]] if name in _FLAGS else []
    metavar = _METAVARS.get(name) or _choices(hint)
    annotation = Annotated[kind | None, typer.Option(*flags, help=help_text, metavar=metavar)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def read_config(path: Path | None, flags: Mapping[str, Any], preset: PruningConfig | None = None) -> PruningConfig:
    """The configuration of `preset`, overridden by the JSON file at `path`, and that by the `flags` that were given.

    Raises:
        ConfigError: the file is not readable JSON, no method is named, or a value is refused.
    """
    values = preset.to_dict() if preset is not None else {}
    values |= _read_fields(path) if path is not None else {}
    values |= {name: _value(name, value) for name, value in flags.items() if value not in (None, [])}
    if "method" not in values:
        raise ConfigError(f"no method was given: pass --method, one of {_METHODS}, or a --config that names one.")
    return PruningConfig.from_dict(values)


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
        "settings": {name: _value(name, value) for name, value in flags.items() if value not in (None, [])},
    }


def _value(name: str, value: Any) -> Any:
    """What a field takes, from what its flag gives."""
    if name == "allocation":
        return parse_allocation(value)
    if name == "layers":
        return parse_layers(value)
    if name in ("axes", "targets"):
        return tuple(kind.strip() for kind in value.split(","))
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


def _choices(hint: Any) -> str | None:
    """`a|b|c` for fields with fixed choices."""
    shown = {int: "N", NoneType: "none"}
    parts = [
        part
        for kind in alternatives(hint)
        for part in (get_args(kind) if get_origin(kind) is Literal else (shown.get(kind, ""),))
    ]
    return "|".join(parts) if len(parts) > 1 and all(parts) else None


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
