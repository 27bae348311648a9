"""Calibration windows: of one text, of a weighted mixture of texts and chats, or of what the model itself says."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_prune.config.checks import Range
from hf_prune.data import (
    CALIBRATION_CHARS,
    NO_LABEL,
    check_source,
    is_dataset,
    labelled,
    load_text,
    pieces,
    text_and_answers,
    token_stream,
    windows_of,
    with_answers,
)
from hf_prune.errors import CalibrationError, check_whole_numbers
from hf_prune.layers.weights import inference, input_device, is_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Sources = Any
"""A text (a file, the name of a dataset, a `datasets.Dataset` or `IterableDataset`); several, each as `source` or
`source:weight`; or weights by source."""

GENERAL = "general"
"""The bundled mixture: exposition, stories, instructions, code, mathematics, other languages."""
SELF = "self"
"""What the dense model answers to prompts: the bundled ones, or `self:prompts.jsonl`."""
TEXTS = Path(__file__).parent / "texts"
_LAZY_PIECES = 16
"""Of a text with more pieces than this, random pieces are tokenised, as many as are needed and some to choose from."""
_MANY_TIMES = 4
"""A part of a training mixture that comes more often than this is warned of."""
_MOST = 1 << 40
"""More windows than any text has."""
_SPARE = 4
"""So many times the windows that are needed."""
_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Part:
    """A source and its share of the windows."""

    source: Any
    """Its name, or a dataset."""
    weight: float
    """As asked, above 0; without any, that of equal parts."""
    share: float
    """Of the windows: the weight, so that all sum to 1."""


def parts_of(sources: Sources, what: str = "calibration") -> list[Part]:
    """The parts of a mixture (`what` in errors); what can be seen to be wrong before anything is loaded is refused.

    Raises:
        CalibrationError: no source, one that is named twice or not there, a weight that is not above 0, or weights for
            some of the sources only.
    """
    if isinstance(sources, Mapping):
        found: list[tuple[Any, float | None]] = [(_named(source), weight) for source, weight in sources.items()]
    else:
        given = [sources] if isinstance(sources, (str, Path)) or is_dataset(sources) else list(sources)
        found = [_weighted(_named(source)) for source in given]
    weights = [1 / len(found) if weight is None else weight for _, weight in found]
    names = [source for source, _ in found]
    if not found or len(set(names)) < len(names):
        raise CalibrationError(f"{what} found the sources {names}, expected one or more different ones.")
    if not all(Range(0, ends="()").holds(weight) for weight in weights):
        raise CalibrationError(f"{what} found the weights {weights}, expected numbers above 0.")
    some = [source for source, weight in found if weight is None]
    if some and len(some) < len(found):
        raise CalibrationError(f"{what} found no weight for {some}: give every source one (`source:0.5`), or none.")
    for source in names:
        _check_part(source)
    total = math.fsum(weights)
    return [Part(source, weight, weight / total) for source, weight in zip(names, weights, strict=True)]


def calibration_names(calibration: Any) -> list[str]:
    """Texts as `--calibration` takes them; batches have no name."""
    if calibration is None or not is_text(calibration):
        return []
    parts = parts_of(calibration)
    weighted = len({part.weight for part in parts}) > 1
    return [f"{part.source}:{part.weight:g}" if weighted else str(part.source) for part in parts]


def sources_of(sources: Any, what: str = "calibration") -> dict[str, Any]:
    """The texts of a mixture by name, as `calibration`, `calibration 1`, ...; rows and batches are none."""
    found = parts_of(sources, what) if sources is not None and is_text(sources) else []
    return {f"{what} {number}" if number else what: part.source for number, part in enumerate(found)}


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    column: str = "text",
    num_held_out: int = 0,
    model: PreTrainedModel | None = None,
    assistant_only_loss: bool = False,
) -> list[dict[str, Tensor]]:
    """Draw random windows of tokens, without replacement and without overlap.

    Each text is cut into windows of `seq_len` tokens, of which as many are drawn as its share of `num_samples` says,
    from a generator seeded with `seed` (the global generator is not touched). Windows of a mixture alternate, as near
    to the shares at every point as whole windows allow. The same seed with more samples keeps the earlier ones, in
    order (but for `self`, and for texts so long that they are tokenised in part).

    Args:
        tokenizer: the model's tokenizer; no special tokens are added, but those of its chat template to chats.
        sources: what `load_text` reads, at most `CALIBRATION_CHARS` characters of each; `general`; `self`. Several
            with weights: `["a.txt:0.5", "b.jsonl:0.3", "name:0.2"]`.
        num_samples: number of windows, 1 or more.
        seq_len: tokens of each window, 1 or more.
        batch_size: windows of each batch, 1 or more; the last batch may have fewer.
        seed: of the generator, 0 or more.
        column: the field of each record that holds the text.
        num_held_out: up to so many of the other windows follow, in batches of their own.
        model: the dense model, in memory; for `self`.
        assistant_only_loss: give `labels` too, -100 for what is not an answer in a chat (text that is no chat counts);
            windows without any label are left out.

    Returns:
        Batches of `input_ids` and `attention_mask` (all ones: no padding), int64 `[B, seq_len]`, on the CPU.

    Raises:
        CalibrationError: a source cannot be read, or has too few tokens for its share; or answers are asked for, and
            there is no chat, or nothing that tells which tokens are answers.
        ConfigError: a number is out of range.
    """
    lowest = 0 if num_held_out else 1
    check_whole_numbers(
        num_samples=(num_samples, lowest), seq_len=(seq_len, 1), batch_size=(batch_size, 1), seed=(seed, 0)
    )
    parts = parts_of(sources)
    _announce(parts)
    turns = _turns([part.share for part in parts], num_samples + num_held_out)
    drawn = []
    for number, part in enumerate(parts):
        wanted, more = turns[:num_samples].count(number), turns[num_samples:].count(number)
        if num_samples and not wanted:
            raise CalibrationError(
                f"{part.source}: its share {part.share:.3g} of {num_samples} windows is none; take more samples."
            )
        if _is_self(part.source):
            how = (seq_len, batch_size, seed, assistant_only_loss)
            drawn.append(iter(_own_windows(model, tokenizer, part.source, wanted + more, *how)))
        else:
            texts = _texts(tokenizer, part.source, column, assistant_only_loss)
            drawn.append(iter(_text_windows(texts, part.source, wanted, seq_len, seed, more)))
    rows = [next(drawn[number], None) for number in turns]  # of those that are held out there may be fewer
    found = [[row for row in own if row is not None] for own in (rows[:num_samples], rows[num_samples:])]
    batches = [
        labelled(torch.stack(own[start : start + batch_size]))
        for own in found
        for start in range(0, len(own), batch_size)
    ]
    if assistant_only_loss:
        check_chats(batch["labels"] for batch in batches)
    asked = ("input_ids", "labels") if assistant_only_loss else ("input_ids",)
    return [
        {name: batch[name] for name in asked} | {"attention_mask": torch.ones_like(batch["input_ids"])}
        for batch in batches
    ]


def training_windows(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    window: int,
    *,
    number: int | None = None,
    seed: int = 0,
    assistant_only_loss: bool = False,
) -> Tensor:
    """Windows of texts for training.

    One text is cut into windows that follow each other without overlap, in its order; of one so long that it is
    tokenised in part, and where a `number` is asked for, so many are drawn. Windows of a mixture are drawn as
    `calibration_batches` does; where a part has fewer than its share of `number`, it comes again, in another order.

    Args:
        tokenizer: the model's tokenizer; no special tokens are added, but those of its chat template to chats.
        sources: as for `calibration_batches`; not `self`.
        window: tokens of each window, 1 or more.
        number: windows of a mixture, or of a long text. Default: as many as the shares allow without repeating any.
        seed: of the draw.
        assistant_only_loss: as for `calibration_batches`, but a token without a label is given as `~id`: see
            `labelled`.

    Returns:
        int64 `[num_windows, window]`, at least one window.

    Raises:
        CalibrationError: a source cannot be read, or has fewer than `window` tokens; answers as above.
        ConfigError: a number is below 1.
    """
    check_whole_numbers(window=(window, 1), number=(1 if number is None else number, 1))
    parts = parts_of(sources, "training text")
    if any(_is_self(part.source) for part in parts):
        raise CalibrationError("training text 'self' is not written here; let the model write it, and pass the file.")
    texts = [_texts(tokenizer, part.source, "text", assistant_only_loss) for part in parts]
    if len(parts) == 1 and number is not None and len(texts[0]) > _LAZY_PIECES:
        return _text_windows(texts[0], parts[0].source, 1, window, seed, number - 1)
    if len(parts) == 1:
        tokens = torch.cat([piece() for piece in texts[0]])
        return windows_of(tokens, window, num_windows=1, source=str(parts[0].source))
    _announce(parts)
    shares = [part.share for part in parts]
    most = _MOST if number is None else number
    drawn = [
        _text_windows(text, part.source, 1, window, seed, math.ceil(part.share * most))
        for text, part in zip(texts, parts, strict=True)
    ]
    turns = _turns(shares, number or max(1, int(min(len(d) / s for d, s in zip(drawn, shares, strict=True)))))
    for part, own, wanted in zip(parts, drawn, map(turns.count, range(len(parts))), strict=True):
        if wanted > _MANY_TIMES * len(own):
            logger.warning(
                "%s has %d windows and is trained on %.1f times; a longer text would teach more",
                part.source,
                len(own),
                wanted / len(own),
            )
    rows = [_again_and_again(own, seed) for own in drawn]
    return torch.stack([next(rows[part]) for part in turns])


def _announce(parts: list[Part]) -> None:
    """Say what weights that do not sum to 1 are taken as."""
    total = math.fsum(part.weight for part in parts)
    if len(parts) > 1 and abs(total - 1) > 1e-6:
        shares = ", ".join(f"{part.source} {part.share:.3g}" for part in parts)
        logger.warning("the weights of the texts sum to %.6g; they are taken as %s", total, shares)


def _again_and_again(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """All windows as they are, then in ever new orders."""
    generator = torch.Generator().manual_seed(seed)
    yield from windows
    while True:
        yield from windows[torch.randperm(len(windows), generator=generator)]


def is_text(calibration: Any) -> bool:
    """Whether `calibration` names texts, and is not batches of token ids."""
    several = calibration if isinstance(calibration, (list, tuple)) else ()
    all_texts = all(isinstance(source, str) or is_dataset(source) for source in several) and len(several) > 0
    return all_texts or isinstance(calibration, (str, Path, Mapping)) or is_dataset(calibration)


def asks_model(sources: Sources) -> bool:
    """Whether a part of the mixture is what the model itself says."""
    return any(_is_self(part.source) for part in parts_of(sources))


def _named(source: Any) -> Any:
    return source if is_dataset(source) else str(source)


def _is_self(source: Any) -> bool:
    return isinstance(source, str) and source.partition(":")[0] == SELF


def _weighted(source: Any) -> tuple[Any, float | None]:
    match = None if is_dataset(source) else _WEIGHTED.fullmatch(source)
    if match is None or Path(source).is_file():
        return source, None
    return match[1], float(match[2])


def _check_part(source: Any) -> None:
    if _is_self(source) and source != SELF:
        prompts_of(source)
    elif not is_dataset(source) and source not in (GENERAL, SELF):
        check_source(source)


def _turns(shares: Sequence[float], number: int) -> list[int]:
    """Which part each window is taken from."""
    taken, turns = [0] * len(shares), []
    for done in range(1, number + 1):
        part = max(range(len(shares)), key=lambda i: shares[i] * done - taken[i])
        taken[part] += 1
        turns.append(part)
    return turns


def _texts(
    tokenizer: PreTrainedTokenizerBase, source: Any, column: str, assistant_only: bool
) -> list[Callable[[], Tensor]]:
    """The pieces of a text, each to be tokenised."""
    if not assistant_only:
        return [partial(token_stream, tokenizer, piece) for piece in pieces(text_of(source, tokenizer, column))]
    write = partial(with_answers, tokenizer)
    text, answers = text_and_answers(_path(source), write, column=column, max_chars=CALIBRATION_CHARS)
    parts = list(pieces(text))
    firsts = itertools.accumulate(map(len, parts), initial=0)
    return [
        partial(token_stream, tokenizer, piece, answers, first) for piece, first in zip(parts, firsts, strict=False)
    ]


def _text_windows(
    texts: list[Callable[[], Tensor]], source: Any, number: int, seq_len: int, seed: int, more: int
) -> Tensor:
    """`number` random windows of one text, and up to so many `more`: `[N, seq_len]`."""
    generator = torch.Generator().manual_seed(seed)
    if len(texts) > _LAZY_PIECES:
        found: list[Tensor] = []
        for index in torch.randperm(len(texts), generator=generator).tolist():
            found.append(_whole(texts[index](), seq_len))
            if sum(len(own) for own in found) >= _SPARE * (number + more):
                break
        tokens = torch.cat(found).flatten()
    else:
        tokens = torch.cat([text() for text in texts])
    windows = windows_of(tokens, seq_len, num_windows=number, source=str(source))
    return windows[torch.randperm(len(windows), generator=generator)[: number + more]]


def check_chats(labels: Iterable[Tensor]) -> None:
    """Raise `CalibrationError` if all tokens have labels."""
    if not any(bool((own == NO_LABEL).any()) for own in labels):
        raise CalibrationError(
            "assistant_only_loss found no chat: every token counts. Give records with `messages`, or with `prompt` and "
            "`completion`; or leave it out."
        )


def text_of(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    column: str = "text",
    max_chars: int | None = CALIBRATION_CHARS,
) -> str:
    """The text of one part of a mixture that is no answer of a model; `CalibrationError` if it cannot be read."""
    return load_text(_path(source), column=column, max_chars=max_chars, tokenizer=tokenizer)


def _path(source: Any) -> Any:
    return TEXTS / "general.jsonl" if not is_dataset(source) and source == GENERAL else source


def _whole(tokens: Tensor, window: int) -> Tensor:
    return tokens[: len(tokens) // window * window].view(-1, window)


# --- what the model itself says ---------------------------------------------------------------------------------------


def _own_windows(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    number: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    assistant_only: bool,
) -> Tensor:
    """Windows of prompts and the answers that the model draws for them at temperature 1, one after the other."""
    if model is None or is_on_disk(model):
        raise CalibrationError(
            "calibration 'self' lets the dense model write, which takes a model in memory; write the answers where it "
            "fits and calibrate with that file, or calibrate with 'general'."
        )
    prompts = prompts_of(source)
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    num_tokens = 0
    with (
        inference(model),
        torch.random.fork_rng([] if input_device(model).type == "cpu" else None),
        tqdm(total=number * seq_len, desc="the model's own answers", unit="token", leave=False) as bar,
    ):
        torch.manual_seed(seed)
        while num_tokens < number * seq_len:
            for rows in torch.split(torch.randperm(len(prompts), generator=generator), batch_size):
                for prompt, answer, _ in answers(model, tokenizer, [prompts[row] for row in rows.tolist()], seq_len):
                    found += [~prompt if assistant_only else prompt, answer]
                    num_tokens += len(prompt) + len(answer)
                    bar.update(len(prompt) + len(answer))
                if num_tokens >= number * seq_len:
                    break
    return windows_of(torch.cat(found), seq_len, num_windows=number, source=source)[:number]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    *,
    greedy: bool = False,
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Let a model answer prompts, through the chat template if there is one: greedily, or drawn at temperature 1.

    Yields:
        Of each prompt its tokens and those of the answer with its end token, int64 `[T]` each, and whether it ended.
    """
    chats = tokenizer.chat_template is not None
    texts: Any = prompts
    if chats:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rows = [token_stream(tokenizer, text) for text in texts]
    rows = rows if greedy else [row[-max_new_tokens:] for row in rows]
    longest = max(len(row) for row in rows)
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    ends = torch.tensor(end if isinstance(end, list) else [] if end is None else [end], dtype=torch.int64)
    padding = int(ends[0]) if len(ends) else 0
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=padding) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    device = input_device(model)
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    chosen = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
    written: Any = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        **(chosen if greedy else drawn),
    )
    for row, answer in zip(rows, written[:, longest:].cpu(), strict=True):
        stops = torch.nonzero(torch.isin(answer, ends))[:, 0]
        yield row, answer[: int(stops[0]) + 1] if len(stops) else answer, bool(len(stops))


def prompts_of(source: str) -> list[str]:
    """The prompts of `self` or `self:file.jsonl`: the field `prompt` of each record."""
    path = Path(source.partition(":")[2] or TEXTS / "prompts.jsonl")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [record["prompt"] for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CalibrationError(
            f"{path} cannot be read as prompts, a JSON object with `prompt` in each line ({error}); repair it"
        ) from error
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise CalibrationError(f"{path} holds no prompt, or an empty one: expected text in each line.")
    return prompts
