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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import CalibrationError, CheckpointError, ConfigError, StructureError
from hf_prune.layers.walk import Walk, checked_ids
from hf_prune.layers.weights import is_offloaded, is_on_disk
from hf_prune.structure.building import build_empty, fresh_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.config import PruningConfig
    from hf_prune.layers.price import Price
    from hf_prune.layers.walk import LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.structure import Structure

logger = logging.getLogger(__name__)

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
            f"the model is quantised (quantization_config: {method}), expected float32, bfloat16 or float16. Prune the "
            "model that it was made from, and quantise the pruned one. If there is no other, load it dequantised "
            "(`dequantize=True` in its quantization_config, or `model.dequantize()`) and prune that."
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
        ConfigError: windows longer than the model's table of positions. Of others (rotary, ALiBi) a warning says it.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, longest = len(embedding.weight), 0
    for ids in map(checked_ids, batches):
        longest = max(longest, ids.shape[1])
        for token in map(int, ids.aminmax()):
            if not 0 <= token < rows:
                raise CalibrationError(
                    f"the text has token {token}, but the model embeds {rows} tokens: pass this model's own tokenizer."
                )
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or longest <= positions:
        return
    if _sizes(model, positions) != _sizes(model, positions + 1):
        raise ConfigError(
            f"a window is {longest} tokens long, but the model has {positions} positions; take windows (seq_len) of "
            "that, or shorter ones."
        )
    logger.warning("windows are %d tokens long; the model was made for %d: expect worse numbers", longest, positions)


def _sizes(model: nn.Module, positions: int) -> list[torch.Size]:
    """Of all tensors of the model if it had so many positions: those of tables of positions depend on them."""
    config: Any = fresh_config(model.config)
    config.get_text_config().max_position_embeddings = positions
    empty = build_empty(config, type(model))
    return [tensor.shape for own in (empty.parameters(), empty.buffers()) for tensor in own]


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
    needed = price.layer_bytes if is_on_disk(model) or (work is not None and config.repair != "none") else 0
    if work is not None:  # the state after a step is written before that of the last one goes
        needed += price.held_bytes - sum(path.stat().st_size for path in work.path.rglob("*.safetensors"))
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
