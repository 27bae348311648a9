"""Pruned checkpoints for other engines: llama.cpp (GGUF), whatever reads the base architecture, ONNX."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError

from hf_prune.atomic import reserved
from hf_prune.checkpoint.saving import check_apart, check_directory
from hf_prune.errors import CheckpointError, ConfigError

Format = Literal["plain", "gguf", "onnx"]
_ONNX_FILES = ("model.onnx", "model.onnx.data")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path
    """The file (GGUF) or the directory."""
    architecture: str
    """The model class of a plain checkpoint or ONNX graph, the architecture of a GGUF file."""
    num_parameters: int
    """Of the checkpoint."""
    num_exported: int
    """Of what was written: more where zeros had to be added."""
    num_bytes: int
    """Of all files."""
    notes: tuple[str, ...] = ()
    """What differs from the checkpoint, a sentence each."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    format: Format | str,
    dtype: str | None = None,
    round_to: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a checkpoint, pruned or dense, in a format that another engine reads. Logits stay equal within rounding.

    - `plain`: a stock transformers checkpoint, all layers as wide as the widest: units of zeros are added where layers
      differ, nothing where they do not. Any family.
    - `gguf`: one file for llama.cpp, with the layers' own widths; llama, mistral, qwen2 and qwen3.
    - `onnx`: a graph `input_ids`, `attention_mask` → `logits` without a cache. Any family that `torch.onnx` exports.

    Weights are read one at a time (ONNX: all at once).

    Args:
        checkpoint: directory or Hub id of a causal LM.
        output: a path where nothing is yet; it is there as a whole or not at all. Never what is read.
        format: see above.
        dtype: of the weights. GGUF: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`; else one of torch's. Default: the
            checkpoint's own, for ONNX float32.
        round_to: GGUF only: MLP widths become a multiple of this by channels of zeros. Default: what `dtype` needs, 32
            for `q8_0` and `q4_0`; 256 if the file is to be quantised to K-quants later.
        overwrite: `output` may be an earlier export of this format, which is replaced at the end.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        HFPruneError: the format cannot hold the model, a package is missing, `output` is read or exists, or its disk is
            too full; before anything is written.
    """
    output = Path(os.path.realpath(output))
    if format not in get_args(Format):
        raise ConfigError(f"format: found {format!r}, expected one of {get_args(Format)}.")
    check_apart(output, model=str(checkpoint))
    if format != "gguf":
        check_directory(output, overwrite=overwrite, known=_ONNX_FILES if format == "onnx" else ())
    elif output.exists() and not (overwrite and _is_gguf(output)):
        what = "exists already" if _is_gguf(output) else "is there and no GGUF file"
        raise CheckpointError(
            f"{output} {what}. Choose a new file; one that is GGUF may be replaced (overwrite=True, --overwrite)."
        )
    if round_to is not None and (format != "gguf" or round_to < 1):
        raise ConfigError(f"round_to: found {round_to} for {format}; it is for gguf, a whole number from 1.")
    try:
        with reserved(output):
            if format == "gguf":
                from hf_prune.exporting.gguf import write_gguf

                return write_gguf(str(checkpoint), output, dtype, round_to, trust_remote_code)
            if format == "onnx":
                from hf_prune.exporting.onnx import write_onnx

                return write_onnx(str(checkpoint), output, dtype, trust_remote_code)
            from hf_prune.exporting.plain import write_plain

            return write_plain(str(checkpoint), output, dtype, trust_remote_code)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written ({error}); nothing is left of it.") from error


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
