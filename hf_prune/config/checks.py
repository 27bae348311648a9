"""Check the fields of a configuration against their annotations: types, choices (`Literal`) and ranges (`Range`)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Range:
    """Where a number may lie, for `Annotated[int, Range(1)]`."""

    lowest: float
    highest: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[)"
    """As in mathematics: `[` and `]` include the end."""

    def holds(self, value: object) -> bool:
        """Whether `value` is a finite number in the range."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        inside = self.lowest < value < self.highest
        return inside or (value == self.lowest and "[" in self.ends) or (value == self.highest and "]" in self.ends)

    def __str__(self) -> str:
        low, high = "from" if "[" in self.ends else "above", "up to" if "]" in self.ends else "below"
        return f"{low} {self.lowest}" + ("" if self.highest == math.inf else f" and {high} {self.highest}")


def check_fields(config: Any) -> None:
    """Check every field of a dataclass whose annotation says all: numbers with a `Range`, choices, texts, switches.

    Raises:
        ConfigError: a value that its annotation does not allow.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), alternatives(hints[field.name])
        if all(_is_checked(kind) for kind in kinds) and not any(_is_of(value, kind) for kind in kinds):
            expected = " or ".join(_in_words(kind) for kind in kinds)
            choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
            raise ConfigError(f"{field.name}: found {value!r}, expected {expected}.{did_you_mean(value, choices)}")


def did_you_mean(found: object, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the one of `choices` that `found` is like, or nothing."""
    like = difflib.get_close_matches(str(found), list(choices), n=1)
    return f" Did you mean {like[0]!r}?" if like else ""


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


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, or the one type."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _is_checked(kind: Any) -> bool:
    return kind in (NoneType, bool, str) or get_origin(kind) in (Literal, Annotated)


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is Annotated:
        number, bounds = get_args(kind)
        return bounds.holds(value) and (number is float or type(value) is int)
    return isinstance(value, kind) and value != ""


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return f"one of {choices}" if len(choices) > 1 else repr(choices[0])
    if get_origin(kind) is Annotated:
        number, bounds = get_args(kind)
        return f"a {'whole number' if number is int else 'number'} {bounds}"
    return {NoneType: "None", bool: "true or false", str: "a text"}[kind]


def ranges(layers: Sequence[int]) -> str:
    """Layer numbers in short, as `--layers` reads them: `0-3,7`."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
