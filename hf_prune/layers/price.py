"""What a run with the layers on disk reads, writes and computes, counted before it starts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.config import (
    CONFIGS,
    LLMPrunerConfig,
    PolicyGradientConfig,
    PruneNetConfig,
    PruningConfig,
    selected_axes,
)
from hf_prune.layers.boundaries import MEMORY_BYTES
from hf_prune.layers.weights import is_on_disk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

GENERATION = 4
"""Plans that a search measures together."""
LEVELS = 8
"""Widths at which `curves` measures each axis, the least one included, evenly spaced."""
EPOCHS = 8
"""Of the training of layers in repair, at most."""
STEPS = 4
"""Of the step end to end in repair so many sizes are tried, about."""
ROLES = ("producer", "consumer")


@dataclass(frozen=True)
class Price:
    """Counted from shapes and settings; nothing is measured. Pruned sizes are those that the ratio asks for."""

    bytes_read: int
    """Of weights of the dense model's layers."""
    pruned_bytes_read: int
    """Of weights of pruned layers: of intermediate steps, of the step end to end, and by saving, to which they are on
    disk."""
    layer_bytes: int
    """Of pruned layers that go to disk on the way."""
    rewritten_bytes: int
    """Of pruned layers on disk that the step end to end writes once more, and of what it adds."""
    checkpoint_bytes: int
    """Of the weights of the pruned checkpoint."""
    operations: int
    """Floating point operations of forward and backward passes, two for each multiplication and addition; products of
    weights only, not those of attention."""
    gram_operations: int
    """Those of sums of products of inputs, in float32."""
    solving_operations: int
    """Those of factorisations and eliminations, in float64; the order of magnitude."""
    boundary_bytes: int
    """Of hidden states between layers that a backward pass or curves need: in memory, on disk where they are large."""
    held_bytes: int
    """Of hidden states that are held at the same time, those between layers aside: on the CPU, or if they are large in
    temporary files."""

    @property
    def bytes_written(self) -> int:
        """Of pruned layers on disk, of the checkpoint, and of hidden states that go to disk."""
        hidden = self.boundary_bytes if self.boundary_bytes > MEMORY_BYTES else 0
        return self.layer_bytes + self.rewritten_bytes + self.checkpoint_bytes + hidden

    @property
    def text(self) -> str:
        """One line for people."""
        computed = self.operations + self.gram_operations + self.solving_operations
        return (
            f"this run reads {_giga(self.bytes_read + self.pruned_bytes_read)} GB of weights, writes "
            f"{_giga(self.bytes_written)} GB, keeps {_giga(self.boundary_bytes + self.held_bytes)} GB of hidden states "
            f"and computes {computed / 1e12:,.1f} TFLOP"
        )


