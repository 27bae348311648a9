"""Text and JSON files. Of those that others wrote only regular ones of sane size are read, so that it ends and fits."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.atomic import replaced_file
from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    import os

    from hf_prune.errors import HFPruneError

LARGEST_FILE = 100_000_000
"""Bytes; a tokenizer of 250,000 words takes a third of it."""


def read_text(path: Path) -> str:
    """Text of a regular file (or of a link to one) of at most `LARGEST_FILE` bytes.

    Raises:
        OSError: it is missing, no regular file (a pipe, a device), or larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise OSError(f"it is larger than {LARGEST_FILE:,} bytes")
    return content.decode("utf-8")


def load_text_file(path: str | os.PathLike[str], what: str, refusal: type[HFPruneError]) -> str:
    """`read_text` for a value called `what`; `refusal` if there is none or it cannot be read."""
    try:
        return read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(f"no {what} can be read from {path}: {error}.") from error


def save_text_file(path: str | os.PathLike[str], text: str, what: str, refusal: type[HFPruneError]) -> None:
    """Write `text`, a value called `what`; an interrupted write leaves an older file intact."""
    try:
        with replaced_file(Path(path)) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise refusal(f"the {what} could not be written to {path}: {error}.") from error


def check_regular(path: Path) -> None:
    """Raise `OSError` unless `path` is a regular file or a link to one."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")


def check_files(directory: Path) -> None:
    """Raise `CheckpointError` if a file of a directory, from which models are loaded, is a pipe or a device."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if (path.suffix in (".json", ".safetensors", ".py") or path.exists()) and not path.is_dir():
            try:
                check_regular(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}. Save or download it again.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; `ValueError` if it is damaged or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
