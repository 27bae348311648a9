"""One model on several texts, against the dense one: ratios of perplexities, their geometric mean, intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_prune.calibration import Sources, asks_model, parts_of, text_of
from hf_prune.checkpoint.save_hook import tokens_in_dense
from hf_prune.data import evaluation_windows
from hf_prune.errors import CalibrationError
from hf_prune.evaluation.estimates import Estimate, mean_of
from hf_prune.evaluation.perplexity import exp, window_losses
from hf_prune.gate import check_windows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextQuality:
    """A model on one text."""

    text: str
    num_windows: int
    num_tokens: int
    """Predicted tokens: all but the first of each window."""
    perplexity: Estimate
    dense_perplexity: float | None = None
    ratio: Estimate | None = None
    """Perplexity over that of the dense model; the interval is that of the same windows under both models."""


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found."""

    texts: tuple[TextQuality, ...]
    perplexity: Estimate
    """Geometric mean over the texts."""
    ratio: Estimate | None
    """Geometric mean of the ratios over the texts; `None` without a dense model."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sources | Mapping[str, Tensor],
    *,
    dense: PreTrainedModel | None = None,
    window: int = 256,
    batch_size: int = 8,
    max_windows: int | None = None,
    progress: bool = True,
) -> Quality:
    """Perplexity on several texts, and its ratio to that of the dense model on the same windows.

    Intervals are 95 % percentiles of the bootstrap over windows: what other windows of the same texts might have
    given. They are not given for fewer than 8 windows, and do not say what other texts would give: take several, of
    different kinds, of which none was calibrated, trained or chosen with.

    Args:
        model: a causal LM, dense or pruned.
        tokenizer: the model's own.
        texts: what `load_text` reads, one or several; or windows by name, as `read_texts` gives them.
        dense: the model to compare with: with the same tokenizer, or, where tokens of its vocabulary went, on the same
            tokens.
        window: tokens of each window, 2 or more; see `perplexity`.
        batch_size: windows of each forward pass.
        max_windows: of each text, evenly spaced; default: all.
        progress: show progress bars.

    Raises:
        CalibrationError: a text is missing, or shorter than a window; or the tokenizer is not the models'.
        ConfigError: a number is out of range.
    """
    if isinstance(texts, dict) and all(hasattr(windows, "shape") for windows in texts.values()):
        windows: dict[str, Tensor] = texts
    else:
        windows = read_texts(tokenizer, texts, window, max_windows)  # type: ignore[arg-type]
    check_windows(model, [{"input_ids": ids} for ids in windows.values()])
    kept = None
    if dense is not None:
        kept = tokens_in_dense(model, dense)
        check_windows(dense, [{"input_ids": ids if kept is None else kept[ids]} for ids in windows.values()])
    found, losses, differences = [], [], []
    for name, ids in windows.items():
        num_predicted = ids.shape[1] - 1
        loss = window_losses(model, ids, batch_size, progress=progress) / num_predicted
        losses.append(loss)
        own = TextQuality(name, len(ids), len(ids) * num_predicted, mean_of([loss]).mapped(exp))
        if dense is not None:
            reference = (
                window_losses(dense, ids if kept is None else kept[ids], batch_size, progress=progress) / num_predicted
            )
            differences.append(loss - reference)
            dense_perplexity, ratio = exp(float(reference.mean())), mean_of([loss - reference]).mapped(exp)
            own = TextQuality(name, own.num_windows, own.num_tokens, own.perplexity, dense_perplexity, ratio)
        found.append(own)
    total = mean_of(differences).mapped(exp) if differences else None
    return Quality(tuple(found), mean_of(losses).mapped(exp), total)


def read_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sources, window: int = 256, max_windows: int | None = None
) -> dict[str, Tensor]:
    """Windows `[N, window]` of each text, by its name: what can be wrong with texts is found before models are loaded.

    Raises:
        CalibrationError: a text is missing, named twice, weighted, or too short; it is named.
    """
    parts = parts_of(texts, "text")
    found = {}
    for part in parts:
        if asks_model([part.source]):
            raise CalibrationError("text 'self' cannot be measured on: the model would be its own judge.")
        if not math.isclose(part.weight, 1 / len(parts)):
            raise CalibrationError(f"text {part.source!r} has a weight; all texts count the same: leave it out.")
        content = text_of(part.source, tokenizer, max_chars=None)
        name = str(part.source)
        found[name] = evaluation_windows(tokenizer, content, window, max_windows, source=name)
    return found
