"""Losses of many masks in few forward passes: every row of a batch carries its own mask."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from hf_prune.layers.losses import divergence, next_token
from hf_prune.layers.masking import masked_rows
from hf_prune.layers.processes import sum_over_processes
from hf_prune.layers.weights import evaluating, input_device, is_on_disk
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hf_prune.config.policy_gradient import Reward
    from hf_prune.layers.walk import Outputs, Walk
    from hf_prune.scores.policy_gradient.policy import UnitSpace
    from hf_prune.structure.axes import Axis, Structure


class MaskedModel:
    """Runs a dense model under masks, inside `open_model`. Each process takes its share of the windows."""

    def __init__(
        self,
        walk: Walk,
        structure: Structure,
        units: UnitSpace,
        masks: dict[str, Tensor],
        *,
        reward: Reward,
        forward_rows: int,
        sliced: Sequence[Axis] = (),
    ) -> None:
        self.walk, self.structure, self.units, self._masks = walk, structure, units, masks
        self.reward, self.forward_rows = reward, forward_rows
        self._sliced = {axis.name: axis for axis in sliced}

    def losses(self, windows: Tensor, masks: Tensor, windows_per_mask: int) -> Tensor:
        """Mean loss of each mask over its windows. In memory no value is read here, so no device is waited for.

        Args:
            windows: token ids, int64 `[W, T]`.
            masks: bool `[W / windows_per_mask, K, N]`.
            windows_per_mask: windows that share their masks.

        Returns:
            `[W / windows_per_mask, K]` in nats per token, float32, summed over processes: the next-token loss, or the
            Kullback-Leibler divergence from the dense model to the masked one.
        """
        device = input_device(self.walk.model)
        state = PartialState()
        losses = torch.zeros(len(windows), masks.shape[1], device=device)
        mine = range(len(windows))[state.process_index :: state.num_processes]
        if self._sliced:
            for group, own in enumerate(masks):
                shared = [w for w in mine if w // windows_per_mask == group]
                if shared:
                    losses[shared] = self._one_mask_after_another(windows[shared].to(device), own)
        else:
            per_pass = max(1, self.forward_rows // (masks.shape[1] + (self.reward == "kl")))
            parts = [mine[start : start + per_pass] for start in range(0, len(mine), per_pass)]
            # slices and views: a list of indices would be copied to the device, which waits for it
            rows = [slice(part.start, part.stop, part.step) for part in parts]
            ids = [windows[own].to(device, non_blocking=True) for own in rows]
            found = self._all_at_once(
                ids, [torch.stack([masks[w // windows_per_mask] for w in part]) for part in parts]
            )
            for own, values in zip(rows, found, strict=True):
                losses[own] = values
        return sum_over_processes(losses).view(len(masks), windows_per_mask, -1).mean(1)

    def outputs(self, ids: Sequence[Tensor], masks: Sequence[Mapping[str, Tensor]]) -> Iterator[Outputs]:
        """What the model gives for batches of rows `[R, T]`, each row under its row of the masks `[R, num_units]`."""

        @contextlib.contextmanager
        def each(batch: int, layer: int | None) -> Iterator[None]:
            self._masks.update(masks[batch])
            yield
            self._masks.clear()

        if not ids:  # there are more processes than windows
            return
        walk = self.walk.over(ids)
        walk.ids = walk.all_ids  # each process has its own windows already
        yield from walk.outputs(each)

    def _all_at_once(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batches `[W, T]` and `[W, K, N]` → `[W, K]`; for `kl` the dense model is one more row of each window."""
        kl = self.reward == "kl"
        full = [torch.cat([torch.ones_like(own[:, :1]), own], 1) if kl else own for own in masks]
        rows = [own.repeat_interleave(x.shape[1], 0) for own, x in zip(ids, full, strict=True)]
        for own, output in zip(
            full, self.outputs(rows, [self.units.split(x.flatten(0, 1)) for x in full]), strict=True
        ):
            yield self._of_rows(output, own.shape[1] if kl else None).view(len(own), -1)

    def _of_rows(self, output: Outputs, dense_every: int | None, dense: Outputs | None = None) -> Tensor:
        """Mean loss of each masked row: next-token, or divergence from the dense row.

        That is the first of each `dense_every` rows of `output`, or the same row of `dense`.
        """
        num_tokens = output.ids.shape[1]
        totals: dict[int, list[Tensor]] = {}
        theirs: dict[int, Tensor] = {}
        others = dense.chunks() if dense is not None else None
        for row, start, logits in output.chunks():
            if dense_every is not None and row % dense_every == 0:
                theirs[start] = logits
            elif self.reward == "kl":
                reference = next(others)[2] if others is not None else theirs[start]
                totals.setdefault(row, []).append(divergence(reference, logits).sum() / num_tokens)
            else:
                targets = output.ids[row, start + 1 : start + 1 + len(logits)]
                losses = next_token(logits[: len(targets)], targets)
                totals.setdefault(row, []).append(losses.sum() / (num_tokens - 1))
        return torch.stack([sum(parts[1:], parts[0]).float() for parts in totals.values()])

    def _one_mask_after_another(self, ids: Tensor, masks: Tensor) -> Tensor:
        """`[W, T]` and `[K, N]` → `[W, K]`: the MLP weights are sliced for each mask and serve all windows."""
        parts = [ids[start : start + self.forward_rows] for start in range(0, len(ids), self.forward_rows)]
        nothing: list[Mapping[str, Tensor]] = [{}] * len(parts)
        dense = list(self.outputs(parts, nothing)) if self.reward == "kl" else [None] * len(parts)
        found = []
        for mask in masks:
            kept = self.units.split(mask)
            with sliced_weights(self.walk.model, self.structure, {name: kept[name] for name in self._sliced}):
                others = {name: part for name, part in kept.items() if name not in self._sliced}
                rows = [{name: values.expand(len(part), -1) for name, values in others.items()} for part in parts]
                outputs = self.outputs(parts, rows)
                found.append(torch.cat([self._of_rows(o, None, d) for o, d in zip(outputs, dense, strict=True)]))
        return torch.stack(found, 1)


