"""The configuration of policy-gradient masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from hf_prune.config.base import Allocation, PruningConfig
from hf_prune.config.checks import Range
from hf_prune.errors import ConfigError

Policy = Literal["units", "widths", "widths_then_units"]
Estimator = Literal["paper", "leave_one_out", "arm", "disarm"]
Direction = Literal["plain", "paper", "natural"]
Reward = Literal["lm", "kl"]
Init = Literal["random", "magnitude", "wanda", "llm_pruner", "prunenet"]


@dataclass(frozen=True)
class PolicyGradientConfig(PruningConfig):
    """Keep-probabilities learned from sampled masks, forward passes only (arXiv 2406.10576). Calibrated.

    The defaults are our recommended preset; `preset` gives the paper's.
    """

    cost = "thousands of forward passes, of 4 windows each"
    method: str = "policy_gradient"
    allocation: Allocation = "global"
    """As everywhere; `global` keeps the units with the highest keep-probabilities, as they were learned."""
    num_samples: int = 1024
    """Calibration windows to draw from, 1 or more."""
    seq_len: int = 128
    """Tokens of each calibration window; learning needs 2 or more."""
    init: Init = "wanda"
    """Scores that the policy starts from: another method's with its defaults, on the first `init_samples` windows."""
    init_samples: Annotated[int, Range(1)] = 256
    """Calibration windows for the initial scores, 1 or more."""
    init_widths: Literal["uniform", "global"] = "uniform"
    """Where widths start: the same fraction of every axis, or initial scores per parameter compete across axes."""
    policy: Policy = "widths"
    """What is learned: a keep-probability of every unit (`units`, the paper), the width of every axis over the fixed
    order of the initial scores (`widths`), or first one, then the other."""
    policy_steps: Annotated[int, Range(1)] = 500
    """Steps of learning, 1 or more."""
    widths_fraction: Annotated[float, Range(0, 1, "()")] = 0.5
    """Share of the steps that `widths_then_units` spends on widths, above 0 and below 1."""
    num_masks: Annotated[int, Range(2)] = 4
    """Masks that see the same windows, 2 or more (even where masks come in pairs): only they are compared."""
    windows_per_step: Annotated[int, Range(1)] = 4
    """Calibration windows of each step; every one goes through the model `num_masks` times."""
    windows_per_mask: Annotated[int, Range(1)] = 1
    """Windows that share their masks; a divisor of `windows_per_step` (the paper: all of them)."""
    reward: Reward = "kl"
    """What is to be small: the next-token loss (`lm`, the paper), or the divergence from the dense model (`kl`)."""
    estimator: Estimator = "leave_one_out"
    """Gradient by units: `paper` (moving average of losses as baseline), `leave_one_out`, or the antithetic pairs
    `arm` and `disarm`. Widths always move in antithetic pairs."""
    direction: Direction = "natural"
    """Direction by units: the gradient as it is (`plain`), times √(s(1−s)) (`paper`) or times s(1−s) (`natural`)."""
    baseline_steps: Annotated[int, Range(1)] = 5
    """Steps of the moving average that is the baseline of `paper`, 1 or more."""
    learning_rate: Annotated[float, Range(0, ends="()")] = 0.003
    """Change of a keep-probability by one standard deviation of the gradients; falls to 0 as a cosine."""
    widths_learning_rate: Annotated[float, Range(0, ends="()")] = 0.05
    """Change of a width, as a fraction of its axis, by one standard deviation of the gradients; falls to 0 as well."""
    widths_noise: Annotated[float, Range(0, 1, "()")] = 0.1
    """How far sampled widths lie from the present ones, as a fraction of the axis, above 0 and below 1."""
    softness: Annotated[float, Range(0, 1, "()")] = 0.05
    """Width of the band, as a fraction of the axis, in which the order of the units is open after `widths`."""
    clamp: Annotated[float, Range(0, 0.5, "()")] = 0.02
    """Keep-probabilities stay this far from 0 and 1 while they are learned, above 0 and below 0.5."""
    separate_budgets: bool = False
    """Each kind of axis loses the same fraction (the paper), instead of one budget over all."""
    sliced_forward: bool = False
    """Slice MLP weights for each mask instead of masking: faster where many windows share a mask and layers are
    large."""
    forward_rows: Annotated[int, Range(1)] = 20
    """Windows, with a mask each, in one forward pass, 1 or more; changes memory and speed only."""
    state_dir: str | None = None
    """Directory for the state of learning, the same for all processes: a run that was interrupted resumes from there
    to the same result."""
    state_steps: Annotated[int, Range(1)] = 50
    """Steps between two writes of the state, 1 or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        paired = self.policy != "units" or self.estimator in ("arm", "disarm")
        self._check(not paired or self.num_masks % 2 == 0, "num_masks", "an even number: masks come in pairs")
        whole = self.windows_per_step % self.windows_per_mask == 0
        self._check(whole, "windows_per_mask", f"a divisor of windows_per_step={self.windows_per_step}")
        both = {"attention", "query_heads"}.issubset(self.axes)
        self._check(not both, "axes", "attention or query_heads: a policy cannot count units inside of others")
        nested = self.separate_budgets and not {"mlp", "attention"}.issuperset(self.axes)
        self._check(not nested, "axes", "mlp and attention only where separate_budgets is set")

    @classmethod
    def preset(cls, name: str, pruning_ratio: float, **changes: Any) -> PolicyGradientConfig:
        """A named setting.

        Args:
            name: `paper`: the released code's (2 masks on 8 × 128 tokens, moving-average baseline, next-token loss,
                Wanda initialisation, attention and MLP with budgets of their own); `recommended`: our defaults.
            pruning_ratio: fraction of decoder parameters.
            changes: other fields, `policy_steps` above all: the paper takes 15,000.

        Raises:
            ConfigError: an unknown name, or a value that the class refuses.
        """
        settings: dict[str, Any] = {
            "policy": "units",
            "policy_steps": 15_000,
            "num_masks": 2,
            "windows_per_step": 8,
            "windows_per_mask": 8,
            "learning_rate": 0.02,
            "reward": "lm",
            "estimator": "paper",
            "direction": "paper",
            "separate_budgets": True,
        }
        if name not in ("paper", "recommended"):
            raise ConfigError(f"preset: found {name!r}, expected 'paper' or 'recommended'.")
        return cls(pruning_ratio, **{**(settings if name == "paper" else {}), **changes})
