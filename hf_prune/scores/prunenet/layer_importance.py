"""What a layer counts: the share of the residual stream that the units of an axis write. No data: random tokens."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import ScoreError
from hf_prune.layers.masking import mask_axis
from hf_prune.layers.walk import hidden_of

if TYPE_CHECKING:
    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Axis, Structure

NUM_TOKENS = 256


def layer_importance(
    walk: Walk, structure: Structure, axes: list[Axis], generator: torch.Generator
) -> dict[str, float]:
    """Share of the residual stream that the units of each axis write: mean over tokens of ‖Δ‖² / ‖h‖², at most 1.

    The model runs on sequences of one random token each, so it needs no text. `h` is what the layer gives out and Δ
    what changes in it when all units of the axis are masked: the layer runs twice. Norms are taken in float32.

    Returns:
        Axis name → 0 to 1.

    Raises:
        ScoreError: the hidden states are not finite.
    """
    model = walk.model
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    ids = torch.randint(0, len(weight), (NUM_TOKENS, 1), generator=generator)
    wanted: dict[int, list[Axis]] = {}
    for axis in axes:
        assert axis.layer is not None
        wanted.setdefault(axis.layer, []).append(axis)

    def visit(part: Part) -> Found:
        shares: Found = {}

        def measure(layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            whole = hidden_of(output).detach().float()
            for axis in wanted[layer]:
                with mask_axis(model, structure, axis.name, torch.zeros(axis.num_units)):
                    change = whole - hidden_of(module.forward(*args, **kwargs)).detach().float()
                share = (change.square().sum(-1) / whole.square().sum(-1).clamp_min(1e-30)).mean()
                if not bool(share.isfinite()):
                    raise ScoreError(
                        f"layer {layer}: hidden states are NaN or infinite; load the model in bfloat16 or float32."
                    )
                shares[axis.name] = share.double().clamp_max(1.0).cpu()

        with contextlib.ExitStack() as stack:
            for layer in wanted:
                if part.has_layer(layer):
                    module = model.get_submodule(structure.layer_paths[layer])
                    stack.callback(module.register_forward_hook(partial(measure, layer), with_kwargs=True).remove)
            part.run()
        return shares

    # not shared among processes: it is short, and all must agree
    whole = walk.over([ids])
    whole.ids = whole.all_ids
    found = whole.forward(visit, "relative updates")
    return {name: float(share) for name, share in found.items()}
