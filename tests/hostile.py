"""Load hostile checkpoints in one process whose memory is bounded, and print what became of each as JSON.

python hostile.py directory own|remote

`directory` holds one folder per base: `good` is as it was saved; every other folder is a copy that was changed. `own`
loads with hf_prune imported, `remote` with `trust_remote_code=True` in a process without it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10, 3 << 30
"""Per load, and of addresses beyond those that are in use after the imports."""


def main(root: Path, mode: str) -> None:
    if mode == "own":
        import hf_prune  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    assert (mode == "own") == ("hf_prune" in sys.modules)
    transformers.PreTrainedModel.set_use_kernels = _use_kernels
    loaders: dict[str, Any] = {
        "remote": lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    }
    if mode == "own":
        loaders = own_loaders(AutoModelForCausalLM)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _stop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = [
        {"base": base.name, "case": case.name, **outcomes(loaders, base / "good", case)}
        for base in sorted(root.iterdir())
        for case in sorted(base.iterdir())
    ]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"results": results, "grown_mb": grown // 1024}))


def own_loaders(auto: Any) -> dict[str, Any]:
    from hf_prune import PrunedModelForCausalLM
    from hf_prune.loading import load_model

    return {
        "facade": PrunedModelForCausalLM.from_pretrained,
        "auto": auto.from_pretrained,
        "hub": lambda path: auto.from_pretrained(as_hub_id(path), local_files_only=True),
        "command_line": lambda path: load_model(str(path)),
    }


def as_hub_id(path: Path) -> str:
    """Put the files into the Hub's cache, and return the id under which they lie there."""
    commit = "a" * 40
    repository = Path(os.environ["HF_HUB_CACHE"], f"models--{path.parent.name}--{path.name}")
    shutil.rmtree(repository, ignore_errors=True)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(path.absolute())
    return f"{path.parent.name}/{path.name}"


_expected: dict[tuple[Path, str], Any] = {}


def outcomes(loaders: dict[str, Any], good: Path, case: Path) -> dict[str, Any]:
    """`same`, `other` (logits), `attributes` (what differs), or the class of the error, by loader."""
    import torch

    found = {}
    for name, load in loaders.items():
        start, stage = time.process_time(), "load"
        try:
            signal.alarm(SECONDS)
            if (good, name) not in _expected:
                model = load(good)
                _expected[good, name] = logits(model), attributes(model)
            model = load(case)
            stage = "forward"
            result = logits(model)
            expected, known = _expected[good, name]
            different = sorted(set(attributes(model).items()) ^ set(known.items()))
            outcome = "same" if torch.equal(result, expected) else "other"
            found[name] = [outcome, str(different[:3]) if different else ""]
        except BaseException as error:
            kinds = [cls.__name__ for cls in type(error).__mro__]
            ours = "HFPruneError" in kinds or "CheckpointError" in kinds
            found[name] = ["refused" if ours else f"{stage}: {kinds[0]}", str(error)[:200]]
        finally:
            signal.alarm(0)
        found[name].append(round(time.process_time() - start, 2))
    return found


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 21).reshape(2, 9), use_cache=False).logits


def attributes(model: Any) -> dict[str, str]:
    """Everything that modules keep besides parameters, children and configs."""
    return {
        f"{path}.{name}": repr(value)[:60]
        if isinstance(value, (bool, int, float, str, tuple, list))
        else type(value).__name__
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in ("_pruning_plan", "name_or_path")
    }


def _use_kernels(self: Any, use_kernels: bool, *_: Any) -> None:
    if use_kernels:
        raise SystemExit("a checkpoint asked for native code")


def _stop(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
