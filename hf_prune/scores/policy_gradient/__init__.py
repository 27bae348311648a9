"""Policy-gradient masks (Bypass Back-propagation, arXiv 2406.10576): keep-probabilities from forward passes alone."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.config import CONFIGS, PolicyGradientConfig, PruningConfig
from hf_prune.errors import ConfigError
from hf_prune.layers.processes import of_main_process, reserved_for_all
from hf_prune.scores.learned import LearnedScores
from hf_prune.scores.policy_gradient.policy import as_scores
from hf_prune.scores.policy_gradient.training import LearnedPolicy, all_windows, learn_policy

if TYPE_CHECKING:
    from hf_prune.layers.walk import Walk
    from hf_prune.structure.axes import Structure

__all__ = ["LearnedPolicy", "as_scores", "initial_scores", "learn_policy", "policy_gradient_scores"]


def policy_gradient_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> LearnedScores:
    """Learned keep-probability times relative parameters of every unit: float32 `[num_units]` per selected axis.

    So that `global` allocation, which compares scores per parameter, ranks by keep-probability. The order is meant for
    the ratio it was learned for. The scores carry the learning curve as `history`. See `learn_policy` for what is
    learned, and its errors. All batches have windows of one length.
    """
    assert isinstance(config, PolicyGradientConfig)
    all_windows(walk, config)
    state = nullcontext() if config.state_dir is None else reserved_for_all(Path(config.state_dir).absolute())
    with state:  # no other run learns into it
        scores = initial_scores(walk, structure, config)
        learned = learn_policy(walk, structure, config, scores, generator)
    return LearnedScores(as_scores(learned.units, learned.keep_probs), learned.history)


def initial_scores(walk: Walk, structure: Structure, config: PolicyGradientConfig) -> dict[str, Tensor]:
    """Scores of `config.init`, with the defaults of that method, on the first `init_samples` windows.

    Raises:
        ConfigError: there is no such method.
    """
    from hf_prune.scores import METHODS, check_scores

    if config.init not in METHODS:
        raise ConfigError(f"init: {config.init!r} is not a method of this version; expected one of {list(METHODS)}.")
    counts = itertools.accumulate(len(ids) for ids in walk.all_ids)
    enough = 1 + sum(count < config.init_samples for count in counts)
    fields = ("axes", "layers", "protect", "seed", "min_units")
    same = {name: getattr(config, name) for name in fields}
    own = CONFIGS[config.init](config.pruning_ratio, **same)
    generator = torch.Generator().manual_seed(config.seed)
    scores = METHODS[config.init].scores(walk.over(walk.all_ids[:enough]), structure, own, generator)
    return of_main_process(check_scores(scores, structure, config))  # type: ignore[no-any-return]
