"""Token ids in configs: which attributes hold them, and what they become when tokens go."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_prune.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_prune.plan import PruningPlan

_HOLDS_IDS = re.compile(r".*(token_ids?|token_index|words_ids|suppress_tokens)")
"""`eos_token_id`, `image_token_index`, `bad_words_ids`, `suppress_tokens`, ...: numbers, lists, lists of lists."""
_HIDES_IDS = ("sequence_bias", "forced_decoder_ids")
"""Attributes of generation configs in which ids are mixed with other numbers."""


def token_ids(values: dict[str, Any], num_tokens: int) -> set[int]:
    """All ids below `num_tokens` that a config, or a generation config, names; `values` as of `to_dict`."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    _changed(values, num_tokens, note)
    return found


def renumbered(config: Any, plan: PruningPlan) -> Any:
    """A copy of a config, or of a generation config, with the ids that tokens have once `plan` is applied.

    `vocab_size` changes with them, here and in configs inside. Ids that the model never embeds (-1) stay.

    Raises:
        PlanError: a token that the config names goes, or ids cannot be told from other numbers.
    """
    num_tokens, kept = plan.num_units["vocab"], plan.kept_indices["vocab"]
    values, new = config.to_dict(), {old: new for new, old in enumerate(kept)}
    for name in _HIDES_IDS:
        if values.get(name):
            raise PlanError(f"{name} names tokens, whose ids change when the vocabulary is pruned: set it to None.")
    if lost := sorted(token_ids(values, num_tokens) - new.keys()):
        raise PlanError(f"the plan removes the tokens {lost}, which {type(config).__name__} names. Keep them.")
    changed = type(config).from_dict(_changed(values, num_tokens, new.__getitem__, len(kept)))
    changed._name_or_path = getattr(config, "_name_or_path", "")
    return changed


def _changed(values: dict[str, Any], num_tokens: int, change: Callable[[int], int], size: int = 0) -> dict[str, Any]:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(str(key), inner) for key, inner in value.items()}
        if name == "vocab_size" and value == num_tokens:
            return size
        if not _HOLDS_IDS.fullmatch(name):
            return value
        if isinstance(value, (list, tuple)):
            return [of(name, inner) for inner in value]
        return change(value) if type(value) is int and 0 <= value < num_tokens else value

    return {name: of(name, value) for name, value in values.items()}
