"""Perplexity of a causal LM on a text, in windows that do not overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.data import evaluation_windows
from hf_prune.errors import check_whole_numbers
from hf_prune.gate import check_windows
from hf_prune.layers.losses import CHUNK_ELEMENTS, next_token
from hf_prune.layers.processes import sum_numbers
from hf_prune.layers.weights import inference, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_prune.layers.walk import Walk


@dataclass(frozen=True)
class PerplexityReport:
    """What `perplexity` measured."""

    perplexity: float
    """`exp(nll_sum / num_tokens)`; infinite where that overflows, NaN where the model gives NaN."""
    nll_sum: float
    """Negative log-likelihood of all predicted tokens, in nats."""
    num_tokens: int
    """Predicted tokens: `window - 1` of each window."""
    window: int
    """Tokens of each window."""


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 256,
    batch_size: int = 8,
    max_windows: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PerplexityReport:
    """Measure perplexity: `exp` of the mean negative log-likelihood per predicted token.

    The text is cut into windows as `evaluation_windows` does (no overlap, no BOS, the last partial window dropped).
    Each window is predicted from its own tokens only, so its first token is not counted. Log-likelihoods are taken in
    float32 (float64 for a float64 model) and summed in float64. The model is used in evaluation mode without
    gradients, and every module's mode is restored.

    Args:
        model: a causal LM; called as `model(input_ids=..., use_cache=False).logits`.
        tokenizer: the model's tokenizer.
        text: the text to predict.
        window: tokens of each window, 2 or more; no more than a table of positions has, if the model has one.
        batch_size: windows of each forward pass, 1 or more. Changes nothing but memory and speed.
        max_windows: measure this many windows only, evenly spaced over the text (`None`: all).
        device: where the token ids go. Default: where the input embeddings are.
        progress: show a progress bar.

    Returns:
        The perplexity and what it was computed from.

    Raises:
        CalibrationError: the text is shorter than one window, or the tokenizer is not this model's.
        ConfigError: a number is out of range.
    """
    _check_numbers(window, batch_size, max_windows)
    windows = evaluation_windows(tokenizer, text, window, max_windows)
    check_windows(model, [{"input_ids": windows}])
    nll_sum = float(window_losses(model, windows, batch_size, device=device, progress=progress).sum())
    num_tokens = len(windows) * (window - 1)
    return PerplexityReport(exp(nll_sum / num_tokens), nll_sum, num_tokens, window)


def window_losses(
    model: nn.Module,
    windows: Tensor,
    batch_size: int,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Tensor:
    """Negative log-likelihood of each window `[N, T]`, summed over its `T - 1` predicted tokens: float64 `[N]`.

    Args as for `perplexity`, which is `exp` of their mean per token.
    """
    device = input_device(model) if device is None else device
    found: list[float] = []
    with inference(model):
        starts = range(0, len(windows), batch_size)
        for start in tqdm(starts, desc="perplexity", unit="batch", disable=not progress):
            ids = windows[start : start + batch_size].to(device)
            found += _nll_sums(model(input_ids=ids, use_cache=False).logits, ids)
    return torch.tensor(found, dtype=torch.float64)


def perplexity_of(walk: Walk) -> float:
    """As `perplexity`, on the windows of a walk (of all processes): the model may be on disk, and is read once then."""
    total, num_tokens = 0.0, 0
    with inference(walk.model):
        for output in walk.outputs():
            num_tokens += output.ids[:, 1:].numel()
            for row, start, logits in output.chunks():
                targets = output.ids[row, start + 1 : start + 1 + len(logits)]
                total += next_token(logits[: len(targets)], targets).sum(dtype=torch.float64).item()
    total, tokens = sum_numbers(total, num_tokens)
    return exp(total / tokens)


def _nll_sums(logits: Tensor, ids: Tensor) -> list[float]:
    """NLL of each row of `ids[:, 1:]` under `logits` `[B, T, V]`, never holding all log-probabilities at once."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    found = []
    for row, targets in zip(logits, ids.to(logits.device), strict=True):
        chunks = [(start, targets[start + 1 : start + 1 + step]) for start in range(0, len(targets) - 1, step)]
        losses = [next_token(row[start : start + len(own)], own).sum(dtype=torch.float64) for start, own in chunks]
        found.append(float(torch.stack(losses).sum()))
    return found


def exp(value: float) -> float:
    """`e` to a number; infinite where that overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _check_numbers(window: int, batch_size: int, max_windows: int | None) -> None:
    check_whole_numbers(window=(window, 2), batch_size=(batch_size, 1))
    if max_windows is not None:
        check_whole_numbers(max_windows=(max_windows, 1))
