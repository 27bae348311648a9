"""What a long run keeps in its work directory, so that the same command resumes it after any interruption."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_prune.atomic import held_by, replaced_file
from hf_prune.errors import CheckpointError
from hf_prune.layers.processes import least_of_processes, reserved_for_all

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


_DIGEST = re.compile(r"[0-9a-f]{64}")
"""Tells people nothing."""


class WorkDir:
    """A directory, or a part of one, whose files are written in one step each. No other run may use it meanwhile.

    Args:
        path: made if it is not there.
        whole: of which it is a part.

    Raises:
        CheckpointError: it cannot be written to, or another process does.
    """

    def __init__(self, path: Path, whole: WorkDir | None = None) -> None:
        self.path, self._whole = path, whole
        if whole is None:
            held_by(self, reserved_for_all(path.absolute()))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the work directory {path} cannot be written to ({error}); choose another work_dir."
            ) from error

    def stage(self, name: str) -> WorkDir:
        """A part of this directory for one stage of a run; of several processes each has its own."""
        state = PartialState()
        own = f"-{state.process_index}-of-{state.num_processes}" if state.num_processes > 1 else ""
        return WorkDir(self.path / f"{name.replace(' ', '_')}{own}", self)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Note what run this directory belongs to; the main process writes.

        Raises:
            CheckpointError: it belongs to another, or its note is damaged.
        """
        path, asked = self.path / "run.json", json.loads(json.dumps(identity))
        if PartialState().is_main_process and not path.exists():
            with replaced_file(path) as new:
                new.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        PartialState().wait_for_everyone()
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {self.path} to start anew.") from error
        check_same_run(self.path, found, asked, "work_dir")

    def save(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Write tensors, and a note as JSON, under a name."""
        write_tensors(self.path / f"{name}.safetensors", tensors, note)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved under a name, `None` if nothing was."""
        path = self.path / f"{name}.safetensors"
        return read_tensors(path) if path.exists() else None

    def save_step(
        self, name: str, step: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None
    ) -> None:
        """Write the state after a step, from 1; the one before is removed once every process has written this one."""
        self.save(_step(name, step), tensors, note)
        PartialState().wait_for_everyone()
        (self.path / f"{_step(name, step - 1)}.safetensors").unlink(missing_ok=True)

    def last_step(self, name: str) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """The last step that all processes have done, 0 if there is none, and the state after it."""
        done = [int(path.stem.rpartition("-")[2]) for path in self.path.glob(f"{_step(name, None)}.safetensors")]
        step = least_of_processes(max(done, default=0))
        return step, *((step and self.load(_step(name, step))) or ({}, {}))


class Results:
    """What the visits of one pass found, part after part, and the hidden states or gradients to resume from.

    Args:
        work: keeps them; `None`: they are only in memory.
    """

    def __init__(self, work: WorkDir | None) -> None:
        self._work = work
        self.found: list[dict[str, Tensor]] = []
        self.state: list[Tensor] = []
        """Per batch, after the last part that is done; empty before the first."""
        if work is not None:
            done, tensors, _ = work.last_step("state")
            self.state = [tensors[str(batch)] for batch in range(len(tensors))]
            self.found = [read_tensors(self._part(number))[0] for number in range(done)]

    @property
    def done(self) -> int:
        """Parts that are done."""
        return len(self.found)

    def put(self, found: dict[str, Tensor], state: list[Tensor]) -> None:
        """Add what the next part gave."""
        if self._work is not None:
            write_tensors(self._part(self.done), found)
            self._work.save_step("state", self.done + 1, {str(batch): values for batch, values in enumerate(state)})
        self.found.append(found)

    def _part(self, number: int) -> Path:
        assert self._work is not None
        return self._work.path / f"{number:05}.safetensors"


def check_same_run(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any], setting: str) -> None:
    """Raise `CheckpointError` unless what lies at `path`, which `setting` names, is of the run that is asked for."""
    changed = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    if changed:
        shown = [name for name in changed if not _DIGEST.fullmatch(str(found.get(name)))]
        said = f": {shown[0]} was {found.get(shown[0])!r}, is {asked.get(shown[0])!r}" if shown else ""
        raise CheckpointError(
            f"{path} holds the work of another run: {', '.join(changed)} differ{said}. Take the same model, settings "
            f"and text, another {setting}, or delete this one."
        )


def _step(name: str, step: int | None) -> str:
    return f"{name}-{'*' if step is None else f'{step:05}'}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file in one step, with a note in its header; `CheckpointError` if the disk refuses."""
    own = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    own = {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in own.items()}
    with replaced_file(path) as new:
        save_file(own, new, metadata={"note": json.dumps(note or {})})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `write_tensors` back; `CheckpointError` if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("note", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start anew.") from error