def price_of(
    structure: Structure,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    model: nn.Module,
    held_out: int = 0,
) -> Price:
    """The price of pruning a model, and of measuring both models on so many tokens (see `PruningResult`)."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    lengths = [length for batch in batches or () for length in [batch["input_ids"].shape[1]] * len(batch["input_ids"])]
    channels, itemsize = embedding.weight.shape[1], embedding.weight.element_size()
    return count_price(structure, config, lengths, channels, itemsize, held_out, on_disk=is_on_disk(model))


def count_price(
    structure: Structure,
    config: PruningConfig,
    lengths: Sequence[int],
    hidden_size: int,
    itemsize: int,
    held_out: int = 0,
    *,
    on_disk: bool = True,
) -> Price:
    """As `price_of`, from numbers.

    Of `float16` models and `search` more may be read: the scale of the loss is looked for, and plans are refused.

    Args:
        structure: of the dense model.
        config: what is asked.
        lengths: tokens of each calibration sample.
        hidden_size: channels of the residual stream.
        itemsize: bytes of a weight.
        held_out: tokens that perplexity of the dense and the pruned model is measured on.
        on_disk: whether the layers of the model are.
    """
    counts = _Counts(structure, config, list(lengths))
    dense, decoder = counts.layers, structure.num_parameters(budget="decoder")
    steps = [config.pruning_ratio * (step / config.num_steps) for step in range(1, config.num_steps + 1)]
    kept = [dense - round(ratio * decoder) for ratio in steps]
    repaired = config.repair != "none"

    scored = counts.scoring(config)
    walked = config.method in ("wanda", "reap", "llm_pruner", "obs", "policy_gradient")
    walked = walked or (isinstance(config, PruneNetConfig) and config.layer_weight == "update")
    probed = dense if walked else 0
    read = dense + scored + counts.allocating() + dense * (config.selection == "obs")  # a probe, and passes
    read += len(steps) * dense  # sliced, and perhaps repaired, layer by layer
    pruned_read = kept[-1] + sum(round((scored + probed) * size / dense) for size in kept[:-1])
    rewritten = 0
    if config.repairs_end_to_end:  # forward, backward, held-out text at first and after each step; written once more
        pruned_read += (4 + STEPS) * sum(kept)
        steps_bytes = 4 * sum(k * d * n for k, d, n, _ in counts.consumers)
        rewritten = sum(kept) * itemsize + len(kept) * steps_bytes if on_disk else 0
    if held_out:
        read, pruned_read = read + dense, pruned_read + kept[-1]
    outside = structure.num_parameters() - dense
    differentiated = config.method in ("llm_pruner", "obs") or config.repairs_end_to_end
    kept_between = counts.tokens if differentiated else 0
    kept_between = max(kept_between, counts.judging if config.allocation == "curves" else 0)
    boundary = kept_between * hidden_size * itemsize * (len(structure.layer_paths) + 1)

    operations, gram, solving = counts.computing(config)
    operations += 2 * held_out * (counts.active * (dense + kept[-1]) // dense + 2 * counts.head)
    gram, solving = gram * len(steps), solving * len(steps)
    if repaired:
        own = counts.tokens if config.repairs_with_data else 0
        operations += sum(2 * counts.active * own * (dense + size) // dense for size in kept)
        share, times = kept[-1] / dense, len(steps) * (1 + config.repairs_end_to_end)
        gram += round(times * own * share * counts.gram(share))
        solving += round(times * share**3 * counts.cubes())
    if config.repairs_by_training:  # forward and backward in every epoch, at most
        operations += sum(6 * EPOCHS * counts.tokens * counts.active * size // dense for size in kept)
    if config.repairs_end_to_end:  # forward, again, and backward; the logits of both models
        operations += sum(8 * counts.tokens * (counts.active * size // dense + counts.head) for size in kept)
    hidden = counts.tokens * hidden_size * itemsize
    widest = max((size for size, *_ in counts.consumers), default=0)
    # repair: hidden states of both models before the layer, the dense ones after it, and what each branch gave and
    # gives; the inputs of one consumer. A backward pass: the gradients
    held = 7 * hidden + counts.tokens * widest * itemsize if config.repairs_with_data else 2 * hidden
    return Price(
        bytes_read=read * itemsize,
        pruned_bytes_read=pruned_read * itemsize,
        layer_bytes=sum(kept) * itemsize,
        rewritten_bytes=rewritten,
        checkpoint_bytes=(kept[-1] + outside) * itemsize,
        operations=operations,
        gram_operations=gram,
        solving_operations=solving,
        boundary_bytes=boundary,
        held_bytes=held if counts.tokens else 0,
    )


def announce(price: Price) -> None:
    """Log a price; the command line shows it."""
    logger.info("%s", price.text)


class _Counts:
    """Parameters and operations of one model and calibration set."""

    def __init__(self, structure: Structure, config: PruningConfig, lengths: list[int]) -> None:
        self.structure, self.config, self.lengths, self.tokens = structure, config, lengths, sum(lengths)
        self.numel = {
            name: structure.numel(name)
            for name in structure.owners
            if name not in structure.aliases and name not in structure.buffers
        }
        self.layers = sum(self.numel.values())
        self.consumers: list[tuple[int, int, int, float]] = []
        """Inputs, outputs, matrices (experts) of each consumer of a selected axis, and which share a token meets."""
        found: set[str] = set()
        for axis in selected_axes(structure, config):
            for member in structure.members[axis.name]:
                name = member.parameter
                if name not in self.numel or axis.branch is None:
                    continue
                shape = structure.shape(name)
                if len(shape) < 2 or name in found:
                    continue
                found.add(name)
                number = shape[0] if len(shape) == 3 and member.dim > 0 and axis.kind == "mlp" else 1
                if member.role == "consumer":
                    inputs, met = shape[member.dim], structure.num_active(name) / self.numel[name]
                    self.consumers.append((inputs, self.numel[name] // (inputs * number), number, met))
        self.active = sum(structure.num_active(name) for name in self.numel)
        """Parameters of layers that a token meets."""
        self.judging = sum(lengths[: config.search_samples])
        """Tokens that plans of curves and of a search are judged by."""
        self.head = max((structure.numel(n) for n in structure.layouts if n not in structure.owners), default=0)

    def scoring(self, config: PruningConfig, lengths: list[int] | None = None) -> int:
        """Weights that a method reads, in numbers: passes over the layers, and single tensors."""
        axes = selected_axes(self.structure, config)
        if config.method == "magnitude":
            return self.sum({name for axis in axes for name in self.structure.group(axis)})
        if config.method == "reap":
            return self.layers
        if config.method == "wanda":
            return self.layers + self.sum(self.consuming(config))
        if config.method in ("llm_pruner", "obs"):
            return 2 * self.layers  # forward, backward
        if isinstance(config, PolicyGradientConfig):
            start = self.scoring(self.initial(config))
            return start + self.layers * config.policy_steps
        if isinstance(config, PruneNetConfig):
            members = [member for axis in axes for member in self.structure.members[axis.name]]
            names = [self.structure.aliases.get(m.parameter, m.parameter) for m in members if m.role in ROLES]
            rows = sum(self.numel.get(name, 0) for name in names if len(self.structure.layouts[name]) >= 2)
            trained = 2 if config.policy is None else 1
            return trained * rows + self.layers * (config.layer_weight == "update")
        return 0

    @staticmethod
    def initial(config: PolicyGradientConfig) -> PruningConfig:
        """The method that policies start from."""
        fields = ("axes", "layers", "protect", "seed", "min_units")
        return CONFIGS[config.init](config.pruning_ratio, **{name: getattr(config, name) for name in fields})

    def consuming(self, config: PruningConfig) -> set[str]:
        """Matrices that consume selected axes."""
        names: set[str] = set()
        for axis in selected_axes(self.structure, config):
            if axis.kind == "layer":
                every = {m.parameter for own in self.structure.members.values() for m in own if m.role == "consumer"}
                names |= set(self.structure.group(axis)) & every
            else:
                names |= {m.parameter for m in self.structure.members[axis.name] if m.role == "consumer"}
        return {name for name in names if len(self.structure.layouts[name]) >= 2}

    def allocating(self) -> int:
        """Weights that spectra, curves and a search read."""
        config, found = self.config, 0
        if config.allocation in ("spectral", "search"):
            decoder = self.structure.counted("decoder")
            found += self.sum({name for name in decoder if len(self.structure.layouts[name]) >= 2})
        if config.compares_outputs:
            first = 2 + config.repairs_with_data  # the dense model, the starts, sums for a preview of repair
            at_once = LEVELS if config.allocation == "curves" else GENERATION
            found += self.layers * config.num_steps * (first + math.ceil(self.compared() / at_once))
        return found

    def compared(self) -> int:
        """Plans whose outputs are compared with the dense model's, at most."""
        curves = self.config.allocation == "curves"
        return (
            1 + LEVELS * len(selected_axes(self.structure, self.config)) if curves else self.config.search_evaluations
        )

    def computing(self, config: PruningConfig) -> tuple[int, int, int]:
        """Operations of passes, of sums of products, and of factorisations, but for repair."""
        per_token, gram, solving = 2 * self.active, 0, 0
        if isinstance(config, PolicyGradientConfig):
            masks = config.num_masks + (config.reward == "kl")
            length = max(self.lengths, default=0)
            rows = config.policy_steps * config.windows_per_step * masks
            first = self.initial(config)
            share = min(1.0, config.init_samples / max(1, len(self.lengths)))
            start = round(share * self.computing(first)[0])
            return start + (per_token + 2 * self.head) * rows * length, 0, 0
        by_weight = isinstance(config, LLMPrunerConfig) and config.criterion != "fisher"
        passes = {"wanda": 1, "reap": 2, "llm_pruner": 4 if by_weight else 3, "obs": 3}.get(config.method, 0)
        operations = per_token * self.tokens * passes
        if config.method in ("llm_pruner", "obs"):
            operations += 4 * self.head * self.tokens
        if config.method == "obs" or config.selection == "obs":
            times = (config.method == "obs") + (config.selection == "obs")
            gram, solving = times * round(self.tokens * self.gram(1.0, 0)), times * self.cubes()
            operations += per_token * self.tokens * (config.selection == "obs")
        operations *= config.num_steps if config.selection == "scores" else 1
        if config.compares_outputs:
            heads = runs = float(self.compared() + 1)
            if config.allocation == "curves":  # each plan runs from the layer of its axis on
                number = len(self.structure.layer_paths)
                axes = selected_axes(self.structure, config)
                runs -= LEVELS * sum(axis.layer or 0 for axis in axes) / number
            operations += round((per_token * runs + 2 * self.head * heads) * self.judging * config.num_steps)
        return operations, gram, solving

    def gram(self, share: float, outputs: int = 1) -> float:
        """Operations per token of Σ x xᵀ (blocks up to the diagonal: 5/8 of it) and perhaps Σ x tᵀ."""
        found = 0.0
        for inputs, given, number, met in self.consumers:
            found += met * number * (1.25 * inputs * inputs * share + 2 * inputs * given * outputs)
        return found

    def cubes(self) -> int:
        """Operations of a factorisation, an inverse, and of bringing it and the weight up to date for all units."""
        return sum(n * (3 * k**3 + 2 * d * k * k) for k, d, n, _ in self.consumers)

    def sum(self, names: set[str]) -> int:
        """Weights of those that are in layers: the others are in memory."""
        return sum(self.numel.get(name, 0) for name in names)


def _giga(number: int) -> str:
    return f"{number / 1e9:,.2f}"
