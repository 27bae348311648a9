"""Losses from logits, a chunk of tokens at a time: the logits of a whole batch need never be in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_prune.data import NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits at a time: 64 MiB in float32, whatever the vocabulary."""
CACHED_ELEMENTS = 1 << 18
"""Of these so many at a time on a CPU: what its caches hold. All in one take three times as long."""


def precision(values: Tensor) -> torch.dtype:
    """The dtype that losses are taken in: float32, or float64 for float64 logits."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats, 0 of `NO_LABEL`: `[..., T, V]` and `[..., T]` → `[..., T]`."""
    rows = logits.to(precision(logits)).flatten(0, -2)
    losses = F.cross_entropy(rows, targets.to(rows.device).flatten(), reduction="none", ignore_index=NO_LABEL)
    return losses.view(targets.shape)


def rows_at_once(logits: Tensor) -> int:
    """Tokens whose float32 copies are made together: of a `[..., V]` on the CPU what its caches hold."""
    return max(1, (CACHED_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS) // logits.shape[-1])


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence Σ p·(ln p − ln q) of each token, in nats, p of `dense`: `[..., V]` → `[...]`."""
    size, rows = logits.shape[-1], rows_at_once(logits)
    parts = zip(torch.split(dense.reshape(-1, size), rows), torch.split(logits.reshape(-1, size), rows), strict=True)
    return torch.cat([_divergence(*some) for some in parts]).view(logits.shape[:-1])


def _divergence(dense: Tensor, logits: Tensor) -> Tensor:
    log_p = dense.to(precision(dense)).log_softmax(-1)
    log_q = logits.to(log_p).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
