"""From text to token windows: for calibration, evaluation and recovery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError, check_whole_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_PIECE_CHARS = 1 << 20
"""Calibration text is tokenised in pieces of about this length: 10.8 MB in one call take 1.5 GB, in pieces 0.3 GB."""
CALIBRATION_CHARS = 100_000_000
"""Characters of text that calibration reads at most: a bound for sources such as C4."""


def load_text(source: str | Path, *, column: str = "text", max_chars: int | None = None) -> str:
    r"""Read text from a file or from a dataset of the Hub.

    A `.txt` file is returned as it is (line ends become `\n`). Records, of the other sources, are joined by a blank
    line, as is usual for WikiText; empty ones are left out.

    Args:
        source: path of a `.txt`, `.jsonl`, `.json` or `.parquet` file, or the name of a dataset: `name`,
            `name:config` or `name:config:split` (`name::split` for the default config; the default split is `train`).
        column: the field of each record that holds the text.
        max_chars: stop reading here, in characters. A dataset of the Hub is then streamed (where the Hub can be
            reached), not downloaded.

    Returns:
        The text, not empty.

    Raises:
        CalibrationError: nothing is at `source`, it cannot be read, or has no text in `column`.
        ConfigError: `max_chars` is below 1.
    """
    if max_chars is not None:
        check_whole_numbers(max_chars=(max_chars, 1))
    path = Path(source)
    check_there(path)
    text = _read_file(path, column, max_chars) if path.is_file() else _read_dataset(str(source), column, max_chars)
    if not text.strip():
        raise CalibrationError(f"'{source}' holds no text: expected at least one sentence; pass another source")
    return text


def check_there(source: str | Path) -> None:
    """Raise `CalibrationError` if `source` is the name of a file that is missing."""
    path = Path(source)
    if path.suffix in (".txt", *_BUILDERS) and not path.is_file():
        raise CalibrationError(f"no file at {path.absolute()}: check the path of the text (`{source}`)")


def token_stream(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenise a whole text in one call, without BOS or other special tokens: int64 `[num_tokens]`."""
    # verbose=False: a text is of course longer than the model's context
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def evaluation_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> Tensor:
    """Cut the tokens of `text` into windows that follow each other without overlap.

    No BOS or other special tokens are added. The last tokens, fewer than `window`, are dropped.

    Args:
        tokenizer: the model's tokenizer.
        text: tokenised as a whole: in pieces it gives other tokens and another perplexity.
        window: tokens of each window, 1 or more.

    Returns:
        int64 `[num_windows, window]`, at least one window.

    Raises:
        CalibrationError: the text has fewer than `window` tokens.
        ConfigError: `window` is below 1.
    """
    check_whole_numbers(window=(window, 1))
    return _windows(token_stream(tokenizer, text), window, num_windows=1)


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    column: str = "text",
    num_held_out: int = 0,
) -> list[dict[str, Tensor]]:
    """Draw random windows of tokens, without replacement and without overlap.

    The text is cut into windows of `seq_len` tokens and `num_samples` of them are drawn from a generator seeded with
    `seed` (the global generator is not touched). The same seed with more samples keeps the earlier ones, in order.

    Args:
        tokenizer: the model's tokenizer; no special tokens are added.
        source: what `load_text` reads; at most its first `CALIBRATION_CHARS` characters.
        num_samples: number of windows, 1 or more.
        seq_len: tokens of each window, 1 or more.
        batch_size: windows of each batch, 1 or more; the last batch may have fewer.
        seed: of the generator, 0 or more.
        column: the field of each record that holds the text.
        num_held_out: up to so many of the other windows follow, in batches of their own.

    Returns:
        Batches of `input_ids` and `attention_mask` (all ones: no padding), int64 `[B, seq_len]`, on the CPU.

    Raises:
        CalibrationError: `source` cannot be read, or has fewer than `num_samples * seq_len` tokens.
        ConfigError: a number is out of range.
    """
    lowest = 0 if num_held_out else 1
    check_whole_numbers(
        num_samples=(num_samples, lowest), seq_len=(seq_len, 1), batch_size=(batch_size, 1), seed=(seed, 0)
    )
    tokens = _source_tokens(tokenizer, source, column)
    windows = _windows(tokens, seq_len, num_windows=num_samples)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    drawn = windows[order[: num_samples + num_held_out]]
    parts = (drawn[:num_samples], drawn[num_samples:])
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def training_windows(
    tokenizer: PreTrainedTokenizerBase, source: str | Path, window: int, *, column: str = "text"
) -> Tensor:
    """Cut a text for training into windows that follow each other without overlap; the last partial one is dropped.

    Args:
        tokenizer: the model's tokenizer; no special tokens are added.
        source: what `load_text` reads; at most its first `CALIBRATION_CHARS` characters.
        window: tokens of each window, 1 or more.
        column: the field of each record that holds the text.

    Returns:
        int64 `[num_windows, window]`, at least one window, in the order of the text.

    Raises:
        CalibrationError: `source` cannot be read, or has fewer than `window` tokens.
        ConfigError: `window` is below 1.
    """
    check_whole_numbers(window=(window, 1))
    return _windows(_source_tokens(tokenizer, source, column), window, num_windows=1)


