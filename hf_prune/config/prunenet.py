"""The configuration of PruneNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hf_prune.config.base import Allocation, AxisKind, PruningConfig
from hf_prune.config.checks import Range


@dataclass(frozen=True)
class PruneNetConfig(PruningConfig):
    """A policy trained on the spectra of weight matrices (PruneNet, arXiv 2501.15296). Needs no data.

    The defaults are ours; `paper` gives the paper's setting.
    """

    cost = "spectra of the weights, a few hundred times; no text"
    method: str = "prunenet"
    axes: tuple[AxisKind, ...] = ("mlp",)
    """Kinds of axes to prune: `mlp` channels, `attention` KV groups."""
    allocation: Allocation = "global"
    """`uniform`: the same fraction from every axis; `global`: scores per parameter removed compete across axes."""
    state: Literal["gate", "gate_up", "group", "write"] = "write"
    """Matrix whose rows are the units: the first producer (`gate`, the paper), all producers (`gate_up`), producers
    and consumers side by side (`group`), or the consumer's columns times the norms of the producers' rows (`write`)."""
    distance: Literal["ks", "wasserstein", "energy"] = "wasserstein"
    """Distance of the spectra with and without the removed rows, the negative reward: two-sample `ks` statistic of
    the singular values (the paper), or the lost share of their sum (`wasserstein`) or sum of squares (`energy`)."""
    layer_weight: Literal["update", "equal"] = "update"
    """What a layer's distance counts: the share of the residual stream that its branch writes, measured on single
    random tokens (`update`), or the same for all (`equal`)."""
    discount: Annotated[float, Range(0, 1, "(]")] = 1.0
    """Factor on the reward from each layer to the next, above 0 and up to 1; the paper has 0.99."""
    features: Literal["scale_free", "row"] = "scale_free"
    """What the policy sees of a unit: eight numbers that do not depend on any width, or the row itself (the paper)."""
    start: Literal["row_norm", "zero"] = "row_norm"
    """Policy that training starts from: the order of the rows' norms, below which the reward then never ends
    (`row_norm`, with `scale_free` features only), or a random order (`zero`, the paper)."""
    policy: str | None = None
    """Directory of a saved policy to use as it is, without training."""
    save_policy: str | None = None
    """Directory that the trained policy is written to."""
    sampled: bool = False
    """Sample the kept units from the policy (with `seed`) in place of keeping the best."""
    train_ratio: Annotated[float, Range(0, 1, "()")] | None = None
    """Fraction of units removed while training, above 0 and below 1 (default: what `pruning_ratio` means for the axes
    on average)."""
    num_episodes: Annotated[int, Range(1)] = 40
    """Passes over all layers while training, 1 or more."""
    num_rollouts: Annotated[int, Range(2)] = 8
    """Masks sampled from each layer in a pass, 2 or more; each is judged against the others."""
    learning_rate: Annotated[float, Range(0, ends="()")] = 0.5
    """Adam's learning rate, above 0."""
    exact_up_to: Annotated[int, Range(1)] = 2048
    """Largest side of a Gram matrix whose eigenvalues are computed exactly; above, stochastic Lanczos."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expressible = self.start == "zero" or self.features == "scale_free" or self.policy is not None
        self._check(expressible, "start", "'zero' with features='row': a linear probe of rows has no norms")
        self._check(self.policy is None or self.save_policy is None, "save_policy", "none beside `policy`")

    @classmethod
    def paper(cls, pruning_ratio: float) -> PruneNetConfig:
        """The paper's setting, with `pruning_ratio` as the fraction of MLP channels.

        Gate matrix, KS, a linear probe of the rows, γ = 0.99, the same ratio in every layer, 20 episodes, seed 42. The
        released code samples one mask a step and has no baseline, so it does not learn; rollouts are judged against
        each other here too.
        """
        return cls(
            pruning_ratio,
            budget="units",
            allocation="uniform",
            state="gate",
            distance="ks",
            features="row",
            start="zero",
            layer_weight="equal",
            discount=0.99,
            num_episodes=20,
            learning_rate=1e-3,
            seed=42,
        )
