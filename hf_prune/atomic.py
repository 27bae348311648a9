"""Replace a file or a directory as a whole: it holds all that is new or all that was, whatever happens in between."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and put that file in its place when the block ends.

    If the block fails or is interrupted, `path` is what it was and nothing else is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty sibling of `directory`, and put it in its place when the block ends.

    The new files are flushed to the disk first, then swapped in by renames. If the block, the flush or the swap fails
    or is interrupted, the sibling is removed and `directory` is what it was. (A process killed outright between the two
    renames leaves the old files in `.<name>.old-*`; the next call moves them back.)

    Args:
        directory: real path (no symbolic link); need not exist.

    Yields:
        The empty directory to write into, on the same file system.

    Raises:
        CheckpointError: `directory` cannot be swapped by a rename.
    """
    if directory.exists() and (directory.is_mount() or directory == Path.cwd() or directory in Path.cwd().parents):
        raise CheckpointError(
            f"{directory} is a mount point or holds the working directory, so it cannot be replaced in one step. "
            "Save into a new directory inside it."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not directory.exists():
        for abandoned in sorted(directory.parent.glob(f".{directory.name}.old-*"))[:1]:
            abandoned.rename(directory)
    # not tempfile.mkdtemp: its directories are private to the user, a checkpoint follows the umask
    new = directory.with_name(f".{directory.name}.new-{secrets.token_hex(4)}")
    try:
        new.mkdir()
        yield new
        _flush(new)
        _swap(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Wait until every file of `directory`, and the directory entries, are on the disk."""
    for root, _, names in os.walk(directory):
        for path in [*(os.path.join(root, name) for name in names), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _swap(new: Path, directory: Path) -> None:
    if not directory.exists():
        new.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(4)}")
    try:
        directory.rename(old)
        new.rename(directory)
    finally:
        if not directory.exists():  # interrupted between the renames
            old.rename(directory)
        else:
            shutil.rmtree(old, ignore_errors=True)
