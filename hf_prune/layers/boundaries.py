"""Hidden states between the layers of a model, in memory or on disk, all of them or some."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_prune.errors import CalibrationError
from hf_prune.layers.work import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MEMORY_BYTES = 1 << 31
"""Hidden states that take more than this are kept on disk."""

HELD = 8
"""About so many times the hidden states of a model are held at once by what holds most, repair."""

Rerun = Callable[[range, Sequence["Tensor"]], Iterator[list["Tensor"]]]


def is_large(values: Tensor, num_batches: int) -> bool:
    """Whether hidden states of so many batches, of which these are one, are to be kept in files."""
    return HELD * num_batches * values.nbytes > MEMORY_BYTES


def on_disk(values: Tensor) -> Tensor:
    """A copy on the CPU that lies in a temporary file: read when it is used, and gone with the tensor.

    Raises:
        CalibrationError: the disk has no room for it.
    """
    if not values.numel():
        return values.cpu()
    with tempfile.TemporaryFile() as file:
        try:
            values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
        except OSError as error:
            raise CalibrationError(
                f"hidden states could not be written to {tempfile.gettempdir()}: {error}. Free disk space, set TMPDIR, "
                "or take fewer or shorter calibration samples."
            ) from error
        found = torch.from_numpy(np.memmap(file, np.uint8, "c"))
    return found.view(values.dtype).view(values.shape)


class Boundaries:
    """The hidden states before each layer and after the last: per boundary one tensor `[B, T, D]` per batch.

    Args:
        first: those before the first layer.
        num_layers: of the model.
        every: only every so many are kept, 1 or more; the others are computed again by `rerun`. More, where the disk
            has no room for so many.
        rerun: the hidden states after each of some layers, from those before the first of these.
        folder: where they are kept, and found again by a resumed run; `None`: in memory, or in a temporary directory if
            they are large.

    Raises:
        CalibrationError: the disk has not even room for the first and the last.
    """

    def __init__(
        self, first: list[Tensor], num_layers: int, every: int, rerun: Rerun, folder: Path | None = None
    ) -> None:
        self._num_layers, self._every, self._rerun = num_layers, every, rerun
        self._memory: dict[int, list[Tensor]] = {}
        self._segment: dict[int, list[Tensor]] = {}
        each = sum(hidden.nbytes for hidden in first)
        self._temporary = None
        if folder is None and self._kept() * each > MEMORY_BYTES:
            self._temporary = tempfile.TemporaryDirectory(prefix="hf_prune-")
            folder = Path(self._temporary.name)
        self._folder = folder
        if folder is not None:
            there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            free, needed = shutil.disk_usage(folder).free, self._kept() * each
            found = f"the hidden states between the layers take {needed:,} bytes, {free:,} are free in {folder}"
            while self._kept() * each - there > free:
                if self._every >= num_layers:
                    raise CalibrationError(
                        f"{found}. Free disk space, choose another work_dir (or TMPDIR), or fewer or shorter "
                        "calibration samples."
                    )
                self._every += 1
            if self._every > every:
                logger.warning(
                    "%s: those before every %d layers are kept. The layers between are read and run once more, and "
                    "%s bytes of hidden states are held in memory meanwhile.",
                    found,
                    self._every,
                    f"{self._every * each:,}",
                )
        if not self._has(0):
            self.put(0, first)

    def _kept(self) -> int:
        """How many boundaries are kept."""
        return len({*range(0, self._num_layers + 1, self._every), self._num_layers})

    def put(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Keep the hidden states before a layer (`num_layers`: after the last), if this boundary is one to keep."""
        if layer % self._every and layer != self._num_layers:
            return
        if self._folder is None:
            self._memory[layer] = list(hidden)
        else:
            write_tensors(self._path(layer), {str(batch): values for batch, values in enumerate(hidden)})

    def get(self, layer: int) -> list[Tensor]:
        """The hidden states before a layer, or after the last."""
        if self._has(layer):
            return self._read(layer)
        if layer not in self._segment:
            start = layer - layer % self._every
            layers = range(start, layer)
            rerun = self._rerun(layers, self._read(start))
            self._segment = {below + 1: hidden for below, hidden in zip(layers, rerun, strict=True)}
        return self._segment[layer]

    def latest(self) -> tuple[int, list[Tensor]]:
        """The last boundary that is known, and its hidden states."""
        layer = max(layer for layer in range(self._num_layers + 1) if self._has(layer))
        return layer, self._read(layer)

    def _has(self, layer: int) -> bool:
        return layer in self._memory or (self._folder is not None and self._path(layer).exists())

    def _read(self, layer: int) -> list[Tensor]:
        if layer in self._memory:
            return list(self._memory[layer])
        tensors, _ = read_tensors(self._path(layer))
        return [tensors[str(batch)] for batch in range(len(tensors))]

    def _path(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{layer:05}.safetensors"
