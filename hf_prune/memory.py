"""Bytes that a model takes where it is served: weights, scales of quantised weights, and the key-value cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_prune.errors import BudgetError, ConfigError, StructureError
from hf_prune.layers.weights import to_bytes
from hf_prune.plan import remaining_parameters

if TYPE_CHECKING:
    from hf_prune.config import PruningConfig
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure
    from hf_prune.structure.layouts import Widths

MARGIN = 0.05
"""Share of the memory to fit into that is left for activations and what an engine allocates itself."""
GROUP = 32
"""Weights of a row that share a scale and a zero point of 16 bits each at 4 bits; at 8 bits a row shares 32 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.weights:,} bytes of weights + {self.cache:,} of cache = {self.total:,}"


def count_memory(
    structure: Structure,
    config: PruningConfig,
    widths: Widths | None = None,
    removed_layers: frozenset[int] = frozenset(),
    removed_branches: frozenset[tuple[int, str]] = frozenset(),
) -> Memory:
    """Bytes at `widths` (default: dense) without the removed layers and branches, as `config` asks to serve them.

    Args:
        structure: of the dense model, inferred with `cache=True`.
        config: its `bits`, `context` and `batch` count.
        widths: width of axes; one not named keeps all units.
        removed_layers: decoder layers that are gone.
        removed_branches: `(layer, "attention" | "mlp")` that are gone.

    Raises:
        StructureError: nothing is known of the model's cache.
    """
    names = remaining_parameters(structure, removed_layers, removed_branches)
    weights = sum(bytes_of(structure, name, config, widths) for name in names)
    return Memory(weights, cache_bytes(structure, config, widths, removed_layers, removed_branches))


def memory_of(plan: PruningPlan, structure: Structure) -> Memory:
    """`count_memory` for what a plan leaves."""
    return count_memory(structure, plan.config, plan.widths, plan.removed_layers, plan.removed_branches)


def bytes_of(structure: Structure, name: str, config: PruningConfig, widths: Widths | None = None) -> int:
    """Bytes of one parameter: matrices in decoder layers at `config.bits` with their scales, others at 16 or 32."""
    shape = structure.shape(name, widths)
    numel, bits = math.prod(shape), config.bits
    if bits >= 16 or name not in structure.owners or len(shape) < 2 or min(shape[-2:]) < 2:
        return numel * (4 if bits == 32 else 2)
    rows = numel // shape[-1]
    return numel + 4 * rows if bits == 8 else math.ceil(numel / 2) + 4 * rows * math.ceil(shape[-1] / GROUP)


def cache_bytes(
    structure: Structure,
    config: PruningConfig,
    widths: Widths | None = None,
    removed_layers: frozenset[int] = frozenset(),
    removed_branches: frozenset[tuple[int, str]] = frozenset(),
) -> int:
    """Bytes of the cache alone: see `count_memory`. States of one size count as in the dense model."""
    if structure.cache is None:
        raise StructureError(
            f"budget 'memory' found nothing known of the cache of this {structure.model_type} model: infer its "
            "structure with cache=True; if that was done, the model keeps no key-value cache: use another budget."
        )
    numel = 0
    for one in structure.cache:
        if one.layer in removed_layers or (one.layer, "attention") in removed_branches:
            continue
        tokens = min(config.context, one.most_tokens or config.context) if one.grows else 1
        units = 1 if one.axis is None else structure.axes[one.axis].num_units
        width = units if one.axis is None else (widths or {}).get(one.axis, units)
        numel += one.numel // units * width * tokens
    return config.batch * numel * (4 if config.bits == 32 else 2)


def fit_ratio(structure: Structure, fit: str, config: PruningConfig) -> float:
    """The ratio of budget `memory` at which the model fits into `fit` bytes (see `usable_bytes`).

    Raises:
        ConfigError: `fit` is not a size.
        BudgetError: the dense model fits.
    """
    dense, usable = count_memory(structure, config), usable_bytes(fit)
    if dense.total <= usable:
        raise BudgetError(f"nothing has to go: the dense model takes {dense.text}, and {fit} leaves {usable:,}.")
    return 1 - usable / dense.total


def usable_bytes(fit: str) -> int:
    """What `MARGIN` leaves of a size such as `8GB` or `7.5GiB`; `ConfigError` if it is none."""
    try:
        return math.floor(to_bytes(fit) * (1 - MARGIN))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"fit: found {fit!r}, expected bytes such as 8GB or 7.5GiB.") from error
