"""What a layer counts: the share of the residual stream that the units of an axis write. No data: random tokens."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import ScoreError
from hf_prune.methods.calibration import evaluating
from hf_prune.surgery.masking import mask_axis

if TYPE_CHECKING:
    from hf_prune.structure.structure import Axis, Structure

NUM_TOKENS = 256


def relative_updates(
    model: nn.Module, structure: Structure, axes: list[Axis], generator: torch.Generator
) -> dict[str, float]:
    """Share of the residual stream that the units of each axis write: mean over tokens of ‖Δ‖² / ‖h‖², at most 1.

    The model runs on sequences of one random token each, so it needs no text. `h` is what the layer gives out and Δ
    what changes in it when all units of the axis are masked: the layer runs twice. Norms are taken in float32.

    Returns:
        Axis name → 0 to 1.

    Raises:
        ScoreError: the hidden states are not finite.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    ids = torch.randint(0, len(weight), (NUM_TOKENS, 1), generator=generator).to(weight.device)
    wanted: dict[int, list[Axis]] = {}
    for axis in axes:
        assert axis.layer is not None
        wanted.setdefault(axis.layer, []).append(axis)
    shares: dict[str, float] = {}

    def measure(layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        whole = _hidden(output)
        for axis in wanted[layer]:
            with mask_axis(model, structure, axis.name, torch.zeros(axis.num_units)):
                change = whole - _hidden(module.forward(*args, **kwargs))
            share = (change.square().sum(-1) / whole.square().sum(-1).clamp_min(1e-30)).mean().item()
            if not share < float("inf"):
                raise ScoreError(
                    f"layer {layer}: hidden states are NaN or infinite; load the model in bfloat16 or float32."
                )
            shares[axis.name] = min(share, 1.0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for layer in wanted:
            module = model.get_submodule(structure.layer_paths[layer])
            # first of all hooks: a streamed layer gives its weights back in a hook of its own
            handle = module.register_forward_hook(partial(measure, layer), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        getattr(model, "base_model", model)(input_ids=ids, use_cache=False)  # without the output embeddings
    return shares


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.detach().float()
