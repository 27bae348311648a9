"""Policy-gradient masks (Bypass Back-propagation, arXiv 2406.10576): keep-probabilities from forward passes alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.config import CONFIGS, PolicyGradientConfig, PruningConfig
from hf_prune.errors import ConfigError
from hf_prune.methods.learned import LearnedScores
from hf_prune.methods.policy_gradient.policy import as_scores
from hf_prune.methods.policy_gradient.training import LearnedPolicy, all_windows, learn_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hf_prune.methods.calibration import Batch
    from hf_prune.structure.structure import Structure

__all__ = ["LearnedPolicy", "as_scores", "initial_scores", "learn_policy", "policy_gradient_scores"]


def policy_gradient_scores(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    *,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> LearnedScores:
    """Learned keep-probability times relative parameters of every unit: float32 `[num_units]` per selected axis.

    So that `global` allocation, which compares scores per parameter, ranks by keep-probability. The order is meant for
    the ratio it was learned for. The scores carry the learning curve as `history`. See `learn_policy` for what is
    learned, and its errors.

    Args:
        model: a causal LM; left as it was.
        structure: its structure.
        config: a `PolicyGradientConfig`.
        batches: calibration batches, of windows of one length.
        generator: source of randomness; default: seeded with `config.seed`.
    """
    assert isinstance(config, PolicyGradientConfig)
    batches = list(batches or ())
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    all_windows(batches, config)
    scores = initial_scores(model, structure, config, batches)
    learned = learn_policy(model, structure, config, batches, scores, generator)
    return LearnedScores(as_scores(learned.units, learned.keep_probs), learned.history)


def initial_scores(
    model: nn.Module, structure: Structure, config: PolicyGradientConfig, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Scores of `config.init`, with the defaults of that method, on the first `init_samples` windows.

    Raises:
        ConfigError: there is no such method.
    """
    from hf_prune.methods import METHODS, check_scores

    if config.init not in METHODS:
        raise ConfigError(f"init: {config.init!r} is not a method of this version; expected one of {list(METHODS)}.")
    counts = itertools.accumulate(len(batch["input_ids"]) for batch in batches)
    enough = 1 + sum(count < config.init_samples for count in counts)
    fields = ("axes", "layers", "protect", "seed", "min_units")
    same = {name: getattr(config, name) for name in fields}
    own = CONFIGS[config.init](config.pruning_ratio, **same)
    return check_scores(METHODS[config.init].scores(model, structure, own, batches=batches[:enough]), structure, config)
