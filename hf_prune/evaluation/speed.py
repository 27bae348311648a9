"""Size and speed of a model: parameters, bytes, prefill and decoding."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_prune.errors import HFPruneError, check_whole_numbers
from hf_prune.gate import positions_of
from hf_prune.layers.weights import inference, input_device

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class SpeedReport:
    """What `measure_speed` measured: medians over the repeats, and the setting."""

    prefill_tokens_per_s: float
    """Prompt tokens of the whole batch per second."""
    decode_tokens_per_s: float
    """New tokens of the whole batch per second, after the prompt."""
    prefill_s: float
    """Seconds for the prompt."""
    decode_s: float
    """Seconds for all new tokens."""
    prompt_len: int
    new_tokens: int
    batch_size: int
    repeats: int
    device: str
    num_threads: int
    """CPU threads of torch."""


@dataclass(frozen=True)
class PrefillComparison:
    """What `compare_prefill` measured."""

    ratio: float
    """Median of `model_a` over median of `model_b`: how many times faster `model_b` is."""
    a_s: tuple[float, ...]
    """Seconds of each run of `model_a`."""
    b_s: tuple[float, ...]
    """Seconds of each run of `model_b`."""
    prompt_len: int
    batch_size: int
    num_threads: int
    """CPU threads of torch during the runs."""


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once, 4-bit ones that share a byte each."""
    return sum((getattr(one, "quant_state", None) or one).shape.numel() for one in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, of quantised ones with their scales; tied ones count once."""
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's: values, scales, zero points
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    absmax = getattr(getattr(tensor, "quant_state", None), "absmax", None)  # bitsandbytes' scales
    return int(tensor.nbytes) + (0 if absmax is None else _bytes(absmax))


def measure_speed(
    model: nn.Module, *, prompt_len: int = 256, new_tokens: int = 32, batch_size: int = 1, repeats: int = 5
) -> SpeedReport:
    """Time prefill and greedy decoding with a key-value cache, after one warm-up round.

    Prompts are random tokens (always the same ones; the global generator is not touched). As in `generate`, prefill
    computes the logits of the last position only, where the model can. No attention implementation, dtype or thread
    count is changed.

    Args:
        model: a causal LM.
        prompt_len: tokens of each prompt, 1 or more.
        new_tokens: forward passes of one token after the prompt, 1 or more.
        batch_size: prompts at a time, 1 or more.
        repeats: rounds after the warm-up, 1 or more.

    Returns:
        Medians over the rounds.

    Raises:
        ConfigError: a number is below 1.
        HFPruneError: the model gives no key-value cache.
    """
    check_whole_numbers(prompt_len=(prompt_len, 1), new_tokens=(new_tokens, 1))
    check_whole_numbers(batch_size=(batch_size, 1), repeats=(repeats, 1))
    times = [time_request(model, prompt_len, new_tokens, batch_size) for _ in range(repeats + 1)][1:]
    prefill = statistics.median(seconds for seconds, _ in times)
    decode = statistics.median(sum(seconds) for _, seconds in times)
    return SpeedReport(
        prefill_tokens_per_s=batch_size * prompt_len / prefill,
        decode_tokens_per_s=batch_size * new_tokens / decode,
        prefill_s=prefill,
        decode_s=decode,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        device=str(input_device(model)),
        num_threads=torch.get_num_threads(),
    )


def usual_request(model: nn.Module) -> dict[str, int]:
    """Arguments of `measure_speed`: a prompt of 256 tokens and 32 new ones, or what the model has positions for."""
    positions = min(positions_of(model.config).values(), default=288)
    new_tokens = min(32, positions // 2)
    return {"prompt_len": min(256, positions - new_tokens), "new_tokens": new_tokens}


def time_request(
    model: nn.Module, prompt_len: int, new_tokens: int, batch_size: int, *, each: bool = False
) -> tuple[float, list[float]]:
    """Seconds of one prefill, and of the greedy decoding after it; random tokens, as in `measure_speed`.

    Decoding is one number, or one for `each` pass: the clock is then read when the device has done each token's work.
    """
    vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab_size, (batch_size, prompt_len), generator=generator).to(input_device(model))
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    arguments = {"logits_to_keep": 1} if last_only else {}
    with inference(model):
        clock = [_now(prompt.device)]
        output = model(input_ids=prompt, use_cache=True, **arguments)
        clock.append(_now(prompt.device))
        for _ in range(new_tokens):
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise HFPruneError(
                    f"{type(model).__name__} returned no past_key_values: decoding is measured with a key-value "
                    "cache; use compare_prefill for this model"
                )
            token = output.logits[:, -1:].argmax(dim=-1).to(prompt.device)
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            if each:
                clock.append(_now(prompt.device))
        if not each:
            clock.append(_now(prompt.device))
    prefill, *tokens = (after - before for before, after in itertools.pairwise(clock))
    return prefill, tokens


def compare_prefill(
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    prompt_len: int = 256,
    batch_size: int = 1,
    repeats: int = 10,
    num_threads: int = 1,
) -> PrefillComparison:
    """Time the prefill of two models in turns (A B A B ...), so that whatever slows the machine slows both.

    One warm-up run each is not counted. Prompts are random tokens, the same for both models unless their vocabularies
    differ. Sets the number of torch threads while it runs.

    Args:
        model_a: the reference, e.g. the dense model.
        model_b: the model compared with it, e.g. the pruned one.
        prompt_len: tokens of each prompt, 1 or more.
        batch_size: prompts at a time, 1 or more.
        repeats: runs of each model, 1 or more.
        num_threads: CPU threads, 1 or more.

    Returns:
        The times of all runs and the ratio of their medians.

    Raises:
        ConfigError: a number is below 1.
    """
    check_whole_numbers(prompt_len=(prompt_len, 1), batch_size=(batch_size, 1))
    check_whole_numbers(repeats=(repeats, 1), num_threads=(num_threads, 1))
    times: tuple[list[float], list[float]] = ([], [])
    with _threads(num_threads):
        for _ in range(repeats + 1):
            for model, seconds in zip((model_a, model_b), times, strict=True):
                seconds.append(time_request(model, prompt_len, 0, batch_size, each=True)[0])
    a_s, b_s = (tuple(seconds[1:]) for seconds in times)
    ratio = statistics.median(a_s) / statistics.median(b_s)
    return PrefillComparison(ratio, a_s, b_s, prompt_len, batch_size, num_threads)


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _now(device: torch.device) -> float:
    """Seconds of the clock, when the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
