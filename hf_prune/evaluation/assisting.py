"""Speculative decoding: a pruned model drafts tokens, its dense parent checks them. The text is the dense model's."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.data import evaluation_windows
from hf_prune.errors import ConfigError
from hf_prune.layers.weights import inference, input_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AssistReport:
    """What `measure_assisted` measured, over all prompts."""

    acceptance: float
    """Share of the drafted tokens that the dense model would have chosen too."""
    tokens_per_pass: float
    """New tokens for each forward pass of the dense model; 1 without a draft."""
    tokens_per_s: float
    """New tokens per second with the draft."""
    dense_tokens_per_s: float
    """New tokens per second of the dense model alone."""
    same_tokens: float
    """Share of prompts with the text of the dense model alone; below 1 only where rounding breaks ties otherwise."""


def measure_assisted(
    dense: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    prompt_len: int = 64,
    new_tokens: int = 64,
    num_prompts: int = 8,
) -> AssistReport:
    """Generate greedily with `dense` alone, and assisted by `draft` (transformers' `assistant_model`).

    Args:
        dense: the model whose text is wanted.
        draft: a smaller model with the same vocabulary.
        tokenizer: theirs.
        text: prompts are its first windows.
        prompt_len: tokens of each prompt, 2 or more.
        new_tokens: tokens generated after each, fewer where the text ends before; 1 or more.
        num_prompts: prompts at most, 1 or more.

    Raises:
        ConfigError: the vocabularies differ.
        CalibrationError: the text is shorter than a prompt.
    """
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (dense, draft)]  # type: ignore[union-attr]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"a draft must have the vocabulary of its model: found {sizes[1]} tokens, expected {sizes[0]}."
        )
    prompts = evaluation_windows(tokenizer, text, prompt_len)[:num_prompts].to(input_device(dense))
    passes: list[PreTrainedModel] = []

    def generate(prompt: Tensor, **options: Any) -> tuple[list[int], float]:
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0}
        mask, start = torch.ones_like(prompt[None]), time.perf_counter()
        output = dense.generate(prompt[None], attention_mask=mask, **settings, **options)
        return output[0, len(prompt) :].tolist(), time.perf_counter() - start  # `tolist` waits for the device

    with inference(dense), inference(draft), contextlib.ExitStack() as hooks:
        generate(prompts[0], assistant_model=draft)  # warm-up
        alone = [generate(prompt) for prompt in prompts]
        for model in (dense, draft):
            hook = model.register_forward_hook(lambda model, *_: passes.append(model))
            hooks.callback(hook.remove)
        assisted = [generate(prompt, assistant_model=draft) for prompt in prompts]
    checks = sum(model is dense for model in passes)
    number = sum(len(tokens) for tokens, _ in assisted)
    return AssistReport(
        acceptance=(number - checks) / max(len(passes) - checks, 1),  # each pass also gives a token of its own
        tokens_per_pass=number / checks,
        tokens_per_s=number / sum(seconds for _, seconds in assisted),
        dense_tokens_per_s=sum(len(tokens) for tokens, _ in alone) / sum(seconds for _, seconds in alone),
        same_tokens=sum(one[0] == other[0] for one, other in zip(alone, assisted, strict=True)) / len(prompts),
    )
