"""What a least-squares problem needs to know of its inputs and targets: sums of products, streamed over batches."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_prune.errors import CalibrationError, ScoreError
from hf_prune.layers.processes import sum_numbers, sum_over_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCKS = 8
"""The Gram matrix is symmetric: of so many block rows, only the blocks up to the diagonal are multiplied."""
_COLUMNS = 512
"""Of matrices that are changed in place, so many columns at a time."""
_HALVES = (torch.bfloat16, torch.float16)
RIDGE_GROWTH, MOST_RIDGE = 10.0, 1e15
"""A matrix that is not positive definite gets so many times the ridge, until it is, or the ridge is this large."""

RIDGE_STEP, NO_REFIT = 4.0, 1e4
"""What larger ridges are tried in steps of, and one with which a weight stays about as it is."""
HELD_OUT = 8
"""One calibration window, or batch, of so many is held out: what is chosen by it is a ridge, or when to stop."""


def is_held_out(first: int, number: int) -> Tensor:
    """Which of `number` windows (or batches) are held out, the first of which is that of `first`: bool `[number]`."""
    return torch.arange(first, first + number) % HELD_OUT == HELD_OUT - 1


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

    def add_sums(self, other: Statistics) -> None:
        """Add what another of the same shapes has seen."""
        for name in ("gram", "cross", "inputs", "targets", "num_tokens", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Squared error of a consumer's output on these tokens, summed over outputs, mean over tokens."""
        matrix = weight.detach().T.to(self.gram)
        total = self.squares + float((matrix * (self.symmetric_gram(False) @ matrix - 2 * self.cross)).sum())
        if bias is not None:
            own = bias.detach().to(self.gram)
            total += float(own @ (self.num_tokens * own - 2 * (self.targets - self.inputs @ matrix)))
        return total / self.num_tokens

    def symmetric_gram(self, centred: bool) -> Tensor:
        """Σ x xᵀ, or Σ (x − x̄)(x − x̄)ᵀ, both triangles: in the place where it was summed.

        Raises:
            CalibrationError: the sums are not finite.
        """
        if not bool(self.gram.diagonal().isfinite().all() and self.cross.sum().isfinite()):  # |xᵢxⱼ| ≤ xᵢ² + xⱼ²
            raise CalibrationError(
                "the inputs or outputs of a layer are NaN or infinite on the calibration text, expected finite "
                "numbers. Check that the dense model works, and repair it in bfloat16 or float32."
            )
        for start, stop in self._blocks():
            self.gram[:start, start:stop] = self.gram[start:stop, :start].T
        if centred:
            self.gram.addr_(self.inputs, self.inputs, alpha=-1 / max(self.num_tokens, 1))
        return self.gram


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
    asked: float
    """The ridge that was asked for."""


def solve_(statistics: Statistics, weight: Tensor, bias: Tensor | None, ridge: float) -> Solution:
    """The weight (and bias) with the least squared error over the tokens of `statistics`, which are used up.

    Minimises Σ |t − W'x − b'|² + λ |W' − W|² with λ = ridge · mean(diag Σ x xᵀ): one Cholesky factorisation. With a
    bias, x and t are centred first. W' = W where nothing can be gained. The step W' − W takes the place of Σ x tᵀ, and
    the factor that of Σ x xᵀ: nothing of their size is held beside them.

    Args:
        statistics: of at least one token.
        weight: W `[D, K]`.
        bias: b `[D]`, or `None` for a consumer without one.
        ridge: 0 or more.

    Raises:
        CalibrationError: the statistics are not finite.
    """
    n, centred = statistics.num_tokens, bias is not None
    gram, step = statistics.symmetric_gram(centred), statistics.cross
    mean_x, mean_t = statistics.inputs / n, statistics.targets / n
    before, offset, old = statistics.squares, 0.0, weight.detach().T
    if bias is not None:
        step.addr_(mean_x, mean_t, alpha=-n)
        before -= float(n * mean_t @ mean_t)
        offset = float((mean_t - mean_x @ old.to(gram) - bias.detach().to(gram)).square().sum())
    for right, part in zip(torch.split(step, _COLUMNS, 1), torch.split(old, _COLUMNS, 1), strict=True):
        own = part.to(gram).contiguous()
        before -= float((own * right).sum())
        right.addmm_(gram, own, alpha=-1)  # what is left to explain: Σ x (t − Wx)ᵀ
        before -= float((own * right).sum())
    used, penalty = factorise_(gram, ridge)
    torch.linalg.solve_triangular(gram, step, upper=False, out=step)
    gain = float(torch.linalg.vector_norm(step)) ** 2
    torch.linalg.solve_triangular(gram.T, step, upper=True, out=step)
    gain += penalty * float(torch.linalg.vector_norm(step)) ** 2
    new = step.add_(old)
    return Solution(
        weight=new.T,
        bias=mean_t - mean_x @ new if centred else None,
        error_before=max(0.0, before) / n + offset,  # rounding would take errors below 0
        error_after=max(0.0, before - gain) / n,
        ridge=used,
        asked=ridge,
    )


