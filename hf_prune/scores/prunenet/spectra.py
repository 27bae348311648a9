"""Spectra of row subsets of a matrix, and their distance from the spectrum of all rows.

`rows` is `[U, b, d]`: unit u carries b rows of length d, and the matrix is `[U·b, d]`. Removing rows takes a principal
submatrix of W·Wᵀ, so the singular values interlace (Cauchy) and can only shrink. Eigenvalues come from the Gram matrix
of the smaller side in float64, where removing units is a down-date, G − RᵀR; singular vectors are never computed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_PROBES = 8
NUM_LANCZOS_STEPS = 48


def gram(rows: Tensor) -> Tensor:
    """WᵀW of all rows: float64 `[d, d]`."""
    flat = rows.flatten(0, -2).double()
    return flat.T @ flat


def kept_spectra(rows: Tensor, keep_masks: Tensor, total: Tensor | None = None) -> Tensor:
    """Exact singular values of the kept rows, for several masks at once.

    Args:
        rows: `[U, b, d]`, any float dtype; or `[L, U, b, d]`, several layers of one shape.
        keep_masks: bool `[N, U]` (`[L, N, U]`), each keeping the same number n of units, 1 or more.
        total: `gram(rows)` if it is at hand (one layer only).

    Returns:
        float64 `[N, min(n·b, d)]` (`[L, N, ...]`), descending.
    """
    if rows.dim() == 4:
        sides = [_kept_grams(layer, masks, None) for layer, masks in zip(rows, keep_masks, strict=True)]
        values = _singular_values(torch.cat(sides))
        return values.reshape(len(rows), -1, values.shape[-1])
    return _singular_values(_kept_grams(rows, keep_masks, total))


def _singular_values(grams: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(grams)
    return values.clamp_min(0).sqrt().flip(-1)


def _kept_grams(rows: Tensor, keep_masks: Tensor, total: Tensor | None) -> Tensor:
    """Gram matrices `[N, s, s]` of the kept rows on their smaller side."""
    num_units, block, width = rows.shape
    kept = int(keep_masks[0].sum())
    if kept * block <= width:
        chosen = [rows[mask].flatten(0, 1).double() for mask in keep_masks]
        return torch.stack([matrix @ matrix.T for matrix in chosen])
    if 2 * kept < num_units:
        return torch.stack([gram(rows[mask]) for mask in keep_masks])
    total = gram(rows) if total is None else total
    return torch.stack([total - gram(rows[~mask]) for mask in keep_masks])


def ks_statistic(first: Tensor, second: Tensor) -> Tensor:
    """Two-sample Kolmogorov–Smirnov statistic, as `scipy.stats.ks_2samp` has it.

    Args:
        first: `[p]`.
        second: `[..., q]`.

    Returns:
        float64 `[...]`, 0 to 1.
    """
    first = first.double().sort()[0]
    second = second.double().sort(-1)[0].contiguous()
    where = torch.cat([first.expand(*second.shape[:-1], -1), second], -1).contiguous()
    return (_steps(first, where) - _steps(second, where)).abs().amax(-1)


def _steps(values: Tensor, where: Tensor) -> Tensor:
    return torch.searchsorted(values, where, right=True) / values.shape[-1]


def _smooth_ks(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """KS of two densities: a quadrature node stands for the values around it, so steps become slopes."""
    where = torch.cat([first[0], second[0]]).sort()[0].numpy()

    def cumulative(values: Tensor, weights: Tensor) -> npt.NDArray[np.float64]:
        found = np.zeros(len(where))
        for own, share in zip(values.view(NUM_PROBES, -1).numpy(), weights.view(NUM_PROBES, -1).numpy(), strict=True):
            heights = np.cumsum(share) - share / 2
            found += np.interp(where, own, heights, left=0.0, right=1 / NUM_PROBES)
        return found

    return float(np.abs(cumulative(*first) - cumulative(*second)).max())


def _mean_value(density: tuple[Tensor, Tensor], mean_square: Tensor) -> Tensor:
    """Mean singular value; the known mean of the squares takes most of the probes' error away (control variate)."""
    values, weights = density
    mean, squares = (values * weights).sum(), values.square()
    off = squares - (squares * weights).sum()
    slope = (weights * (values - mean) * off).sum() / (weights * off.square()).sum().clamp_min(1e-300)
    return mean - slope * ((squares * weights).sum() - mean_square)


