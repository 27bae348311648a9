"""ONNX graphs of whole forward passes: what ONNX Runtime and OpenVINO read."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.atomic import check_free, replaced_directory
from hf_prune.errors import ConfigError, StructureError
from hf_prune.exporting import Exported
from hf_prune.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


class _Logits(nn.Module):
    """The model as a function of two tensors, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask `[B, T]` → logits `[B, T, V]`."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def write_onnx(checkpoint: str, output: Path, dtype: str | None, trust_remote_code: bool = False) -> Exported:
    """See `hf_prune.export`."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("ONNX graphs need the packages onnx and onnxscript: pip install 'hf_prune[onnx]'.") from error
    model: Any = load_model(checkpoint, dtype=dtype or "float32", trust_remote_code=trust_remote_code)
    check_free(output, model.num_parameters() * model.dtype.itemsize)
    model.set_attn_implementation("eager")
    tokenizer = load_tokenizer(checkpoint, required=False, trust_remote_code=trust_remote_code)
    ids = torch.arange(2 * 7).reshape(2, 7) % model.get_input_embeddings().weight.shape[0]
    lengths = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with replaced_directory(output) as new:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(
                    _Logits(model),
                    (ids, torch.ones_like(ids)),
                    new / "model.onnx",
                    dynamo=True,
                    input_names=["input_ids", "attention_mask"],
                    output_names=["logits"],
                    dynamic_shapes={"input_ids": lengths, "attention_mask": lengths},
                    verbose=False,
                )
            except OSError:
                raise
            except Exception as error:  # torch.export refuses in any way it likes
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise StructureError(f"torch.onnx cannot export {type(model).__name__}: {reason}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    size = sum(path.stat().st_size for path in output.iterdir())
    count = model.num_parameters()
    return Exported(output, type(model).__name__, count, count, size, ("without a key-value cache",))
