"""Read text and JSON files that others wrote: regular files of sane size only, so that reading ends and fits memory."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

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


def check_regular(path: Path) -> None:
    """Raise `OSError` unless `path` is a regular file or a link to one."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")


def parse_json(text: str) -> Any:
    """The value of a JSON text; `ValueError` if it is damaged or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