def density(
    rows: Tensor, *, num_probes: int = NUM_PROBES, num_steps: int = NUM_LANCZOS_STEPS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Approximate spectrum by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017), from matrix products alone.

    The same `seed` gives the same probes, so that errors of spectra that are compared cancel in part.

    Args:
        rows: `[U, b, d]`, the rows that stay; products in float32.
        num_probes: random sign vectors.
        num_steps: Lanczos steps, fully reorthogonalised.
        seed: of the probes.

    Returns:
        Singular values `[num_probes · num_steps]` and their weights, which sum to 1; float64. The sum of f(σ) over the
        min(U·b, d) singular values is about that number times Σ weight·f(value).
    """
    matrix = rows.flatten(0, 1).float()
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    side = matrix.shape[1]
    num_steps = min(num_steps, side)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (side, num_probes), generator=generator).to(matrix)
    q = (2 * signs - 1) / side**0.5
    basis, alphas, betas = [q], [], []
    for step in range(num_steps):
        following = matrix.T @ (matrix @ q)
        alphas.append((q * following).sum(0))
        known = torch.stack(basis, -1)  # [side, probes, steps]
        for _ in range(2):
            following = following - (known * (known * following[..., None]).sum(0)).sum(-1)
        beta = following.norm(dim=0)
        if step + 1 < num_steps:
            betas.append(beta)
            q = following / beta.clamp_min(torch.finfo(beta.dtype).tiny)
            basis.append(q)
    tridiagonal = torch.diag_embed(torch.stack(alphas, -1).double())
    if betas:
        off = torch.stack(betas, -1).double()
        tridiagonal += torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values.clamp_min(0).sqrt().flatten(), (vectors[:, 0].square() / num_probes).flatten()


class Spectrum:
    """The spectrum of one layer's matrix, and how far the spectra of its row subsets are from it."""

    def __init__(self, rows: Tensor, distance: str, exact_up_to: int) -> None:
        self.rows, self.distance = rows, distance
        num_units, block, width = rows.shape
        self.exact = min(num_units * block, width) <= exact_up_to
        self.total: Tensor | None = None
        self.energies = rows.double().square().sum((1, 2))
        if distance == "energy":
            self.rows = rows[:0].clone()  # the energies say it all; a view would hold the rows
            return
        if self.exact:
            self.total = gram(rows) if width < num_units * block else None
            self.values = kept_spectra(rows, rows.new_ones(1, num_units, dtype=torch.bool), self.total)[0]
        else:
            self.density = density(rows)

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        held = self.rows.numel() * self.rows.element_size() + self.energies.numel() * 8
        return held + (0 if self.total is None else self.total.numel() * 8)

    def losses(self, keep_masks: Tensor) -> Tensor:
        """Distance of each mask's spectrum from the whole one: float64 `[N]`, 0 to 1, 0 = the same.

        Args:
            keep_masks: bool `[N, U]`, each keeping the same number of units; none kept: 1. Of a matrix of zeros
                nothing can be lost: 0.
        """
        if not float(self.energies.sum()):
            return torch.zeros(len(keep_masks), dtype=torch.float64)
        if not bool(keep_masks[0].any()):
            return torch.ones(len(keep_masks), dtype=torch.float64)
        if self.distance == "energy":
            return 1 - (keep_masks * self.energies).sum(1) / self.energies.sum()
        if not self.exact:
            found = [self._approximate_loss(self.rows[mask]) for mask in keep_masks]
            return torch.tensor(found, dtype=torch.float64)
        values = kept_spectra(self.rows, keep_masks, self.total)
        if self.distance == "ks":
            return ks_statistic(self.values, values)
        return 1 - values.sum(1) / self.values.sum()

    def _approximate_loss(self, kept: Tensor) -> float:
        found = density(kept)
        if self.distance == "ks":
            return _smooth_ks(self.density, found)
        sums = [
            _side(rows) * _mean_value(d, _energy(rows) / _side(rows))
            for rows, d in ((self.rows, self.density), (kept, found))
        ]
        return float(1 - sums[1] / sums[0])


def _side(rows: Tensor) -> int:
    return min(rows.shape[0] * rows.shape[1], rows.shape[2])


def _energy(rows: Tensor) -> Tensor:
    return rows.double().square().sum()
