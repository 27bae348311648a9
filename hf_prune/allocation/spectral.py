"""Which layers can spare more, from their weights alone: the tail of the eigenvalue spectrum (AlphaPruning).

A heavy tail (a small exponent) means a layer that has learnt more, so it keeps more (arXiv 2410.10912, section 3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.errors import ScoreError
from hf_prune.layers.statistics import solving
from hf_prune.layers.weights import read_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_prune.structure.axes import Structure

_LEAST_LOG = 1e-3
"""Mean logarithm of the tail, at least: where all eigenvalues are equal the exponent stays finite."""


def hill_exponents(model: nn.Module, structure: Structure, *, progress: bool = True) -> dict[int, float]:
    """Mean Hill exponent of the attention and MLP matrices of each decoder layer; smaller = heavier tail.

    One matrix at a time, on its device: the Gram matrix of its smaller side, then its eigenvalues. Each expert of a
    3-D weight is a matrix. Matrices with fewer than three eigenvalues above zero do not count.

    Args:
        model: the dense model, in memory or on disk; not changed.
        structure: its structure.
        progress: show a progress bar.

    Returns:
        Decoder layer → exponent, above 1.

    Raises:
        ScoreError: a layer has no matrix to judge by, or weights that are not finite.
    """
    found: dict[int, list[float]] = {layer: [] for layer in range(len(structure.layer_paths))}
    names = [name for name in structure.counted("decoder") if len(structure.layouts[name]) >= 2]
    with torch.no_grad():
        for name in tqdm(names, desc="spectra", unit="matrix", leave=False, disable=not progress):
            weight = read_weight(model, name)
            for matrix in weight.reshape(-1, *weight.shape[-2:]):
                with solving(name):
                    exponent = hill_exponent(matrix)
                if exponent is not None:
                    found[structure.owners[name].layer].append(exponent)
    for layer, exponents in found.items():
        if not exponents:
            raise ScoreError(f"layer {layer} has no weight matrix with a spectrum; use another allocation.")
    return {layer: sum(exponents) / len(exponents) for layer, exponents in found.items()}


def hill_exponent(matrix: Tensor) -> float | None:
    """Hill estimate of the exponent of a matrix's eigenvalue tail: `1 + n / Σ ln(λ_i / λ_min)`.

    λ are the squared singular values, ascending; the tail are the `n` from position `N // 2` on (the median), λ_min
    its first (arXiv 2410.10912, eq. 2). Computed in float64 where the device has it. `None` if fewer than three
    eigenvalues are above rounding.

    Args:
        matrix: `[rows, columns]`.
    """
    values = matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    eigenvalues = torch.linalg.eigvalsh(gram).cpu().double()
    rounding = torch.finfo(values.dtype).eps * max(matrix.shape) * float(eigenvalues[-1])
    eigenvalues = eigenvalues[eigenvalues > rounding]
    if len(eigenvalues) < 3:
        return None
    tail = eigenvalues[len(eigenvalues) // 2 :]
    logs = float((tail / tail[0]).log().sum())
    return 1.0 + len(tail) / max(logs, _LEAST_LOG * len(tail))


def spectral_weights(exponents: Mapping[int, float], epsilon: float) -> dict[int, float]:
    """Linear map of the exponents to weights of the fraction removed: `1 − ε` at the smallest, `1 + ε` at the largest.

    Args:
        exponents: decoder layer → exponent.
        epsilon: spread, 0 or more, below 1.
    """
    low, high = min(exponents.values()), max(exponents.values())
    if math.isclose(low, high):
        return dict.fromkeys(exponents, 1.0)
    return {layer: 1 - epsilon + 2 * epsilon * (value - low) / (high - low) for layer, value in exponents.items()}
