"""The configuration of each method without learning: `PruningConfig` and what the method adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hf_prune.config.base import Allocation, AxisKind, PruningConfig, Repair, Standardise
from hf_prune.config.checks import Range
from hf_prune.errors import ConfigError


@dataclass(frozen=True)
class RandomConfig(PruningConfig):
    """Random scores, drawn from `seed`: the baseline that every method has to beat."""

    cost = "nothing"
    method: str = "random"
    standardise: Standardise = "sum"
    """As in every configuration; this method's scores compare only inside an axis, hence `sum`."""


@dataclass(frozen=True)
class MagnitudeConfig(PruningConfig):
    """Norm of all weights of a group."""

    cost = "the weights once"
    method: str = "magnitude"
    standardise: Standardise = "sum"
    """As in every configuration; this method's scores compare only inside an axis, hence `sum`."""
    norm: Literal["l1", "l2"] = "l2"
    """Norm over the whole group: sum of absolute values (`l1`) or root of the sum of squares (`l2`)."""


@dataclass(frozen=True)
class WandaConfig(PruningConfig):
    """Weight times input norm, summed over each unit (Wanda, arXiv 2306.11695, eq. 1, by structures). Calibrated."""

    cost = "a forward pass over the text"
    method: str = "wanda"
    standardise: Standardise = "sum"
    """As in every configuration; this method's scores compare only inside an axis, hence `sum`."""


@dataclass(frozen=True)
class REAPConfig(PruningConfig):
    """What experts add to the tokens that are sent to them (REAP, arXiv 2510.13999). Whole experts only. Calibrated."""

    method: str = "reap"
    axes: tuple[AxisKind, ...] = ("expert",)
    """As in every configuration; this method scores experts only."""
    standardise: Standardise = "sum"
    """As in every configuration; this method's scores compare only inside an axis, hence `sum`."""
    criterion: Literal["mean", "sum", "frequency", "max"] = "mean"
    """Gate times norm of the output over the tokens that an expert gets: their `mean` (REAP), `sum` or `max`; or only
    their number (`frequency`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.axes == ("expert",), "axes", "('expert',), all that 'reap' scores")


@dataclass(frozen=True)
class OBSConfig(PruningConfig):
    """Loss increase from removing a unit after refitting its consumer (optimal brain surgeon). Calibrated.

    Made to be repaired: a unit whose output the others can give costs nothing here, but much if nothing is repaired.
    """

    cost = "forward passes over the text; a solve in each layer"
    method: str = "obs"
    allocation: Allocation = "global"
    """As in every configuration; this method's scores are in loss units, so that all units compare."""
    repair: Repair = "least_squares"
    """As in every configuration; the scores count on it."""
    shrinkage: Annotated[float, Range(0, 1, "[]")] = 0.5
    """How little other units are trusted to make up for one: 0 as much as on the calibration text, 1 not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("mlp", "attention", "query_heads", "expert_channels")
        if other := [kind for kind in self.axes if kind not in known]:
            raise ConfigError(f"axes: 'obs' scores units of {', '.join(known)}, found {other}.")


@dataclass(frozen=True)
class LLMPrunerConfig(PruningConfig):
    """Gradient importance of coupled groups (LLM-Pruner, arXiv 2305.11627). Calibrated.

    The defaults are our criterion in one step; `preset` gives the paper's settings and our best one.
    """

    cost = "a forward and backward pass over the text"
    method: str = "llm_pruner"
    allocation: Allocation = "global"
    """As in every configuration; this method's scores are in loss units, so that all units compare."""
    criterion: Literal["vector", "first_order", "second_order", "mixed", "fisher"] = "fisher"
    """Importance of a unit: the paper's `vector` Σ|Σ w·g| (inner sum over a row or column), `first_order` Σ|w·g|,
    `second_order` Σ w²·F, `mixed` Σ|w·g − ½·w²·F|, or our `fisher`: Fisher information of the unit's mask, from
    activations alone."""
    aggregation: Literal["sum", "mean", "max", "product", "last", "first"] = "sum"
    """How the scores of a group's matrices become one: `last` is the consumer (`down_proj`, `o_proj`) alone, `first`
    the first matrix. Not used by `fisher`, which has one score per unit."""
    normalisation: Literal["mean", "sum"] = "mean"
    """F is the `mean` (the released code) or the `sum` (the paper, eq. 5) of squared sample gradients; matters to
    `mixed` only, whose two terms it weighs."""
    assistant_only_loss: bool = False
    """Of chats only what the assistant says counts in the loss."""

    @classmethod
    def preset(cls, name: str, pruning_ratio: float, num_hidden_layers: int) -> LLMPrunerConfig:
        """A named setting.

        Args:
            name: `paper_block`: Element¹ on KV groups and MLP channels, the same ratio of units in every layer but the
                first 4 and last 2; `paper_channel`: Element¹ on the hidden axis; `paper_vector`, `paper_second_order`:
                `paper_block` with those criteria. 10 samples of 64 tokens, seed 42, as in the released runs.
                `recommended`: Fisher information of the unit masks, global, and repair end to end.
            pruning_ratio: of units for the paper's presets (0.25 gives its "20 %"), of decoder parameters for ours.
            num_hidden_layers: decoder layers of the model; the paper's presets need more than 6.

        Raises:
            ConfigError: an unknown name, or too few layers.
        """
        if name == "recommended":
            return cls(pruning_ratio, repair="end_to_end")
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