def best_ridge(fitted: Statistics, held_out: Statistics, weight: Tensor, bias: Tensor | None, ridge: float) -> float:
    """The ridge, `ridge` or more, with which the weight fitted to some tokens has the least error on others.

    `RIDGE_STEP` times as much is tried until the error grows; `NO_REFIT` if none is better than the weight as it is.
    """
    least, best, last = held_out.error(weight, bias), NO_REFIT, math.inf
    while ridge < NO_REFIT:
        sums = copy.copy(fitted)
        sums.gram, sums.cross = fitted.gram.clone(), fitted.cross.clone()
        found = solve_(sums, weight, bias, ridge)
        error = held_out.error(found.weight, found.bias)
        if error < least:
            least, best = error, ridge
        if error > last:
            break
        last, ridge = error, ridge * RIDGE_STEP
    return best


def factorise_(gram: Tensor, ridge: float) -> tuple[float, float]:
    """Cholesky factor of a Gram matrix plus λ = `ridge` times its mean diagonal, in place of the lower triangle.

    Returns:
        The ridge that it took: more than asked if the matrix is singular; and λ.
    """
    diagonal = gram.diagonal().clone()
    tried = ridges(gram, ridge)
    while True:
        used, penalty = next(tried)
        gram.diagonal().add_(penalty)
        if _cholesky_(gram):
            return used, penalty
        gram.copy_(gram.triu(1) + gram.triu(1).T).diagonal().copy_(diagonal)


def _cholesky_(matrix: Tensor) -> bool:
    """Cholesky factor in place of the lower triangle; `False`, and a spoilt one, if there is none."""
    size = len(matrix)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        block, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        factor, failed = torch.linalg.cholesky_ex(block)
        if int(failed):
            return False
        block.copy_(block.triu(1) + factor)
        torch.linalg.solve_triangular(factor.T, below, upper=True, left=False, out=below)
        for first in range(stop, size, _COLUMNS):
            last = min(first + _COLUMNS, size)
            rows = matrix[first:last]
            rows[:, stop:first].addmm_(rows[:, start:stop], matrix[stop:first, start:stop].T, alpha=-1)
            square = rows[:, first:last]  # its upper triangle stays
            square.sub_((rows[:, start:stop] @ rows[:, start:stop].T).tril_())
    return True


def ridges(gram: Tensor, ridge: float) -> Iterator[tuple[float, float]]:
    """Ridges to try, each with what it adds to the diagonal; `LinAlgError` once all finite matrices were solved."""
    mean = float(gram.diagonal().mean())
    scale = mean if mean > 0 else 1.0  # rounding takes a centred matrix of zeros below 0
    while math.isfinite(mean) and ridge < MOST_RIDGE:
        yield ridge, ridge * scale
        ridge = max(ridge * RIDGE_GROWTH, 1e-8)
    raise LinAlgError("a matrix is not positive definite with any ridge")


@contextlib.contextmanager
def solving(what: str) -> Iterator[None]:
    """Failures of linear algebra within become `ScoreError`, naming the axis or tensor."""
    try:
        yield
    except LinAlgError as error:
        raise ScoreError(
            f"{what}: linear algebra failed ({str(error).splitlines()[0]}), expected finite weights and activations. "
            "Load the model in float32, take more calibration text or a larger repair_ridge, or protect this axis."
        ) from error
