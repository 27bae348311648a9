"""Quantise a pruned checkpoint by torchao or bitsandbytes, and measure what pruning is worth beside that."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_prune.checkpoint.saving import check_apart, check_directory, save_pruned
from hf_prune.checkpoint.verifying import load_verified
from hf_prune.data import load_text
from hf_prune.errors import CheckpointError, ConfigError, HFPruneError, StructureError
from hf_prune.evaluation.perplexity import perplexity
from hf_prune.evaluation.speed import num_bytes, num_parameters
from hf_prune.format.building import build_empty, has_own_code
from hf_prune.gate import quantised
from hf_prune.loading import load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.report.tables import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheme:
    """How the weights of linear layers are held; embeddings and the output projection stay as they are."""

    library: str
    block: int = 1
    """Input channels that share a scale: widths are multiples of it."""
    outputs: int = 1
    """Output channels are multiples of this, for the kernels."""


SCHEMES = {
    "int8": Scheme("torchao"),
    "fp8": Scheme("torchao"),
    "int4": Scheme("torchao", block=32),
    "nf4": Scheme("bitsandbytes", block=64, outputs=64),
}


def quantise(
    checkpoint: str | Path,
    output: str | Path,
    scheme: str,
    *,
    text: str | None = None,
    window: int = 256,
    batch_size: int = 8,
    device: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> list[Row]:
    """Quantise the weights of a pruned checkpoint and save it as one that `from_pretrained` loads.

    Args:
        checkpoint: directory or Hub id of a pruned model.
        output: new or empty directory, and never where something is read from.
        scheme: `int8` or `fp8` (weights of 8 bits, a scale per output channel), `int4` (groups of 32; torchao holds
            each 4-bit value in a byte) or `nf4` (bitsandbytes, blocks of 64, half a byte each).
        text: measure perplexity on it: of the dense, the pruned, and both models quantised.
        window: tokens of each window of `text`.
        batch_size: windows per forward pass.
        device: where the models run; default: the CPU.
        overwrite: `output` may hold a checkpoint, which is replaced at the end.
        trust_remote_code: whether code that comes with the checkpoints of both models may run.

    Returns:
        One row per model with its parameters, bytes and, with `text`, perplexity: the quantised one only without it.

    Raises:
        ConfigError: an unknown scheme, a library that is not installed, or a width that the scheme's blocks do not
            divide; before anything is loaded.
        CheckpointError: the checkpoint is not a pruned one, or is quantised already, or `output` is read or exists.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme: found {scheme!r}, expected one of {list(SCHEMES)}.")
    trust = {"trust_remote_code": trust_remote_code}
    directory, config = Path(output).absolute(), load_config(str(checkpoint), **trust)
    if getattr(config, "pruning_config", None) is None or quantised(config):
        raise CheckpointError(f"{checkpoint} is not a pruned checkpoint, or quantised already: quantise a pruned one.")
    dense = config.pruning_config.get("base_model_name_or_path")
    check_apart(directory, model=str(checkpoint), dense=dense, text=text)
    check_directory(directory, overwrite=overwrite)
    if find_spec(SCHEMES[scheme].library) is None:
        raise ConfigError(f"scheme {scheme!r} needs {SCHEMES[scheme].library}: pip install {SCHEMES[scheme].library}.")
    _check_blocks(config, scheme)
    content = None if text is None else load_text(text)
    tokenizer = load_tokenizer(str(checkpoint), required=content is not None, **trust)
    rows: list[Row] = []

    def measure(name: str, model: PreTrainedModel) -> None:
        row: dict[str, Any] = {"model": name, "num_parameters": num_parameters(model), "num_bytes": num_bytes(model)}
        if content is not None and tokenizer is not None:
            found = perplexity(model, tokenizer, content, window=window, batch_size=batch_size, progress=False)
            row["perplexity"] = found.perplexity
        rows.append(row)

    if content is not None:
        try:
            other = load_config(str(dense), **trust)
            measure("dense", load_model(str(dense), device=device, config=other))
            _check_blocks(other, scheme)
            measure(f"dense, {scheme}", _load_quantised(dense, scheme, device, other))
        except HFPruneError as error:
            logger.warning("the dense model is not measured: %s", error)
        measure("pruned", load_model(str(checkpoint), device=device, config=config))
    model = _load_quantised(str(checkpoint), scheme, device, config)
    # before a forward pass: bitsandbytes then packs its weights anew for the CPU, and would save them like that
    save_pruned(model, output, tokenizer=tokenizer)
    measure(f"pruned, {scheme}", model)
    return rows


def _check_blocks(config: PreTrainedConfig, scheme: str) -> None:
    """Refuse widths that the scheme's blocks do not divide, and models of which nothing would be quantised."""
    own, model = SCHEMES[scheme], build_empty(config)
    head = model.get_output_embeddings()
    found, matrices = 0, sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        found += module.weight.numel()
        if module.in_features % own.block or module.out_features % own.outputs:
            raise ConfigError(
                f"{name} has {module.in_features} input and {module.out_features} output channels, but {scheme} needs "
                f"multiples of {own.block} and {own.outputs}. Prune with --for int4 (targets=('int4',)), or take int8."
            )
    if not found:
        raise StructureError(f"{type(model).__name__} has no linear layer that {own.library} could quantise.")
    if found < matrices / 2:
        logger.warning("only %.0f %% of the weights are in linear layers and become smaller", 100 * found / matrices)


def _load_quantised(source: str, scheme: str, device: str | None, config: PreTrainedConfig) -> PreTrainedModel:
    model = load_verified(
        source,
        config=config,
        dtype="auto",
        device_map=device or "cpu",
        quantization_config=_quantization_config(scheme),
        trust_remote_code=has_own_code(type(config)),
    )
    assert not isinstance(model, tuple)
    return model.eval()  # type: ignore[no-any-return]


def _quantization_config(scheme: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if scheme == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    from torchao import quantization as torchao
    from torchao.quantization.granularity import PerGroup

    if scheme == "int4":
        dtype: Any = torch.int4  # type: ignore[attr-defined]
        group = PerGroup(SCHEMES[scheme].block)
        return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=group))
    return TorchAoConfig(torchao.Int8WeightOnlyConfig() if scheme == "int8" else torchao.Float8WeightOnlyConfig())
