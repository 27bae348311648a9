"""What a run reads, writes and computes, counted before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from hf_prune.config import PruningConfig
    from hf_prune.structure.structure import Structure


@dataclass(frozen=True)
class Price:
    """Counted from shapes and settings; nothing is measured."""

    bytes_read: int
    """Of weights, from where the model is."""
    bytes_written: int
    """Of pruned weights and of hidden states between layers."""
    operations: int
    """Floating point operations of forward and backward passes, two for each multiplication and addition."""
    boundary_bytes: int
    """Of hidden states that are kept at the same time."""

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"this run reads {_giga(self.bytes_read)} GB of weights, writes {_giga(self.bytes_written)} GB, keeps "
            f"{_giga(self.boundary_bytes)} GB of hidden states and computes {self.operations / 1e12:,.1f} TFLOP"
        )


def price_of(
    structure: Structure,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    model: nn.Module,
) -> Price:
    """The price of pruning a model on disk: every pass reads the model once."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = sum(batch["input_ids"].numel() for batch in batches or ())
    itemsize = embedding.weight.element_size()
    return count_price(structure, config, tokens, embedding.weight.shape[1], itemsize)


def count_price(structure: Structure, config: PruningConfig, tokens: int, hidden_size: int, itemsize: int) -> Price:
    """As `price_of`, from numbers.

    Args:
        structure: of the dense model.
        config: what is asked.
        tokens: of all calibration samples.
        hidden_size: channels of the residual stream.
        itemsize: bytes of a weight.
    """
    size = structure.num_parameters()
    learned = getattr(config, "policy_steps", 0)
    masks = getattr(config, "num_masks", 1)
    reads, passes, boundaries = {
        "wanda": (2, 1, 0),
        "llm_pruner": (2, 4, 1),
        "obs": (2, 4, 1),
        "magnitude": (1, 0, 0),
        "random": (0, 0, 0),
        "policy_gradient": (learned, 0, 0),
    }.get(config.method, (1, 0, 0))
    operations = 2 * size * tokens * passes
    if config.method == "policy_gradient":
        per_step = getattr(config, "windows_per_step", 1) * config.seq_len * masks
        operations = 2 * size * per_step * learned
    if config.allocation == "spectral":
        reads += 1
    if config.allocation == "search":
        reads += config.search_evaluations // 4 + 1
        operations += 2 * size * config.search_samples * config.seq_len * (config.search_evaluations + 1)
    if config.selection == "obs":
        reads, operations = reads + 1, operations + 2 * size * tokens
    kept = size - round(config.pruning_ratio * size)
    reads += 2  # the probe, and the pass that slices
    if config.repair == "least_squares":
        operations += 2 * (size + kept) * tokens
    steps = config.num_steps
    boundary_bytes = tokens * hidden_size * itemsize * (len(structure.layer_paths) + 1) * boundaries
    return Price(
        bytes_read=reads * steps * size * itemsize,
        bytes_written=2 * steps * kept * itemsize,
        operations=operations * steps,
        boundary_bytes=boundary_bytes,
    )


def _giga(number: int) -> str:
    return f"{number / 1e9:,.2f}"