@contextlib.contextmanager
def open_model(
    walk: Walk,
    structure: Structure,
    units: UnitSpace,
    *,
    reward: Reward = "lm",
    forward_rows: int = 16,
    sliced_forward: bool = False,
) -> Iterator[MaskedModel]:
    """A `MaskedModel`: evaluation mode, no gradients, hooks in place; afterwards the model is as it was.

    Raises:
        StructureError: units of an axis cannot be masked row by row.
    """
    model = walk.model
    may_slice = sliced_forward and not is_on_disk(model)
    sliced = [axis for axis in units.axes if may_slice and _sliceable(model, structure, axis)]
    names = [axis.name for axis in units.axes if axis not in sliced]
    with evaluating(model), torch.no_grad(), masked_rows(model, structure, names) as masks:
        yield MaskedModel(walk, structure, units, masks, reward=reward, forward_rows=forward_rows, sliced=sliced)


@contextlib.contextmanager
def sliced_weights(model: nn.Module, structure: Structure, keep_masks: dict[str, Tensor]) -> Iterator[None]:
    """Within, the linear layers that carry these axes hold only the kept units; then the dense weights are back."""
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for axis, mask in keep_masks.items():
            kept = {axis: mask.nonzero()[:, 0].tolist()}
            for member in structure.members[axis]:
                path, _, name = member.parameter.rpartition(".")
                module = model.get_submodule(path)
                whole = module._parameters[name]
                assert whole is not None
                layout = structure.layouts[member.parameter][member.dim]
                index = lay.indices(layout, kept).to(whole.device)
                originals.append((module, name, whole))
                module._parameters[name] = nn.Parameter(whole.index_select(member.dim, index), requires_grad=False)
        yield
    finally:
        for module, name, whole in reversed(originals):
            module._parameters[name] = whole


def _sliceable(model: nn.Module, structure: Structure, axis: Axis) -> bool:
    """MLP channels whose every carrier is a plain linear layer, which reads its sizes off its weight."""
    members = structure.members[axis.name]
    modules = [model.get_submodule(member.parameter.rpartition(".")[0]) for member in members]
    return axis.kind == "mlp" and all(type(module) is nn.Linear for module in modules)
