"""Methods give every unit a score. A method knows nothing of ratios, allocation or slicing.

Each is one function `scores(walk, structure, config, generator)` that returns, for every axis of
`selected_axes(structure, config)`, a finite float32 tensor `[num_units]` on the CPU; higher = keep. It reaches weights
and activations through the walk alone, so it works for models on disk; it leaves the model as it found it and draws
randomness only from `generator`. A method that learns may return `LearnedScores`, a dict with the `history` of
learning: `score` hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from hf_prune.config import PruningConfig, selected_axes
from hf_prune.errors import CalibrationError, ConfigError, ScoreError
from hf_prune.layers.processes import of_main_process
from hf_prune.layers.walk import Walk
from hf_prune.scores.baselines import magnitude_scores, random_scores, wanda_scores
from hf_prune.scores.learned import LearnedScores
from hf_prune.scores.llm_pruner import llm_pruner_scores
from hf_prune.scores.obs import obs_scores
from hf_prune.scores.policy_gradient import policy_gradient_scores
from hf_prune.scores.prunenet import prunenet_scores
from hf_prune.scores.reap import reap_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hf_prune.layers.walk import Batch, LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.axes import Structure


class ScoreFunction(Protocol):
    """What every method is."""

    def __call__(
        self, walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores of the selected axes, as the module's docstring says."""


@dataclass(frozen=True)
class Method:
    """A score function and whether it needs calibration batches."""

    scores: ScoreFunction
    needs_calibration: bool
    uses_ratio: bool = False
    """Scores are learnt for one pruning ratio, and serve no other."""


METHODS: dict[str, Method] = {
    "random": Method(random_scores, needs_calibration=False),
    "magnitude": Method(magnitude_scores, needs_calibration=False),
    "wanda": Method(wanda_scores, needs_calibration=True),
    "llm_pruner": Method(llm_pruner_scores, needs_calibration=True),
    "obs": Method(obs_scores, needs_calibration=True),
    "reap": Method(reap_scores, needs_calibration=True),
    "policy_gradient": Method(policy_gradient_scores, needs_calibration=True, uses_ratio=True),
    "prunenet": Method(prunenet_scores, needs_calibration=False, uses_ratio=True),
}


def score(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> dict[str, Tensor]:
    """Score the selected axes with the method of `config`, and check what it returns.

    Args:
        model: the dense causal LM, in memory or on disk (see `hf_prune.layers.weights.open_model`).
        structure: its structure.
        config: which method, and its settings.
        batches: calibration batches (`input_ids`, int64 `[B, T]`), for methods that need them.
        generator: source of randomness; default: seeded with `config.seed`.
        work: keeps hidden states and sums, so that an interrupted pass is resumed.
        protocol: how the model runs its layers, if that is known.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU; higher = keep.

    Raises:
        ConfigError: no such method.
        CalibrationError: the method needs batches and got none, or unusable ones.
        ScoreError: the method returned something else than finite scores of the right shape.
    """
    if config.method not in METHODS:
        raise ConfigError(f"method: found {config.method!r}, which scores nothing; expected one of {list(METHODS)}.")
    method = METHODS[config.method]
    walk = Walk(model, structure.layer_paths, list(batches or ()), work=work, protocol=protocol)
    if method.needs_calibration and not walk.all_ids:
        raise CalibrationError(
            f"method {config.method!r} needs calibration batches and found none, expected one or more: give a text."
        )
    generator = torch.Generator().manual_seed(config.seed) if generator is None else generator
    scores = check_scores(method.scores(walk, structure, config, generator), structure, config)
    scores.update(of_main_process(dict(scores)))
    return scores


def check_scores(scores: Mapping[str, Tensor], structure: Structure, config: PruningConfig) -> dict[str, Tensor]:
    """Scores of the selected axes as float32 on the CPU; `ScoreError` if one is missing, misshapen or not finite.

    `LearnedScores` stay such.
    """
    selected = selected_axes(structure, config)
    for name in scores:
        if name not in structure.axes:
            raise ScoreError(f"{name}: scores were given for an axis that this {structure.model_type} model lacks.")
    checked = {}
    for axis in selected:
        if axis.name not in scores:
            raise ScoreError(f"{axis.name}: no scores were given; expected {axis.num_units} of them, or protect it.")
        values = scores[axis.name]
        if not isinstance(values, Tensor) or tuple(values.shape) != (axis.num_units,):
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ScoreError(f"{axis.name}: found scores of {found}, expected a tensor of shape ({axis.num_units},).")
        values = values.detach().to("cpu", torch.float32)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise ScoreError(
                f"{axis.name}: {bad} of {axis.num_units} scores are NaN or infinite; expected finite numbers. "
                "Look for overflow in the weights or activations (try float32) or for a broken calibration text."
            )
        checked[axis.name] = values
    return LearnedScores(checked, scores.history) if isinstance(scores, LearnedScores) else checked
