"""What a least-squares problem needs to know of its inputs and targets: sums of products, streamed over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor

from hf_prune.errors import CalibrationError
from hf_prune.layers.processes import sum_numbers, sum_over_processes

_BLOCKS = 4
"""The Gram matrix is symmetric: of so many block rows, only the blocks up to the diagonal are multiplied."""
RIDGE_GROWTH = 10.0
"""A matrix that is not positive definite gets so many times the ridge, until it is."""


class Statistics:
    """Sums over tokens of a consumer's input x `[K]` and of the output t `[D]` that it should have.

    Products are taken in float32 (float64 for float64 inputs) within a batch; batches are added up in float64.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.gram = zeros(num_inputs, num_inputs)  # Σ x xᵀ, its lower triangle
        self.cross = zeros(num_inputs, num_outputs)  # Σ x tᵀ
        self.inputs = zeros(num_inputs)
        self.targets = zeros(num_outputs)
        self.squares = 0.0  # Σ |t|²

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add a batch: x `[..., K]`, target `[..., D]`."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.reshape(-1, x.shape[-1]).to(self.gram.device, dtype)
        target = target.reshape(len(x), target.shape[-1]).to(x)
        size = x.shape[1]
        step = -(-size // _BLOCKS)
        for start in range(0, size, step):
            stop = min(start + step, size)
            self.gram[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]
        self.cross += x.T @ target
        self.inputs += x.sum(0)
        self.targets += target.sum(0)
        self.squares += float(target.square().sum(dtype=torch.float64))
        self.num_tokens += len(x)

    def over_processes(self) -> Statistics:
        """The sums over all processes; this itself where there is one."""
        if PartialState().num_processes > 1:
            self.gram, self.cross = sum_over_processes(self.gram), sum_over_processes(self.cross)
            self.inputs, self.targets = sum_over_processes(self.inputs), sum_over_processes(self.targets)
            tokens, self.squares = sum_numbers(self.num_tokens, self.squares)
            self.num_tokens = round(tokens)
        return self

    def symmetric_gram(self, centred: bool) -> Tensor:
        """Σ x xᵀ, or Σ (x − x̄)(x − x̄)ᵀ, both triangles; `CalibrationError` if the sums are not finite."""
        if not bool(self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise CalibrationError(
                "the inputs or outputs of a layer are NaN or infinite on the calibration text, expected finite "
                "numbers. Check that the dense model works, and repair it in bfloat16 or float32."
            )
        gram = self.gram.tril() + self.gram.tril(-1).T
        return gram - torch.outer(self.inputs, self.inputs) / max(self.num_tokens, 1) if centred else gram


@dataclass(frozen=True)
class Solution:
    """The best weight of a consumer, and the squared error of its output, summed over outputs, mean over tokens."""

    weight: Tensor
    """float64 `[D, K]`."""
    bias: Tensor | None
    """float64 `[D]`, where the consumer has one."""
    error_before: float
    error_after: float
    ridge: float
    """The ridge that was used: more than asked if the Gram matrix was singular."""


def solve(statistics: Statistics, weight: Tensor, bias: Tensor | None, ridge: float) -> Solution:
    """The weight (and bias) with the least squared error over the tokens of `statistics`.

    Minimises Σ |t − W'x − b'|² + λ |W' − W|² with λ = ridge · mean(diag Σ x xᵀ): one Cholesky factorisation. With a
    bias, x and t are centred first. W' = W where nothing can be gained.

    Args:
        statistics: of at least one token.
        weight: W `[D, K]`.
        bias: b `[D]`, or `None` for a consumer without one.
        ridge: 0 or more.

    Raises:
        CalibrationError: the statistics are not finite.
    """
    n, squares, centred = statistics.num_tokens, statistics.squares, bias is not None
    old = weight.detach().to(statistics.gram)
    gram, cross = statistics.symmetric_gram(centred), statistics.cross
    mean_x, mean_t = statistics.inputs / n, statistics.targets / n
    offset = 0.0
    if bias is not None:
        cross = cross - n * torch.outer(mean_x, mean_t)
        squares -= float(n * mean_t @ mean_t)
        offset = float((mean_t - old @ mean_x - bias.detach().to(old)).square().sum())
    factor, used, penalty = factorised(gram, ridge)
    product = old @ gram
    missing = cross - product.T
    step = torch.cholesky_solve(missing, factor).T
    new = old + step
    new_product = product + missing.T - penalty * step  # new @ gram, by what `step` solves
    return Solution(
        weight=new,
        bias=mean_t - new @ mean_x if centred else None,
        error_before=_error(squares, cross, old, product) / n + offset,
        error_after=_error(squares, cross, new, new_product) / n,
        ridge=used,
    )


def _error(squares: float, cross: Tensor, weight: Tensor, product: Tensor) -> float:
    """Σ |t − W x|² from the sums and W Σ x xᵀ; not below 0, where rounding would take it."""
    return max(0.0, squares - float((weight * (2 * cross.T - product)).sum()))


def factorised(gram: Tensor, ridge: float) -> tuple[Tensor, float, float]:
    """Cholesky factor of a Gram matrix plus λ = `ridge` times its mean diagonal; the ridge that it took, and λ."""
    scale = float(gram.diagonal().mean()) or 1.0
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor, ridge, ridge * scale
        ridge = max(ridge * RIDGE_GROWTH, 1e-8)
