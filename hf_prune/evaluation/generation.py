"""What a pruned model writes: whether it loops, stops, and says what the dense one says. Greedy decoding."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_prune.calibration import SELF, answers, prompts_of
from hf_prune.checkpoint.save_hook import tokens_in_dense
from hf_prune.data import token_stream
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.evaluation.estimates import Estimate, mean_of, share_of
from hf_prune.gate import check_windows
from hf_prune.layers.weights import inference, input_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FEWEST_PROMPTS = 32
"""Of fewer, half of which loop, the interval of the rate would be wider than 0.34."""
SAMPLES, SAMPLE_TOKENS = 3, 32
"""Prompts of a report, and new tokens of each."""
_REPEATS, _LOOP_TOKENS = 3, 12
"""A text loops if it ends in a piece said three times or more, over at least twelve tokens."""


@dataclass(frozen=True)
class GenerationReport:
    """What one model wrote."""

    num_prompts: int
    max_new_tokens: int
    loops: Estimate
    """Share of answers that end by saying the same piece again and again."""
    ends: Estimate
    """Share of answers that the model ended itself, within `max_new_tokens`."""
    length: Estimate
    """Mean number of new tokens."""
    agreement: Estimate | None = None
    """Share of the tokens of the dense model's answers that this model would have chosen too, each after the dense
    model's text so far; averaged over answers. `None` without a dense model."""
    dense: GenerationReport | None = None


def read_prompts(number: int, source: str | None = None) -> list[str]:
    """Prompts for `check_generation`: the first of a file (`prompt` in each JSON line), or bundled ones.

    Raises:
        ConfigError: `number` is so small that the result would say nothing.
        CalibrationError: the file has fewer, or cannot be read.
    """
    if type(number) is not int or number < FEWEST_PROMPTS:
        raise ConfigError(
            f"generation: found {number!r} prompts, expected {FEWEST_PROMPTS} or more: rates of fewer say nothing."
        )
    found = prompts_of(SELF if source is None else f"{SELF}:{source}")
    if len(found) < number:
        raise CalibrationError(f"{source or 'the bundled file'} holds {len(found)} prompts, asked were {number}.")
    return found[:number]


def check_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    dense: PreTrainedModel | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> GenerationReport:
    """Let a model answer prompts (through its chat template, if it has one), and look at the answers.

    Args:
        model: a causal LM, dense or pruned, in memory.
        tokenizer: the model's own.
        prompts: `FEWEST_PROMPTS` or more, see `read_prompts`.
        dense: the model it was pruned from, to compare with.
        max_new_tokens: of each answer, 1 or more.
        batch_size: prompts at a time.

    Raises:
        ConfigError: too few prompts, or a dense model of another vocabulary.
    """
    if len(prompts) < FEWEST_PROMPTS:
        read_prompts(len(prompts))
    reference = None
    agreement = None
    if dense is not None:
        if tokens_in_dense(model, dense) is not None:
            raise ConfigError("generation: the models have other vocabularies; look at each alone, without dense.")
        theirs = _written(dense, tokenizer, prompts, max_new_tokens, batch_size)
        reference = _report(theirs, max_new_tokens)
        agreement = mean_of([torch.tensor([_agreement(model, *pair[:2]) for pair in theirs])])
    found = _report(_written(model, tokenizer, prompts, max_new_tokens, batch_size), max_new_tokens)
    return GenerationReport(
        found.num_prompts, max_new_tokens, found.loops, found.ends, found.length, agreement, reference
    )


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a model in memory writes after the first `SAMPLES` bundled prompts, greedily: for people to read.

    Empty, with a warning, where the model cannot: a report is not worth a failed run.
    """
    prompts = prompts_of(SELF)[:SAMPLES]
    try:
        ids = [token_stream(tokenizer, prompt)[None] for prompt in prompts]
        check_windows(model, [{"input_ids": torch.cat([row, row.new_zeros(1, 2 * SAMPLE_TOKENS)], 1)} for row in ids])
        with inference(model):
            written = list(answers(model, tokenizer, prompts, SAMPLE_TOKENS, greedy=True))
    except Exception as error:  # of `generate`, which fails in as many ways as there are models
        logger.warning("no samples of text: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return {}
    texts = (tokenizer.decode(answer, skip_special_tokens=True) for _, answer, _ in written)
    return {prompt: " ".join(str(text).split()) for prompt, text in zip(prompts, texts, strict=True)}


def loops(tokens: list[int]) -> bool:
    """Whether a text ends in a piece that is said `_REPEATS` times or more, over at least `_LOOP_TOKENS` tokens."""
    for period in range(1, len(tokens) // _REPEATS + 1):
        length = max(_REPEATS * period, _LOOP_TOKENS)
        if len(tokens) >= length and tokens[-length:-period] == tokens[period - length :]:
            return True
    return False


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int, batch_size: int
) -> list[tuple[Tensor, Tensor, bool]]:
    with inference(model):
        return [
            answer
            for start in range(0, len(prompts), batch_size)
            for answer in answers(model, tokenizer, prompts[start : start + batch_size], new_tokens, greedy=True)
        ]


def _report(written: list[tuple[Tensor, Tensor, bool]], max_new_tokens: int) -> GenerationReport:
    number = len(written)
    lengths = torch.tensor([float(len(answer)) for _, answer, _ in written])
    return GenerationReport(
        number,
        max_new_tokens,
        share_of(sum(loops(answer.tolist()) for _, answer, _ in written), number),
        share_of(sum(ended for _, _, ended in written), number),
        mean_of([lengths]),
    )


def _agreement(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> float:
    """Share of the tokens of an answer that are the model's first choice after what is before them."""
    with inference(model):
        ids = torch.cat([prompt, answer])[None].to(input_device(model))
        chosen = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return float((chosen.cpu() == answer).double().mean())
