"""The gate before work: what would fail after hours, or give wrong numbers without a word, is refused in seconds.

In steps, as soon as each can be known: a config (`check_config`), a model without weights and windows of text
(`check_windows`), the disk (`check_room`) and the model itself (`unwrapped`, `check_model`).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.atomic import below
from hf_prune.errors import CalibrationError, CheckpointError, ConfigError, StructureError
from hf_prune.format.building import build_empty
from hf_prune.layers.walk import Walk, checked_ids
from hf_prune.layers.weights import is_offloaded, is_on_disk
from hf_prune.structure.forward import Forward, TraceError
from hf_prune.structure.inference import traceable_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.config import PruningConfig
    from hf_prune.layers.price import Price
    from hf_prune.layers.walk import LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

_POSITIONS = ("max_position", "max_target_position", "n_position", "max_seq", "n_ctx", "context_len", "model_max_len")
"""How names of config attributes begin that hold the number of positions."""
_OFFSET = 4
"""A table may have so many rows that are no positions (RoBERTa's begin behind that of padding)."""
UNQUANTISED = (
    "Prune the model that it was made from, and quantise the pruned one. If there is no other, have it dequantised: "
    "dequantise=True (--dequantise) for its directory or id, `model.dequantize()` for a model in memory."
)
"""What to do about quantised weights."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantised(config: PreTrainedConfig, asked: Any = None) -> str:
    """How weights are quantised, or `from_pretrained` is `asked` to quantise them; empty if they are not."""
    found = asked or getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None) or {}
    values: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method", "unknown method")
    return "" if not values or values.get("dequantize") else str(getattr(method, "value", method))


def check_config(config: PreTrainedConfig, asked: Any = None) -> None:
    """Raise `StructureError` if the model is `quantised`: before weights are loaded."""
    if method := quantised(config, asked):
        raise StructureError(
            f"the model is quantised (quantization_config: {method}), expected float32, bfloat16 or float16. "
            f"{UNQUANTISED}"
        )


def unwrapped(model: Any) -> PreTrainedModel:
    """The model itself: what `torch.compile` wraps; any other wrapper is refused.

    Raises:
        ConfigError: it is no causal LM of transformers, or in a wrapper, which is named.
        StructureError: it carries an adapter, or its weights are quantised, sharded, or compiled in place.
    """
    from transformers import MODEL_MAPPING, PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    kind = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise StructureError(
            f"the model ({kind}) carries an adapter, expected plain weights. Merge it (`model = "
            "model.merge_and_unload()`), or prune first and add the adapter then."
        )
    if not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
        raise ConfigError(
            f"the model is wrapped in {kind}, expected the model itself: pass `model.module` "
            "(`accelerator.unwrap_model(model)`); what FSDP or DeepSpeed have sharded must be loaded again without."
        )
    if not isinstance(model, PreTrainedModel) or type(model) is MODEL_MAPPING.get(type(model.config), None):
        raise ConfigError(f"model: found {kind}, expected a causal LM of transformers, or its directory or Hub id.")
    check_config(model.config)
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise StructureError(f"{kind} is compiled in place (`compile()`). Load it again, and compile the pruned one.")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _DTYPES or type(parameter.data) is not Tensor:
            raise StructureError(
                f"{name} is a {type(parameter.data).__name__} of {parameter.dtype}, expected a Tensor of float32, "
                "bfloat16 or float16. Prune before the model is quantised or sharded."
            )
    return model


def check_windows(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse `input_ids` `[B, T]` that a model, with or without weights, cannot read.

    Raises:
        CalibrationError: no token ids, padding, or ids that the model does not embed.
        ConfigError: windows longer than the model has positions. Of others (rotary, most ALiBi) a warning says it.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, found = len(embedding.weight), [checked_ids(batch) for batch in batches]
    longest = max((ids.shape[1] for ids in found), default=0)
    for ids in found:
        for token in map(int, ids.aminmax()):
            if not 0 <= token < rows:
                raise CalibrationError(
                    f"the text has token {token}, but the model embeds {rows} tokens: pass this model's own tokenizer."
                )
    positions = positions_of(model.config)
    if found and positions and longest > min(positions.values()) - _OFFSET:
        _check_positions(model, next(ids for ids in found if ids.shape[1] == longest)[:1], positions)
    for name, number in positions.items():
        if number < longest:
            text = "windows are %d tokens long; the model was made for %d (%s): expect worse numbers"
            logger.warning(text, longest, number, name)


def positions_of(config: Any) -> dict[str, int]:
    """The numbers of positions that a config names; some models can take more."""
    values: dict[str, Any] = config.get_text_config().to_dict()
    return {
        name: value
        for name, value in values.items()
        if name.startswith(_POSITIONS) and type(value) is int and value > 0
    }


def _check_positions(model: nn.Module, ids: Tensor, positions: Mapping[str, int]) -> None:
    """Run the model without memory on a window `[1, T]`: of one that is too long, rows are missing in a table."""

    def failure(ids: Tensor) -> TraceError | None:
        try:
            _Lookups().run(build_empty(traceable_config(model.config), type(model)), ids=ids.cpu())
        except TraceError as error:
            return None if error.needs_values else error
        return None

    if (error := failure(ids)) is not None and failure(ids[:, :2]) is None:
        name, number = min(positions.items(), key=lambda found: found[1])
        raise ConfigError(
            f"a window is {ids.shape[1]} tokens long, but the model has {number} positions ({name}): {error}; take "
            "shorter windows (seq_len)."
        ) from error


class _Lookups(Forward):  # type: ignore[no-untyped-call]
    """Fails where a row is looked up that a table does not have, as operations with values do."""

    def saw(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Compare indices of known values with the sizes of tables."""
        places: list[tuple[int, Any]] = []
        if name == "embedding":
            places = [(0, args[1])]
        elif name in ("index_select", "gather"):
            places = [args[1:3]]
        elif name == "index":
            places = list(enumerate(args[1]))
        for dim, index in places:
            known = None if index is None or index.dtype == torch.bool else self.values.get(index)
            if known is not None and known.numel() and int(known.max()) >= args[0].shape[dim]:
                raise IndexError(f"row {int(known.max())} of a table of {args[0].shape[dim]}")


def check_model(
    model: PreTrainedModel, structure: Structure, config: PruningConfig, batches: Sequence[Mapping[str, Any]] | None
) -> LayerProtocol | None:
    """Refuse weights that cannot be pruned or repaired; returns how layers are run, if that had to be found out.

    Weights in memory are looked at once, at the speed of memory. Those on disk are looked at while the probe that
    every walk begins with runs each layer: no byte is read for it.

    Raises:
        StructureError: the model is not that of its config, or its layers must run one at a time and cannot.
        CheckpointError: weights that are nowhere, or not finite.
    """
    expected = {name: structure.shape(name) for name in structure.layouts}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise StructureError(
                f"{name} has the shape {found.get(name)} in the model, {expected.get(name)} by its config: a part "
                "was exchanged, compiled or wrapped. Bring model.config up to date, or load the model again."
            )
    prefixes = tuple(f"{path}." for path in structure.layer_paths)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            _check_finite(name, parameter)
        elif not is_offloaded(model.get_submodule(name.rpartition(".")[0])):
            raise CheckpointError(
                f"{name} has no data: the model was made on the meta device, or offloaded by something that hf_prune "
                "does not know. Load it with from_pretrained."
            )
        elif not name.startswith(prefixes):
            raise StructureError(
                f"{name} is offloaded, expected in memory: only decoder layers may be elsewhere. Pass the directory or "
                "id of the model, with layers_on='disk', or offload its layers only."
            )
    if not is_on_disk(model) and config.repair == "none" and config.selection != "obs":
        return None
    first = [batch["input_ids"][:1] for batch in (batches or ())[:1]]
    walk = Walk(model, structure.layer_paths, first or [torch.zeros(1, 2, dtype=torch.int64)])
    walk.look = partial(_check_layer, model) if is_on_disk(model) else None
    walk.check_layered()
    return walk.protocol


def _check_layer(model: nn.Module, path: str) -> None:
    for name, parameter in model.get_submodule(path).named_parameters(prefix=path):
        _check_finite(name, parameter)


def _check_finite(name: str, values: Tensor) -> None:
    if values.numel() and not all(bool(end.isfinite()) for end in values.detach().aminmax()):  # 30 times as fast
        raise CheckpointError(
            f"{name} holds weights that are NaN or infinite, expected finite ones. Download or convert the model "
            "again; do not make float16 of a bfloat16 checkpoint."
        )


def check_room(
    price: Price, model: nn.Module, config: PruningConfig, work: WorkDir | None, output: Path | None
) -> None:
    """Raise `CheckpointError` if a disk cannot take what a run writes on the way and, to `output`, at its end.

    Hidden states between layers aside, of which `Boundaries` keeps as many as there is room for.
    """
    way = Path(tempfile.gettempdir()) if work is None else work.path
    needed = price.rewritten_bytes
    needed += price.layer_bytes if is_on_disk(model) or (work is not None and config.repair != "none") else 0
    if work is not None:  # the state after a step is written before that of the last one goes
        needed += price.held_bytes
        for path in below(work.path):
            with suppress(FileNotFoundError):
                needed -= path.stat().st_size if path.suffix == ".safetensors" else 0
    folders = [(way, needed)]
    if output is not None:
        folders.append((output.absolute().parent, price.checkpoint_bytes))
    disks: dict[int, int] = {}
    for asked, size in folders:
        folder = next(path for path in (asked, *asked.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                disk = os.stat(folder).st_dev
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written to ({error}); choose another directory.") from error
        disks[disk] = total = disks.get(disk, 0) + max(0, size)
        if total > (free := shutil.disk_usage(folder).free):
            raise CheckpointError(
                f"this run writes {total:,} bytes to the disk of {folder}, {free:,} are free. Free disk space, choose "
                "another output, work_dir or TMPDIR, or fewer or shorter calibration samples."
            )
