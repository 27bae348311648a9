"""Numbers with their 95 % intervals: of means by the bootstrap, of shares by Wilson's formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

FEWEST = 8
"""Of fewer values than this no interval is given: it would be too narrow."""
RESAMPLES = 2000
_DRAWN_AT_A_TIME = 1 << 20
_Z = 1.959964
"""Standard deviations of a normal distribution that hold 95 % of it."""


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval: `None` where there were too few values for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """A growing function of it: `exp` makes a ratio of a difference of logarithms."""
        ends = [None if end is None else function(end) for end in (self.low, self.high)]
        return Estimate(function(self.value), *ends)

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" ({self.low:,.4g} to {self.high:,.4g})"
        return f"{self.value:,.4g}{ends}"


def mean_of(samples: Sequence[Tensor], *, seed: int = 0) -> Estimate:
    """The mean of the means of some samples, each resampled by itself (percentiles of the bootstrap).

    Paired values, such as those of two models on the same window, are given as their difference.

    Args:
        samples: one or more, `[N_i]` values each.
        seed: of the resampling; the global generator is not touched.
    """
    value = math.fsum(float(sample.double().mean()) for sample in samples) / len(samples)
    if min(len(sample) for sample in samples) < FEWEST or not math.isfinite(value):
        return Estimate(value)
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for sample in samples:
        for rows in torch.split(means, max(1, _DRAWN_AT_A_TIME // len(sample))):
            drawn = torch.randint(len(sample), (len(rows), len(sample)), generator=generator)
            rows += sample.double()[drawn].mean(1) / len(samples)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def share_of(number: float, of: int) -> Estimate:
    """`number` of `of` trials as a share, with Wilson's interval: not empty at 0 and 1, as the bootstrap's would be."""
    share = number / of
    if of < FEWEST:
        return Estimate(share)
    centre = (share + _Z**2 / (2 * of)) / (1 + _Z**2 / of)
    half = _Z / (1 + _Z**2 / of) * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def flat(report: Any) -> dict[str, Any]:
    """Fields of a report as JSON has them: an estimate as `name`, `name_low`, `name_high`; what is in it as a list."""
    found: dict[str, Any] = {}
    for field in fields(report):
        value = getattr(report, field.name)
        if isinstance(value, Estimate):
            found |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        elif isinstance(value, tuple):
            found[field.name] = [flat(row) for row in value]
        elif is_dataclass(value):
            found |= {f"{field.name}_{name}": part for name, part in flat(value).items()}
        else:
            found[field.name] = value
    return found
