"""What a least-squares problem needs to know of its inputs and targets: sums of products, streamed over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor

from hf_prune.errors import CalibrationError
from hf_prune.layers.processes import sum_numbers, sum_over_processes

_BLOCKS = 8
"""The Gram matrix is symmetric: of so many block rows, only the blocks up to the diagonal are multiplied."""
_HALVES = (torch.bfloat16, torch.float16)
RIDGE_GROWTH = 10.0
"""A matrix that is not positive definite gets so many times the ridge, until it is."""


class Statistics:
    """Sums over tokens of a consumer's input x `[K]` and of the output t `[D]` that it should have.

    Products are added up in float32 (float64 for float64 inputs) within a batch; batches are added up in float64.
    CUDA takes the products of halves as they are, they are exact in float32; elsewhere the sums would be rounded to
    halves, so there halves become float32 first.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.gram = zeros(num_inputs, num_inputs)  # Σ x xᵀ, of block rows what is up to the diagonal block
        self.cross = zeros(num_inputs, num_outputs)  # Σ x tᵀ
        self.inputs = zeros(num_inputs)
        self.targets = zeros(num_outputs)
        self.squares = 0.0  # Σ |t|²

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add a batch: x `[..., K]`, target `[..., D]`."""
        device, size = self.gram.device, x.shape[-1]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.reshape(-1, size).to(device)
        target = target.reshape(len(x), target.shape[-1]).to(device)
        if device.type != "cuda" or x.dtype not in _HALVES or x.dtype != target.dtype:
            x, target = x.to(wide), target.to(wide)
        for start, stop in self._blocks():
            self.gram[start:stop, :stop] += _product(x[:, start:stop].T, x[:, :stop], wide)
        if target.numel():
            self.cross += _product(x.T, target, wide)
        self.inputs += x.sum(0, dtype=wide)
        self.targets += target.sum(0, dtype=wide)
        self.squares += float(target.to(wide).square().sum(dtype=torch.float64))
        self.num_tokens += len(x)

    def _blocks(self) -> list[tuple[int, int]]:
        """Rows of the blocks on the diagonal of the Gram matrix."""
        size = len(self.gram)
        step = -(-size // _BLOCKS)
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def over_processes(self) -> Statistics:
        """The sums over all processes; this itself where there is one."""
        if PartialState().num_processes > 1:
            self.gram, self.cross = sum_over_processes(self.gram), sum_over_processes(self.cross)
            self.inputs, self.targets = sum_over_processes(self.inputs), sum_over_processes(self.targets)
            tokens, self.squares = sum_numbers(self.num_tokens, self.squares)
            self.num_tokens = round(tokens)
        return self

    def symmetric_gram(self, centred: bool, *, copy: bool = True) -> Tensor:
        """Σ x xᵀ, or Σ (x − x̄)(x − x̄)ᵀ, both triangles; without `copy` the first of these is where it is summed.

        Raises:
            CalibrationError: the sums are not finite.
        """
        if not bool(self.gram.diagonal().isfinite().all() and self.cross.sum().isfinite()):  # |xᵢxⱼ| ≤ xᵢ² + xⱼ²
            raise CalibrationError(
                "the inputs or outputs of a layer are NaN or infinite on the calibration text, expected finite "
                "numbers. Check that the dense model works, and repair it in bfloat16 or float32."
            )
        gram = self.gram.clone() if copy or centred else self.gram
        for start, stop in self._blocks():
            gram[:start, start:stop] = gram[start:stop, :start].T
        return gram.addr_(self.inputs, self.inputs, alpha=-1 / max(self.num_tokens, 1)) if centred else gram


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


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
    old = weight.detach().T.to(statistics.gram).contiguous()  # [K, D], like all below
    gram, cross = statistics.symmetric_gram(centred, copy=False), statistics.cross
    mean_x, mean_t = statistics.inputs / n, statistics.targets / n
    offset = 0.0
    if bias is not None:
        cross = cross - n * torch.outer(mean_x, mean_t)
        squares -= float(n * mean_t @ mean_t)
        offset = float((mean_t - mean_x @ old - bias.detach().to(old)).square().sum())
    product = gram @ old
    before = squares - 2 * _dot(old, cross) + _dot(old, product)
    factor, used, penalty = factorised(gram, ridge)
    step = torch.cholesky_solve(torch.sub(cross, product, out=product), factor)
    del product, factor
    new = old + step
    after = squares - _dot(new, cross) - penalty * _dot(new, step)  # H W'ᵀ is cross − λ step, by what `step` solves
    return Solution(
        weight=new.T,
        bias=mean_t - mean_x @ new if centred else None,
        error_before=max(0.0, before) / n + offset,  # rounding would take errors below 0
        error_after=max(0.0, after) / n,
        ridge=used,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.reshape(-1) @ b.reshape(-1))


def factorised(gram: Tensor, ridge: float) -> tuple[Tensor, float, float]:
    """Cholesky factor of a Gram matrix plus λ = `ridge` times its mean diagonal; the ridge that it took, and λ.

    The matrix is changed meanwhile, and is as it was in the end.
    """
    diagonal = gram.diagonal().clone()
    scale = float(diagonal.mean()) or 1.0
    while True:
        gram.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(gram)
        gram.diagonal().copy_(diagonal)
        if not int(failed):
            return factor, ridge, ridge * scale
        ridge = max(ridge * RIDGE_GROWTH, 1e-8)