def _source_tokens(tokenizer: PreTrainedTokenizerBase, source: str | Path, column: str) -> Tensor:
    text = load_text(source, column=column, max_chars=CALIBRATION_CHARS)
    return torch.cat([token_stream(tokenizer, piece) for piece in _pieces(text)])


def _read_file(path: Path, column: str, max_chars: int | None) -> str:
    if path.suffix not in (".txt", *_BUILDERS):
        raise CalibrationError(f"{path}: expected a .txt, .jsonl, .json or .parquet file; convert the text to one")
    try:
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                return file.read(-1 if max_chars is None else max_chars)
        import datasets

        # streaming: without a copy in the datasets cache
        rows = datasets.load_dataset(
            _BUILDERS[path.suffix], data_files=str(path.absolute()), split="train", streaming=True
        )
        return _join(rows, column, max_chars, str(path))
    except CalibrationError:
        raise
    except (OSError, ValueError, StopIteration) as error:  # StopIteration: an empty .json file
        reason = str(error) or "the file is empty"
        raise CalibrationError(
            f"{path} cannot be read as UTF-8 {path.suffix} ({reason}); repair or replace it"
        ) from error


def _read_dataset(name: str, column: str, max_chars: int | None) -> str:
    import datasets

    repository, config, split = (*name.split(":", 2), "", "")[:3]
    streaming = max_chars is not None and not datasets.config.HF_HUB_OFFLINE  # offline there is only the cache
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=streaming)
        return _join(rows, column, max_chars, name)
    except CalibrationError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"'{name}' is neither a file (looked for {Path(name).absolute()}) nor a dataset that can be loaded as "
            f"name:config:split ({error}); check the name and the connection"
        ) from error


def _join(rows: Any, column: str, max_chars: int | None, source: str) -> str:
    parts: list[str] = []
    num_chars = 0
    for row in rows:
        if column not in row:
            raise CalibrationError(f"{source}: no column '{column}' among {sorted(row)}; pass one of them as `column`")
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise CalibrationError(
                f"{source}: column '{column}' holds {type(value).__name__}, expected text; pass another `column`"
            )
        if not value or not value.strip():
            continue
        parts.append(value)
        num_chars += len(value) + 2
        if max_chars is not None and num_chars >= max_chars:
            break
    return "\n\n".join(parts)[:max_chars]


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` after line ends, every `_PIECE_CHARS` characters or, where a line is longer, there."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _windows(tokens: Tensor, window: int, num_windows: int) -> Tensor:
    """All whole windows of `tokens`, `[N, window]`, checked to be at least `num_windows`."""
    found = len(tokens) // window
    if found < num_windows:
        raise CalibrationError(
            f"the text has {len(tokens):,} tokens, but {num_windows} windows of {window} need "
            f"{num_windows * window:,}: pass a longer text, fewer windows or shorter ones"
        )
    return tokens[: found * window].view(found, window)
