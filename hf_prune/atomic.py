"""Replace a file or a directory as a whole, one process at a time: it holds all that is new or all that was.

Whatever is under way lies in a locked directory beside the place it is for, `.<name>.new-*`. The lock dies with its
process, so one that can be locked was left by a process that was killed, and the next to come removes it.
"""

from __future__ import annotations

import glob
import os
import platform
import secrets
import shutil
import tempfile
import weakref
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

T = TypeVar("T")
_ENDING = ".new-????????"
_REPLACED = ".replaced"


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, and put that file in the place of `path` when the block ends.

    If the block fails or is interrupted, `path` is what it was and nothing else is left.

    Raises:
        CheckpointError: it cannot be written.
    """
    with _refusing(path), beside(path) as own:
        yield own / path.name
        (own / path.name).replace(path)


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, and put it in the place of `directory` when the block ends.

    The new files are flushed to the disk first, then swapped in by renames. If the block, the flush or the swap fails
    or is interrupted, `directory` is what it was and nothing else is left. (A process killed outright between the two
    renames leaves the old files in `.<name>.new-*`; the next call moves them back.)

    Args:
        directory: real path (no symbolic link); need not exist.

    Yields:
        The empty directory to write into, on the same file system.

    Raises:
        CheckpointError: `directory` cannot be swapped by a rename or written, or another process writes to it.
    """
    if directory.exists() and (directory.is_mount() or directory == Path.cwd() or directory in Path.cwd().parents):
        raise CheckpointError(
            f"{directory} is a mount point or holds the working directory, so it cannot be replaced in one step. "
            "Save into a new directory inside it."
        )
    with _refusing(directory), reserved(directory), beside(directory) as own:
        new = own / directory.name
        new.mkdir()
        yield new
        _flush(new)
        if directory.exists():
            directory.rename(own / _REPLACED)
        new.rename(directory)


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Keep other processes from writing to `directory` during the block; this one may reserve it again.

    What dead processes left in it and beside it is removed. The lock is a file beside it that goes with the block.
    File systems without locks (some NFS and Lustre mounts), and read-only parents, get none.

    Raises:
        CheckpointError: another process has it.
    """
    directory = Path(os.path.realpath(directory))
    path = directory.with_name(f".{directory.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    descriptor, locked = -1, None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, locked = _opened(path)
        except OSError as error:
            if not directory.exists():
                raise CheckpointError(
                    f"{directory} cannot be made: {error}. Check permissions and free space, or choose another one."
                ) from error
        if locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _this_process().encode(), 0)
            _remove_abandoned(directory.parent.glob(f".{glob.escape(directory.name)}{_ENDING}"))
            _remove_abandoned(path for path in below(directory) if path.match(f".*{_ENDING}"))
        elif locked is False and (holder := os.pread(descriptor, 500, 0).decode()) != _this_process():
            raise CheckpointError(
                f"{directory} is being written to by {holder or 'another process'}. Wait until it is through, or "
                "choose another directory."
            )
        yield
    finally:
        if descriptor >= 0:
            if locked is not False:
                path.unlink(missing_ok=True)
            os.close(descriptor)
        with suppress(OSError):  # they hold something now
            for parent in made:
                parent.rmdir()


def check_free(path: Path, num_bytes: int) -> None:
    """Raise `CheckpointError` unless so many bytes can be written beside `path`, which need not exist."""
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if num_bytes > free:
        raise CheckpointError(
            f"saving needs {num_bytes:,} bytes beside {path}, {free:,} are free there. Free disk space or choose "
            "another directory."
        )


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory for temporary files, private to the user; those of dead processes are removed."""
    with beside(Path(tempfile.gettempdir(), "hf_prune"), 0o700) as own:
        yield own


def held_by(owner: object, context: AbstractContextManager[T]) -> T:
    """Enter `context`, and leave it when `owner` is no longer needed, or the process ends."""
    stack = ExitStack()
    value = stack.enter_context(context)
    weakref.finalize(owner, stack.close)
    return value


@contextmanager
def beside(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """A locked, empty directory beside `path`, removed when the block ends."""
    _remove_abandoned(path.parent.glob(f".{glob.escape(path.name)}{_ENDING}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    own = descriptor = None
    try:
        while own is None or descriptor is None:
            # not tempfile.mkdtemp: its directories are private to the user, a checkpoint follows the umask
            own = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
            own.mkdir(mode)
            with suppress(FileNotFoundError):  # another process found it before it was locked, and removes it
                descriptor = os.open(own, os.O_RDONLY)
                if _lock(descriptor) is False or not own.exists():
                    os.close(descriptor)
                    descriptor = None
        yield own
    finally:
        try:
            _discard(own)
        finally:  # in case that was interrupted
            _discard(own)
            if descriptor is not None:
                os.close(descriptor)


def below(directory: Path) -> Iterator[Path]:
    """Everything in a directory and in those in it, but what other processes remove meanwhile."""
    for folder, folders, files in os.walk(directory):
        yield from (Path(folder, name) for name in (*folders, *files))


def _remove_abandoned(found: Iterable[Path]) -> None:
    """Remove those of these directories whose process is dead; nothing where it cannot be known."""
    for own in list(found):
        with suppress(OSError):
            descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _lock(descriptor):
                    _discard(own)
            finally:
                os.close(descriptor)


def _discard(own: Path | None) -> None:
    """Remove a directory of `_beside`; what was to be replaced goes back if nothing came in its place."""
    if own is None:
        return
    path = own.with_name(own.name[1 : -len(_ENDING)])
    if (own / _REPLACED).exists() and not path.exists():
        (own / _REPLACED).rename(path)
    shutil.rmtree(own, ignore_errors=True)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file; `False` if another has it locked, `None` where there are no locks."""
    try:
        import fcntl  # not everywhere

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _opened(path: Path) -> tuple[int, bool | None]:
    """Open a lock file, made if it is not there, and lock it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(descriptor)
        with suppress(FileNotFoundError):
            if not locked or os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, locked
        os.close(descriptor)  # whoever had it has just removed it


def _this_process() -> str:
    """Name of this process, which no other has: not one of another host or container either."""
    import psutil

    start = datetime.fromtimestamp(psutil.Process().create_time())
    return f"process {os.getpid()} on {platform.node()}, started {start.isoformat(' ')}"


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn failures of the disk into an error of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. What was there before is unchanged. Check free space and "
            "permissions, or choose another directory."
        ) from error


def _flush(directory: Path) -> None:
    """Wait until every file of `directory`, and the directory entries, are on the disk."""
    for root, _, names in os.walk(directory):
        for path in [*(os.path.join(root, name) for name in names), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
