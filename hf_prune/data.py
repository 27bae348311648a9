"""From text to token windows: for calibration, evaluation and recovery."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from hf_prune.errors import CalibrationError, check_whole_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".json": "json", ".parquet": "parquet"}
_KINDS = (".txt", ".jsonl", *_BUILDERS)
_PIECE_CHARS = 1 << 20
"""Calibration text is tokenised in pieces of about this length: 10.8 MB in one call take 1.5 GB, in pieces 0.3 GB."""
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
NO_LABEL = -100
"""Label of a token that does not count in a loss, as everywhere in transformers."""
CALIBRATION_CHARS = 100_000_000
"""Characters of text that calibration reads at most: a bound for sources such as C4."""
Spans = list[tuple[int, int]]
"""First character, and the one after the last."""
Write = Callable[[list[Any]], tuple[str, Spans]]
"""A chat as text, and which of it the assistant says."""


def load_text(
    source: Any,
    *,
    column: str = "text",
    max_chars: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    r"""Read text from a file or from a dataset of the Hub.

    A `.txt` file is returned as it is (line ends become `\n`). Records, of the other sources, are joined by a blank
    line, as is usual for WikiText; empty ones are left out. Chats, which have `messages` (or `prompt` and `completion`)
    in place of text, are written as the chat template of `tokenizer` has it.

    Args:
        source: path of a `.txt`, `.jsonl`, `.json` or `.parquet` file, or the name of a dataset: `name`,
            `name:config` or `name:config:split` (`name::split` for the default config; the default split is `train`);
            or a dataset itself: a `datasets.Dataset` or `IterableDataset` of records.
        column: the field of each record that holds the text.
        tokenizer: for chats; without one, or a template, each message follows its role and a colon.
        max_chars: stop reading here, in characters. A dataset of the Hub is then streamed (where the Hub can be
            reached), not downloaded.

    Returns:
        The text, not empty.

    Raises:
        CalibrationError: nothing is at `source`, it cannot be read, or has no text in `column`.
        ConfigError: `max_chars` is below 1.
    """
    return text_and_answers(source, partial(_written, tokenizer), column=column, max_chars=max_chars)[0]


def text_and_answers(source: Any, write: Write, *, column: str, max_chars: int | None) -> tuple[str, Spans]:
    """`load_text`, chats written by `write`, and from where to where it is not what somebody asks an assistant."""
    if max_chars is not None:
        check_whole_numbers(max_chars=(max_chars, 1))
    if is_dataset(source):
        text, spans = _join(source, column, max_chars, "the dataset", write)
    else:
        check_source(source)
        path = Path(source)
        read = partial(_read_file, path) if path.is_file() else partial(_read_dataset, str(source))
        text, spans = read(column, max_chars, write)
    if not text.strip():
        raise CalibrationError(f"'{source}' holds no text: expected at least one sentence; pass another source")
    return text, spans


def is_dataset(source: Any) -> bool:
    """Whether this is a dataset of the `datasets` library, of records that are not tokenised yet."""
    return hasattr(source, "column_names") and "input_ids" not in (source.column_names or ())


def check_source(source: str | Path) -> None:
    """Raise `CalibrationError` if `source` is a file that is not there, or of a kind that is not read."""
    path = Path(source)
    if path.is_file() and path.suffix not in _KINDS:
        raise CalibrationError(f"{path}: expected a .txt, .jsonl, .json or .parquet file; convert the text to one")
    if path.suffix in _KINDS and not path.is_file():
        raise CalibrationError(f"no file at {path.absolute()}: check the path of the text (`{source}`)")


def token_stream(tokenizer: PreTrainedTokenizerBase, text: str, answers: Spans | None = None, first: int = 0) -> Tensor:
    """Tokenise a whole text in one call, without BOS or other special tokens: int64 `[num_tokens]`.

    Where `answers` are given (`text` begins at the character `first` of theirs), a token `id` that begins outside of
    them is `~id`, which is negative: see `labelled`.
    """
    # verbose=False: a text is of course longer than the model's context
    options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    if answers is None:
        return torch.tensor(tokenizer(text, **options)["input_ids"], dtype=torch.int64)
    if not tokenizer.is_fast:
        raise CalibrationError(
            "assistant_only_loss found a tokenizer that does not say where its tokens are in the text; expected a fast "
            "one (a tokenizer.json)."
        )
    found = tokenizer(text, return_offsets_mapping=True, **options)
    ids, begins = torch.tensor(found["input_ids"]), torch.tensor(found["offset_mapping"]).view(-1, 2)[:, 0] + first
    starts, stops = torch.tensor([(-1, -1), *answers]).unbind(1)
    last = torch.searchsorted(starts, begins, right=True) - 1
    return torch.where(begins < stops[last], ids, ~ids)


def labelled(windows: Tensor) -> dict[str, Tensor]:
    """`input_ids` and `labels` of windows; a token without a label (-100) is given as `~id`."""
    return {
        "input_ids": torch.where(windows < 0, ~windows, windows),
        "labels": windows.masked_fill(windows < 0, NO_LABEL),
    }


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int,
    max_windows: int | None = None,
    *,
    source: str = "the text",
) -> Tensor:
    """Cut the tokens of `text` into windows that follow each other without overlap.

    No BOS or other special tokens are added. The last tokens, fewer than `window`, are dropped.

    Args:
        tokenizer: the model's tokenizer.
        text: tokenised as a whole: in pieces it gives other tokens and another perplexity.
        window: tokens of each window, 1 or more.
        max_windows: this many windows only, evenly spaced over the text (`None`: all).
        source: what the text is called in errors.

    Returns:
        int64 `[num_windows, window]`, at least one window.

    Raises:
        CalibrationError: the text has fewer than `window` tokens.
        ConfigError: a number is below 1.
    """
    check_whole_numbers(window=(window, 1))
    windows = windows_of(token_stream(tokenizer, text), window, num_windows=1, source=source)
    if max_windows is not None and max_windows < len(windows):
        check_whole_numbers(max_windows=(max_windows, 1))
        return windows[torch.arange(max_windows) * len(windows) // max_windows]
    return windows


def _read_file(path: Path, column: str, max_chars: int | None, write: Write) -> tuple[str, Spans]:
    try:
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                text = file.read(-1 if max_chars is None else max_chars)
                return text, [(0, len(text))]
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return _join(_json_lines(file), column, max_chars, str(path), write)
        import datasets

        # streaming: without a copy in the datasets cache
        rows = datasets.load_dataset(
            _BUILDERS[path.suffix], data_files=str(path.absolute()), split="train", streaming=True
        )
        return _join(rows, column, max_chars, str(path), write)
    except CalibrationError:
        raise
    except (OSError, ValueError, StopIteration) as error:  # StopIteration: an empty .json file
        reason = str(error) or "the file is empty"
        raise CalibrationError(
            f"{path} cannot be read as UTF-8 {path.suffix} ({reason}); repair or replace it"
        ) from error


def _json_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds a {type(row).__name__}, expected an object")
            yield row


def _read_dataset(name: str, column: str, max_chars: int | None, write: Write) -> tuple[str, Spans]:
    import datasets

    repository, config, split = (*name.split(":", 2), "", "")[:3]
    streaming = max_chars is not None and not datasets.config.HF_HUB_OFFLINE  # offline there is only the cache
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=streaming)
        return _join(rows, column, max_chars, name, write)
    except CalibrationError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"'{name}' is neither a file (looked for {Path(name).absolute()}) nor a dataset that can be loaded as "
            f"name:config:split ({error}); check the name and the connection"
        ) from error


def _join(rows: Any, column: str, max_chars: int | None, source: str, write: Write) -> tuple[str, Spans]:
    parts: list[str] = []
    answers: Spans = []
    num_chars = 0
    for row in rows:
        chat = None if row.get(column) else _chat_of(row)
        if column not in row and chat is None:
            raise CalibrationError(f"{source}: no column '{column}' among {sorted(row)}; pass one of them as `column`")
        value, spans = row.get(column), None
        if chat is not None:
            try:
                value, spans = write(chat)
            except (TypeError, KeyError, TemplateError) as error:
                raise CalibrationError(
                    f"{source}: a chat cannot be written as text ({error}); expected messages with `role` and "
                    "`content`, in an order that the tokenizer's chat template takes."
                ) from error
        if value is not None and not isinstance(value, str):
            raise CalibrationError(
                f"{source}: column '{column}' holds {type(value).__name__}, expected text; pass another `column`"
            )
        if not value or not value.strip():
            continue
        parts.append(value)
        spans = [(0, len(value))] if spans is None else spans
        answers += [(num_chars + start, num_chars + stop) for start, stop in spans]
        num_chars += len(value) + 2
        if max_chars is not None and num_chars >= max_chars:
            break
    return "\n\n".join(parts)[:max_chars], answers


def _chat_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The messages of a record in one of the usual forms."""
    if row.get("messages"):
        return list(row["messages"])
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return [*prompt, *completion]
    return None


