"""Load a model, its config and its tokenizer by name: what goes wrong says what to do."""

from __future__ import annotations

import contextlib
import logging
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_prune.atomic import temporary_directory
from hf_prune.errors import CheckpointError, ConfigError, HFPruneError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.structure.structure import Structure

LayersOn = Literal["auto", "memory", "disk"]

MEMORY_SHARE = 0.4
"""`auto` keeps a model in memory if it takes at most this share of what is free: the pruned one comes beside it."""

BASE = "base"
"""In place of a dense model's name: the one that a checkpoint was pruned from."""

# It warns of what is done here on purpose: layers left on disk.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def load_config(name: str, **where: Any) -> PreTrainedConfig:
    """The config of a directory or Hub id (`where` as for `from_pretrained`); `CheckpointError` if there is none."""
    from transformers import AutoConfig

    from hf_prune.checkpoint.verifying import check_source, not_loaded

    check_source(name, where)
    try:
        return AutoConfig.from_pretrained(name, **where)
    except (HFPruneError, ImportError):
        raise
    except Exception as error:  # config classes refuse in any way they like
        raise not_loaded(name, "config", error) from error


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_disk: Sequence[str] = (),
    folder: Path | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The causal LM of a directory or Hub id, in evaluation mode.

    Args:
        name: of the directory, or Hub id.
        device: where the weights go; default: the CPU.
        dtype: of the weights; default: the checkpoint's own.
        on_disk: module paths whose weights stay on disk until they are needed.
        folder: where weights go that the files of the checkpoint hold under another shape.
        config: what `load_config` gave, if it has been read.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor is missing.
        ConfigError: no such device or dtype.
    """
    from hf_prune.checkpoint.verifying import load_verified
    from hf_prune.layers.weights import device_map_of
    from hf_prune.structure.building import build_empty

    _check_target(device, dtype)
    options: dict[str, Any] = {} if config is None else {"config": config}
    if on_disk:
        shell = build_empty(config or load_config(name))
        options |= {"device_map": device_map_of(shell, on_disk, device or "cpu"), "offload_folder": str(folder)}
    model = load_verified(name, dtype=dtype or "auto", **options)
    assert not isinstance(model, tuple)
    return model.to(device).eval() if device is not None and not on_disk else model.eval()  # type: ignore[no-any-return]


def dense_source(asked: str, config: PreTrainedConfig) -> str:
    """Directory or Hub id of a dense model: the one asked for, or for `base` the one that `config`'s was pruned from.

    Raises:
        CheckpointError: the checkpoint does not say which.
    """
    if asked != BASE:
        return asked
    found = (getattr(config, "pruning_config", None) or {}).get("base_model_name_or_path")
    if not found:
        raise CheckpointError(
            f"{asked!r} found no base_model_name_or_path in the checkpoint's pruning_config, which names the model it "
            "was pruned from; pass that model's directory or Hub id."
        )
    return str(found)


def open_model(
    source: str | Path,
    *,
    layers_on: LayersOn = "auto",
    device: str | None = None,
    dtype: str | None = None,
    folder: Path | None = None,
    structure: Structure | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal LM for pruning, in evaluation mode: as a whole, or with its decoder layers left on disk.

    Args:
        source: directory or Hub id of a safetensors checkpoint.
        layers_on: `memory`; `disk`: one layer at a time comes to `device`; `auto`: in memory if there is room for it.
        device: where layers run; default: the CPU.
        dtype: of the weights in memory, such as `bfloat16`; default: the checkpoint's own.
        folder: for tensors that the files hold under another shape (fused experts); default: a temporary one, which
            goes with the model.
        structure: of the model, if it is known.
        config: what `load_config` gave, if it has been read.

    Raises:
        ConfigError: no such choice, device or dtype.
        CheckpointError: there is no such model, or it is damaged, or its layers cannot be left on disk.
    """
    from hf_prune.layers.weights import free_memory
    from hf_prune.structure.inference import infer_structure

    if layers_on not in get_args(LayersOn):
        raise ConfigError(f"layers_on: found {layers_on!r}, expected one of {get_args(LayersOn)}.")
    _check_target(device, dtype)
    config = config or load_config(str(source))
    load = partial(load_model, str(source), device=device, dtype=dtype, config=config)
    if layers_on == "memory":
        return load()
    structure = structure or infer_structure(config)
    needed = structure.num_parameters() * _itemsize(config, dtype)
    if layers_on == "auto" and needed <= MEMORY_SHARE * free_memory(device):
        return load()
    with contextlib.ExitStack() as held:
        own = folder or held.enter_context(temporary_directory())
        model = load(on_disk=structure.layer_paths, folder=own)
        weakref.finalize(model, held.pop_all().close)
    return model


def _check_target(device: str | None, dtype: str | None) -> None:
    import torch

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype: found {dtype!r}, expected one of torch's, such as float32, bfloat16 or float16.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _itemsize(config: PreTrainedConfig, dtype: str | None) -> int:
    import torch

    name = dtype or getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, name) if isinstance(name, str) else name
    return int(found.itemsize)


def load_tokenizer(name: str, *, required: bool, **where: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or Hub id; `None` if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    from hf_prune.checkpoint.verifying import check_source, not_loaded

    check_source(name, where)
    try:
        return AutoTokenizer.from_pretrained(name, **where)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise not_loaded(name, "tokenizer", error) from error
        return None
