"""The policy: features of units, a linear probe of them, and ordered samples without replacement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.layers.work import read_tensors, write_tensors
from hf_prune.reading import load_text_file, parse_json

if TYPE_CHECKING:
    import os

    from hf_prune.scores.prunenet.unit_matrix import UnitMatrix

FORMAT = 2
FILE = "policy.safetensors"
NORM_FEATURE = 0
"""The feature that ranks units as the norms of their rows do."""
RIDGE = 1e-3


def scale_free_features(rows: UnitMatrix, depth: float) -> Tensor:
    """Eight numbers per unit, standardised over the units of the layer: they depend on no width and no scale.

    Log norms of the state, the producers and the consumers; log ridge leverage; log Rayleigh quotient (how far the row
    lies in strong directions of the spectrum); log mean squared cosine with the other rows; and the first again,
    squared, and times `depth` (0 to 1: first to last layer).

    Returns:
        float32 `[U, 8]`.
    """
    matrix = rows.state.flatten(0, 1)
    num_units, block = rows.state.shape[:2]
    norms = matrix.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    unit = matrix / norms[:, None]
    if matrix.shape[0] < matrix.shape[1]:  # the same numbers from the smaller side
        gram, cosines = matrix @ matrix.T, unit @ unit.T
        rayleigh = (unit @ matrix.T).square().sum(1)
        leverage = torch.linalg.solve(_ridged(gram), gram).diagonal()
        mean_cosine = cosines.square().mean(1)
    else:
        gram, cosines = matrix.T @ matrix, unit.T @ unit
        rayleigh = ((unit @ gram) * unit).sum(1)
        leverage = (torch.linalg.solve(_ridged(gram), matrix.T).T * matrix).sum(1)
        mean_cosine = ((unit @ cosines) * unit).sum(1) / num_units

    def by_unit(values: Tensor) -> Tensor:
        return _standardised(values.reshape(num_units, block).mean(1).clamp_min(1e-30).log())

    norm = _standardised(rows.state.square().sum((1, 2)).clamp_min(1e-30).log())
    columns = [
        norm,
        _standardised(rows.producer_norms.clamp_min(1e-30).log()),
        _standardised(rows.consumer_norms.clamp_min(1e-30).log()),
        by_unit(leverage),
        by_unit(rayleigh),
        by_unit(mean_cosine),
        norm.square() - 1,
        norm * depth,
    ]
    return torch.stack(columns, dim=1)


def _ridged(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram))  # all rows may be zero


def row_features(rows: UnitMatrix) -> Tensor:
    """The rows themselves, float32 `[U, b·d]`: a linear probe of them is the paper's policy."""
    return rows.state.flatten(1)


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0).clamp_min(1e-6)


@dataclass
class Policy:
    """A linear probe: the logit of a unit is `weight · features + bias`; higher = keep."""

    weight: Tensor
    """float32 `[num_features]`."""
    bias: Tensor
    """float32 `[]`; without effect on the choice, as the paper's policy has it."""
    features: str
    """`scale_free` or `row`."""
    state: str
    """What the rows are, see `PruneNetConfig.state`."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per episode: `sampled` and `best`, mean reward of the rollouts and of the highest logits."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The configuration it was trained with."""

    def logits(self, features: Tensor) -> Tensor:
        """`[U, num_features]` → `[U]`.

        Raises:
            ConfigError: the features are of another length.
        """
        if features.shape[1] != len(self.weight):
            raise ConfigError(
                f"the policy was trained on rows of {len(self.weight)} numbers, this model has {features.shape[1]}. "
                "Use a policy of a model of this hidden size, or one with features 'scale_free'."
            )
        return features @ self.weight + self.bias

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `policy.safetensors` in one step: the weights, and everything else as JSON in its header."""
        known = {"format": FORMAT, **asdict(self)}
        tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)}
        note = {name: value for name, value in known.items() if name not in tensors}
        write_tensors(Path(directory) / FILE, tensors, note)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Policy:
        """Read a saved policy.

        Raises:
            CheckpointError: there is none, or it is damaged or of another format.
        """
        path = Path(directory) / FILE
        if not path.exists():
            raise CheckpointError(f"no policy can be read from {directory}. Give a directory that save_policy wrote.")
        tensors, values = read_tensors(path)
        if not values and (first := path.with_suffix(".json")).exists():  # format 1 had two files
            values = dict(parse_json(load_text_file(first, "policy", CheckpointError))) | {"format": FORMAT}
        expected = {"format", "features", "state", "history", "settings"}
        if not isinstance(values, dict) or values.get("format") != FORMAT or set(values) != expected:
            raise CheckpointError(f"{path}: expected format {FORMAT} with the keys {sorted(expected)} in its header.")
        none = torch.empty(0, 0)
        weight, bias = tensors.get("weight", none), tensors.get("bias", none)
        if weight.dim() != 1 or bias.dim() != 0 or not bool(weight.isfinite().all() and bias.isfinite()):
            raise CheckpointError(f"{path}: expected finite tensors `weight` [features] and `bias` [].")
        del values["format"]
        return cls(weight.float(), bias.float(), **values)


def sample(logits: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Orders drawn from the Plackett–Luce distribution of `logits`, by the Gumbel trick: int64 `[num_samples, U]`."""
    uniform = torch.rand(num_samples, logits.numel(), generator=generator).clamp(1e-20, 1 - 1e-7)
    return (logits.detach() - (-uniform.log()).log()).argsort(dim=1, descending=True)


def log_probability(logits: Tensor, orders: Tensor, num_kept: int) -> Tensor:
    """Log-probability that the first `num_kept` of each order are drawn one by one, in this order.

    Σ_i [l_πi − log Σ_{j ≥ i} exp l_πj] (Plackett–Luce); differentiable in `logits` `[U]`.

    Returns:
        `[num_samples]`.
    """
    ordered = logits[orders]
    remaining = ordered.flip(1).logcumsumexp(1).flip(1)
    return (ordered - remaining)[:, :num_kept].sum(1)
