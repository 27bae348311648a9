"""What a long run keeps in its work directory, so that the same command resumes it after any interruption."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_prune.atomic import replaced_file
from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_STATE = "state.safetensors"


class WorkDir:
    """A directory, or a part of one, whose files are written in one step each.

    Args:
        path: made if it is not there.

    Raises:
        CheckpointError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with replaced_file(path / "writable") as new:
                new.write_text("")
            (path / "writable").unlink()
        except OSError as error:
            raise CheckpointError(
                f"the work directory {path} cannot be written to ({error}); choose another work_dir."
            ) from error

    def stage(self, name: str) -> WorkDir:
        """A part of this directory for one stage of a run; of several processes each has its own."""
        state = PartialState()
        own = f"-{state.process_index}-of-{state.num_processes}" if state.num_processes > 1 else ""
        return WorkDir(self.path / f"{name.replace(' ', '_')}{own}")

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Note what run this directory belongs to.

        Raises:
            CheckpointError: it belongs to another, or its note is damaged.
        """
        path, asked = self.path / "run.json", json.loads(json.dumps(identity))
        if not path.exists():
            with replaced_file(path) as new:
                new.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {self.path} to start anew.") from error
        if changed:
            raise CheckpointError(
                f"{self.path} holds the work of another run: {', '.join(changed)} differ, as in {changed[0]}: found "
                f"{found.get(changed[0])!r}, asked {asked.get(changed[0])!r}. Take the same model, settings and text, "
                "another work_dir, or delete this one."
            )

    def save(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Write tensors, and a note as JSON, under a name."""
        write_tensors(self.path / f"{name}.safetensors", tensors, note)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved under a name, `None` if nothing was."""
        path = self.path / f"{name}.safetensors"
        return read_tensors(path) if path.exists() else None


class Results:
    """What the visits of one pass found, part after part, and the hidden states or gradients to go on from.

    Args:
        folder: keeps them; `None`: they are only in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.found: list[dict[str, Tensor]] = []
        self.state: list[Tensor] = []
        """Per batch, after the last part that is done; empty before the first."""
        if folder is not None and (folder / _STATE).exists():
            tensors, note = read_tensors(folder / _STATE)
            self.state = [tensors[str(batch)] for batch in range(len(tensors))]
            self.found = [read_tensors(self._part(number))[0] for number in range(note["done"])]

    @property
    def done(self) -> int:
        """Parts that are done."""
        return len(self.found)

    def put(self, found: dict[str, Tensor], state: list[Tensor]) -> None:
        """Add what the next part gave."""
        if self._folder is not None:
            write_tensors(self._part(self.done), found)
            tensors = {str(batch): values for batch, values in enumerate(state)}
            write_tensors(self._folder / _STATE, tensors, {"done": self.done + 1})
        self.found.append(found)

    def _part(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:05}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file in one step, with a note in its header; `CheckpointError` if the disk refuses."""
    own = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    own = {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in own.items()}
    try:
        with replaced_file(path) as new:
            save_file(own, new, metadata={"note": json.dumps(note or {})})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. Free disk space, or choose another work_dir."
        ) from (error)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `write_tensors` back; `CheckpointError` if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("note", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start anew.") from error
