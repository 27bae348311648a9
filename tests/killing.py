"""Commands in processes of their own, forked from one that has everything imported: to be killed, on full disks."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
OURS = ("cli", "pipeline", "sweep", "recovery.recover", "checkpoint.saving", "printing", "demo", "exporting.gguf")
THEIRS = ("transformers.models.llama.modeling_llama", "matplotlib.pyplot", "peft")
FORKS.set_forkserver_preload([*(f"hf_prune.{name}" for name in OURS), *THEIRS])
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass
class Ended:
    code: int
    output: str
    writes: int
    seconds: float
    pid: int


def command(folder, words, *, at=None, what="kill", after_s=None):
    """Run `hf-prune` in `folder`; at the given write (from 1), or after some time, something happens to it.

    Args:
        folder: working directory; writes below it are counted.
        words: the command line.
        at: number of the write: a file is about to be opened for writing, made, renamed or removed.
        what: `kill`, `terminate` (SIGTERM), or `full`: from then on nothing can be opened for writing or made.
        after_s: seconds after which it is killed.
    """
    counted, log = FORKS.Value("i", 0), folder.parent / f"{folder.name}.log"
    process = FORKS.Process(target=_run, args=(str(folder), [str(word) for word in words], at, what, counted, str(log)))
    start = time.monotonic()
    process.start()
    process.join(after_s if after_s is not None else 120)
    if process.is_alive():
        process.kill()
        process.join()
        assert after_s is not None, log.read_text()
    seconds = time.monotonic() - start
    return Ended(process.exitcode, log.read_text(), counted.value, seconds, process.pid)


def _run(folder, words, at, what, counted, log):
    os.chdir(folder)
    os.environ["COLUMNS"] = "500"
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    inside = os.path.join(folder, "")

    def watch(event, args):
        if event not in WRITES or not isinstance(args[0], (str, os.PathLike)):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if not os.path.abspath(args[0]).startswith(inside):
            return
        counted.value += 1
        if at is None or counted.value < at:
            return
        if what == "full":
            if event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        elif counted.value == at:
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)

    sys.addaudithook(watch)
    from transformers.utils import logging

    from hf_prune.cli.main import app

    logging.disable_progress_bar()
    if words[0] == "demo":  # of a tiny model, one method
        from hf_prune.cli import demo

        demo.run_demo.__kwdefaults__["model_dir"] = Path("../demo")
        demo.RUNS, demo.SAVED = {"magnitude": demo.RUNS["magnitude"]}, ("magnitude", 0.3)
    if words[0] == "quantise":  # without torchao: the model as it is
        from hf_prune.exporting import quantising
        from hf_prune.loading import load_model

        quantising.find_spec = bool
        quantising._load_quantised = lambda source, *_: load_model(source)
    try:
        app(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def hold(directory, taken, done):
    """Keep a directory reserved, and have one being made beside it."""
    from pathlib import Path

    from hf_prune.atomic import replaced_directory

    with replaced_directory(Path(directory)) as new:
        (new / "half").write_text("half")
        taken.set()
        done.wait(60)
