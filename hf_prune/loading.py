"""Load a model, its config and its tokenizer by name: what goes wrong says what to do."""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_prune.atomic import temporary_directory
from hf_prune.errors import CheckpointError, ConfigError, HFPruneError, StructureError
from hf_prune.gate import UNQUANTISED, quantised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

LayersOn = Literal["auto", "memory", "disk"]

MEMORY_SHARE = 0.4
"""`auto` keeps a model in memory if it takes at most this share of what is free: the pruned one comes beside it."""

BASE = "base"
"""In place of a dense model's name: the one that a checkpoint was pruned from."""

# It warns of what is done here on purpose: layers left on disk.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def load_config(name: str, *, dequantise: bool = False, **where: Any) -> PreTrainedConfig:
    """The config of a directory, Hub id or GGUF file.

    Args:
        name: of the directory, Hub id, or GGUF file in one of these.
        dequantise: have the weights of a quantised model loaded as plain ones.
        **where: as for `from_pretrained`.

    Raises:
        CheckpointError: there is none.
        StructureError: weights that transformers cannot dequantise, or a GGUF file and `dequantise` is not asked for.
    """
    from transformers import AutoConfig

    from hf_prune.checkpoint.verifying import check_source, not_loaded

    name, where = _located(name, where)
    where.setdefault("trust_remote_code", False)
    if "gguf_file" in where and not dequantise:
        raise StructureError(
            f"{where['gguf_file']} is a GGUF file, expected float32, bfloat16 or float16 weights. {UNQUANTISED}"
        )
    check_source(name, where)
    _check_no_adapter(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    except (HFPruneError, ImportError):
        raise
    except Exception as error:  # config classes refuse in any way they like
        raise not_loaded(name, "config", error) from error
    if dequantise:
        _ask_for_plain_weights(config)
    return config


def _check_no_adapter(name: str) -> None:
    if Path(name, "adapter_config.json").exists() and not Path(name, "config.json").exists():
        raise StructureError(
            f"{name} holds an adapter, expected a model. Merge it: `model = AutoPeftModelForCausalLM.from_pretrained("
            f"{name!r}).merge_and_unload()` of peft, and prune that, or save it with `model.save_pretrained(...)`."
        )


def _located(name: str, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A GGUF file as the directory or id, and the file in it, that transformers takes."""
    folder, _, file = name.rpartition("/")
    return (folder or ".", {**where, "gguf_file": file}) if name.endswith(".gguf") else (name, where)


def _ask_for_plain_weights(config: PreTrainedConfig) -> None:
    """Have `from_pretrained` dequantise weights as it loads them. Modifies `config`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    from hf_prune.format.building import decoder_config

    if not (method := quantised(config)):
        return
    settings = [kind for name, kind in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if name.startswith(method)]
    loaders = [kind for name, kind in AUTO_QUANTIZER_MAPPING.items() if name.startswith(method)]
    while_loading = any("dequantize" in inspect.signature(kind).parameters for kind in settings)
    if not while_loading and all(kind._dequantize is HfQuantizer._dequantize for kind in loaders):
        raise StructureError(
            f"transformers cannot dequantise {method} weights. Prune the model that this one was made from."
        )
    for part in (config, decoder_config(config)):
        if found := _quantisation(part):
            part.quantization_config = {**found, "dequantize": True}


def _quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of how weights are quantised."""
    found: Any = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()  # type: ignore[no-any-return]


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_disk: Sequence[str] = (),
    folder: Path | None = None,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a directory or Hub id, in evaluation mode: a causal LM, or one that reads images and text.

    Args:
        name: of the directory, or Hub id.
        device: where the weights go; default: the CPU.
        dtype: of the weights; default: the checkpoint's own.
        on_disk: module paths whose weights stay on disk until they are needed.
        folder: where weights go that the files of the checkpoint hold under another shape.
        config: what `load_config` gave, if it has been read.
        trust_remote_code: whether code that comes with the checkpoint may run; with `config` that is known already.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor is missing.
        ConfigError: no such device or dtype.
    """
    import transformers

    from hf_prune.checkpoint.verifying import load_verified
    from hf_prune.format.building import build_empty, has_own_code, unsharded
    from hf_prune.layers.weights import device_map_of

    _check_target(device, dtype)
    config = config or load_config(name, trust_remote_code=trust_remote_code)
    name, options = _located(name, {"config": config, "trust_remote_code": has_own_code(type(config))})
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if on_disk:
        shell = build_empty(config)
        options |= {"device_map": device_map_of(shell, on_disk, device or "cpu"), "offload_folder": str(folder)}
    with unsharded():
        model = load_verified(name, dtype=dtype or "auto", **options)
    assert not isinstance(model, tuple)
    if _quantisation(config).get("dequantize") and getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
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
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model for pruning, in evaluation mode: as a whole, or with its decoder layers left on disk.

    Args:
        source: directory or Hub id of a safetensors checkpoint.
        layers_on: `memory`; `disk`: one layer at a time comes to `device`; `auto`: in memory if there is room for it.
        device: where layers run; default: the CPU.
        dtype: of the weights in memory, such as `bfloat16`; default: the checkpoint's own.
        folder: for tensors that the files hold under another shape (fused experts); default: a temporary one, which
            goes with the model.
        structure: of the model, if it is known.
        config: what `load_config` gave, if it has been read.
        trust_remote_code: as for `load_model`.

    Raises:
        ConfigError: no such choice, device or dtype.
        CheckpointError: there is no such model, or it is damaged, or its layers cannot be left on disk.
    """
    from hf_prune.layers.weights import free_memory
    from hf_prune.structure.inference import infer_structure

    if layers_on not in get_args(LayersOn):
        raise ConfigError(f"layers_on: found {layers_on!r}, expected one of {get_args(LayersOn)}.")
    _check_target(device, dtype)
    config = config or load_config(str(source), trust_remote_code=trust_remote_code)
    load = partial(load_model, str(source), device=device, dtype=dtype, config=config)
    if layers_on == "memory":
        return load()
    kind = "gguf" if str(source).endswith(".gguf") else _quantisation(config).get("quant_method")
    if kind in ("gguf", "bitsandbytes"):  # dequantised when all is loaded
        if layers_on == "disk":
            raise ConfigError(f"layers_on='disk' found {kind} weights, which are read as a whole; take 'memory'.")
        return load()
    structure = structure or infer_structure(config)
    if layers_on == "auto" and bytes_of(structure, config, dtype) <= MEMORY_SHARE * free_memory(device):
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


def bytes_of(structure: Structure, config: PreTrainedConfig, dtype: str | None = None) -> int:
    """Bytes of a model's weights in memory; by default in the checkpoint's own dtype."""
    import torch

    name = dtype or getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, name) if isinstance(name, str) else name
    return structure.num_parameters() * int(found.itemsize)


def load_tokenizer(name: str, *, required: bool, **where: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or Hub id; `None` if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    from hf_prune.checkpoint.verifying import check_source, not_loaded

    name, where = _located(name, {"trust_remote_code": False, **where})
    check_source(name, where)
    _check_no_adapter(name)
    try:
        return AutoTokenizer.from_pretrained(name, **where)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise not_loaded(name, "tokenizer", error) from error
        return None


def load_processor(name: str, config: PreTrainedConfig, **where: Any) -> Any | None:
    """What a model of images and text reads both with, tokenizer included; `None` for others, or if there is none."""
    from transformers import AutoProcessor

    from hf_prune.format.building import decoder_config

    if decoder_config(config) is config:
        return None
    try:
        return AutoProcessor.from_pretrained(name, **{"trust_remote_code": False, **where})
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning("saved without what reads images: %s", str(error).splitlines()[0])
        return None