def _written(tokenizer: PreTrainedTokenizerBase | None, chat: list[Any]) -> tuple[str, Spans]:
    """A chat by the template, or each message after its role and a colon; who says what is not looked at."""
    if tokenizer is not None and tokenizer.chat_template is not None:
        return str(tokenizer.apply_chat_template(chat, tokenize=False)), []
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat), []


def with_answers(tokenizer: PreTrainedTokenizerBase, chat: list[Any]) -> tuple[str, Spans]:
    """A chat by the template, and what the assistant says in it, ends of turns included.

    The template marks that by `{% generation %}`. Where it does not, an answer is what the messages up to it have more
    than those before, with the prompt for an answer.

    Raises:
        CalibrationError: no template, or one without marks that writes a message otherwise once others follow.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError("assistant_only_loss found a tokenizer without a chat template; expected one that has.")
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        texts, spans = render_jinja_template(
            [chat], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
        return texts[0], spans[0]
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    text, answers = str(write(chat)), []
    for number in [number for number, message in enumerate(chat) if message["role"] == "assistant"]:
        before = str(write(chat[:number], add_generation_prompt=True)) if number else ""
        after = str(write(chat[: number + 1]))
        if not (after.startswith(before) and text.startswith(after)):
            raise CalibrationError(
                "assistant_only_loss found a chat template that writes earlier messages otherwise once others follow, "
                "and does not mark answers. Give chats of one answer each, or a template with {% generation %}."
            )
        answers.append((len(before), len(after)))
    return text, answers


def pieces(text: str) -> Iterator[str]:
    """Cut `text` after line ends, every `_PIECE_CHARS` characters or, where a line is longer, there."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def windows_of(tokens: Tensor, window: int, *, num_windows: int, source: str = "the text") -> Tensor:
    """All whole windows of `tokens` with a label after the first token, `[N, window]`.

    Raises:
        CalibrationError: they are fewer than `num_windows`.
    """
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    windows = windows[(windows[:, min(1, window - 1) :] >= 0).any(1)]
    if len(windows) < num_windows:
        answers = int((tokens >= 0).sum())
        found = f"{len(tokens):,} tokens" + (f", {answers:,} of them answers" if answers < len(tokens) else "")
        raise CalibrationError(
            f"{source} has {found}, but {num_windows} windows of {window} need "
            f"{num_windows * window:,}: pass a longer text, fewer windows or shorter ones"
        )
    return windows
