"""What a model keeps of the tokens that it has seen: the cache of its decoder layers, found from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.structure.axes import CacheTensor
from hf_prune.structure.forward import BATCH_SIZE, SEQ_LEN, Forward, TraceError, tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from hf_prune.structure.axes import Axis


def find_cache(model: nn.Module, axes: Mapping[str, Axis]) -> tuple[CacheTensor, ...] | None:
    """The tensors that one forward pass leaves in transformers' `DynamicCache`; `None` if there is no such cache.

    Args:
        model: built without weights: parameters on the meta device.
        axes: axes of its structure.
    """
    try:
        output = Forward().run(model, use_cache=True)
    except TraceError:
        return None
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if layers is None:
        return None
    found = []
    for index, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        most = None if window is None else max(int(window) - 1, 1)  # what `DynamicSlidingWindowLayer` keeps
        rows = min(SEQ_LEN, most or SEQ_LEN)
        heads = [axis for axis in axes.values() if axis.kind == "attention" and axis.layer == index and axis.prunable]
        for tensor in tensors(list(vars(layer).values())):
            if tensor.dim() < 2:
                continue  # counters
            grows = tensor.shape[-2] == rows
            numel = tensor.numel() // BATCH_SIZE // (rows if grows else 1)
            # keys and values are [batch, heads, tokens, channels]; of one KV head the units are its query heads
            axis = next((a for a in heads if grows and tensor.dim() == 4 and tensor.shape[1] % a.num_units == 0), None)
            found.append(CacheTensor(index, None if axis is None else axis.name, numel, grows, most))
    return tuple(found)
