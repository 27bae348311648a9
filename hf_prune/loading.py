"""Load a model, its config and its tokenizer by name, for the command line: what goes wrong says what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from hf_prune.errors import ConfigError, HFPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# It warns of every access that our configs allow on purpose.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


def load_config(name: str) -> PreTrainedConfig:
    """The config of a directory or Hub id; `CheckpointError` if there is none."""
    from transformers import AutoConfig

    from hf_prune.checkpoint.verifying import check_files, not_loaded

    if Path(name).is_dir():
        check_files(Path(name))
    try:
        return AutoConfig.from_pretrained(name)
    except (HFPruneError, ImportError):
        raise
    except Exception as error:  # config classes refuse in any way they like
        raise not_loaded(name, "config", error) from error


def load_model(name: str, *, device: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """The causal LM of a directory or Hub id, in evaluation mode.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor is missing.
        ConfigError: no such device or dtype.
    """
    import torch

    from hf_prune.checkpoint.verifying import load_verified

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype: found {dtype!r}, expected one of torch's, such as float32, bfloat16 or float16.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"device: {device!r} cannot be used here: {reason}") from error
    model = load_verified(name, dtype=dtype or "auto")
    assert not isinstance(model, tuple)
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(name: str, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or Hub id; `None` if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    from hf_prune.checkpoint.verifying import not_loaded

    try:
        return AutoTokenizer.from_pretrained(name)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise not_loaded(name, "tokenizer", error) from error
        return None
