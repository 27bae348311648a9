"""Load a model, its config and its tokenizer by name, for the command line: what goes wrong says what to do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError, ConfigError, HFPruneError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# It warns of every access that our configs allow on purpose.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


def load_config(name: str) -> PreTrainedConfig:
    """The config of a directory or Hub id; `CheckpointError` if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, "config", error) from error


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_disk: Sequence[str] = (),
    folder: Path | None = None,
) -> PreTrainedModel:
    """The causal LM of a directory or Hub id, in evaluation mode.

    Args:
        name: of the directory, or Hub id.
        device: where the weights go; default: the CPU.
        dtype: of the weights; default: the checkpoint's own.
        on_disk: module paths whose weights stay on disk until they are needed.
        folder: where weights go that the files of the checkpoint hold under another shape.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: no such device or dtype.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from hf_prune.layers.weights import check_offload, device_map_of
    from hf_prune.structure.building import build_empty

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype: found {dtype!r}, expected one of torch's, such as float32, bfloat16 or float16.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} cannot be used here: {_first_line(error)}") from error
    options: dict[str, Any] = {}
    if on_disk:
        shell = build_empty(load_config(name))
        options = {"device_map": device_map_of(shell, on_disk, device or "cpu"), "offload_folder": str(folder)}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **options)
    except HFPruneError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(name, "model", error) from error
    if on_disk:
        check_offload(model)
    return model.to(device).eval() if device is not None and not on_disk else model.eval()  # type: ignore[no-any-return]


def load_tokenizer(name: str, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or Hub id; `None` if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise _not_loaded(name, "tokenizer", error) from error
        return None


def _not_loaded(name: str, what: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"no {what} could be loaded from {name!r}: {_first_line(error)} "
        "Pass the directory of a causal LM, or its id on the Hub; check the spelling and the connection."
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
