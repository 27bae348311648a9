"""Measure the table of latencies by width: whole passes of small models with the layers of the dense one.

Each entry is the time of a few layers with one axis narrowed, against the same layers unchanged, interleaved, so that
whatever slows the machine slows both. Nothing about the architecture is assumed beyond its structure.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from hf_prune.errors import check_whole_numbers
from hf_prune.evaluation.speed import time_request
from hf_prune.latency import LatencyTable, Pair
from hf_prune.plan import bare_plan
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from hf_prune.structure.axes import Axis, Structure

MOST_LAYERS = 8
"""Layers of one shape that are timed together."""

Kept = dict[str, tuple[int, ...]]


def measure_latency(
    model: PreTrainedModel,
    structure: Structure,
    *,
    prompt_len: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    num_widths: int = 4,
    repeats: int = 5,
    progress: bool = True,
) -> LatencyTable:
    """Measure how the time of a request depends on the widths, on the model's device, in its dtype.

    Layers of equal shape are one family. Up to 8 layers of a family are timed with each of their axes at a few widths,
    and without their attention, their MLP, and half of the layers. Measure when nothing else runs.

    Args:
        model: the dense causal LM, its weights in memory; not changed.
        structure: its structure.
        prompt_len: tokens of each prompt, 1 or more.
        new_tokens: tokens decoded after it, 0 or more (0: prefill alone).
        batch_size: prompts at a time, 1 or more.
        num_widths: widths per axis, the dense one included, 2 or more; evenly spaced.
        repeats: rounds of each pair after the warm-up, 1 or more: the fastest prefill and the median token count.
        progress: show a progress bar.

    Returns:
        The table: predicts the time of any plan for this model; a value that can be saved.

    Raises:
        ConfigError: a number is out of range.
    """
    check_whole_numbers(prompt_len=(prompt_len, 1), new_tokens=(new_tokens, 0), batch_size=(batch_size, 1))
    check_whole_numbers(num_widths=(num_widths, 2), repeats=(repeats, 1))
    request = (prompt_len, new_tokens, batch_size)
    families = _families(structure)
    samples = [_Sample.of(model, structure, layers) for layers in families]
    work = [(family, trial) for family, sample in enumerate(samples) for trial in sample.trials(num_widths)]
    fractions, seconds = [], list[list[Pair]]([[] for _ in families])
    for family, trial in tqdm(work, desc="latency", unit="width", leave=False, disable=not progress):
        sample = samples[family]
        smaller = apply_plan(sample.model, sample.structure, bare_plan(sample.structure, trial.kept))
        reference, fraction = compare_requests(sample.model, smaller, *request, repeats=repeats)
        seconds[family].append(reference)
        fractions.append(fraction)
    whole: list[dict[str, Pair]] = [{} for _ in families]
    axes: list[dict[str, dict[int, Pair]]] = [{} for _ in families]
    for (family, trial), fraction in zip(work, fractions, strict=True):
        dense = _typical(seconds[family])  # over all trials, as the machine may have been slower during some
        saved = tuple(t * (1 - part) / trial.num_layers for t, part in zip(dense, fraction, strict=True))
        if trial.width is None:
            whole[family][trial.name] = (saved[0], saved[1])
        else:
            axes[family].setdefault(trial.name, {})[trial.width] = (saved[0], saved[1])
    alone = seconds[0] if samples[0].model is model else []
    alone = alone or [compare_requests(model, model, *request, repeats=repeats)[0]]
    own = next(model.parameters())
    return LatencyTable(
        model_type=structure.model_type,
        num_units={
            name: axis.num_units
            for name, axis in structure.axes.items()
            if axis.layer is not None and not axis.is_inner
        },
        dense=_typical(alone),
        family_of=tuple(
            next(family for family, layers in enumerate(families) if layer in layers)
            for layer in range(len(structure.layer_paths))
        ),
        whole=tuple(whole),
        axes=tuple(
            {name: tuple((width, *rows[width]) for width in sorted(rows)) for name, rows in family.items()}
            for family in axes
        ),
        batch_size=batch_size,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        device=str(own.device),
        dtype=str(own.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )


def _families(structure: Structure) -> list[list[int]]:
    """Layers of equal shape: the same parameters, with the same shapes."""
    shapes: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for layer, path in enumerate(structure.layer_paths):
        own = [name for name, owner in structure.owners.items() if owner.layer == layer]
        key = tuple((name.removeprefix(path), structure.shape(name)) for name in sorted(own))
        shapes.setdefault(key, []).append(layer)
    return list(shapes.values())


@dataclass(frozen=True)
class _Trial:
    """A change to be timed."""

    name: str
    """Axis without `layers.{i}.`, or what goes as a whole: `layer`, `attention`, `mlp`."""
    width: int | None
    """`None`: it goes as a whole."""
    kept: Kept
    num_layers: int
    """Layers that are changed."""


@dataclass(frozen=True)
class _Sample:
    """A model with a few layers of one family; the dense model itself where whole layers cannot go."""

    model: PreTrainedModel
    structure: Structure
    layers: list[int]
    """Where the layers of the family are in it."""

    @classmethod
    def of(cls, model: PreTrainedModel, structure: Structure, layers: list[int]) -> _Sample:
        chosen = layers[:MOST_LAYERS]
        if not _prunable(structure, "layers") or len(chosen) == len(structure.layer_paths):
            return cls(model, structure, layers)
        small = apply_plan(model, structure, bare_plan(structure, {"layers": tuple(chosen)}))
        return cls(small, infer_structure(small), list(range(len(chosen))))

    def trials(self, num_widths: int) -> list[_Trial]:
        """Each axis at each width in all layers of the family; the later layers without a branch, or gone."""
        found = []
        for axis in self.structure.axes.values():
            if axis.layer != self.layers[0] or not axis.prunable or axis.is_inner:
                continue
            suffix = axis.name.split(".", 2)[2]
            for width in _widths(axis, num_widths):
                kept = {f"layers.{layer}.{suffix}": axis.first(width) for layer in self.layers}
                found.append(_Trial(suffix, width, kept, len(self.layers)))
        later = self.layers[1:]  # the first layer's attention has to stay, and a model keeps one layer
        half = self.layers[(len(self.layers) + 1) // 2 :]
        for name, axis_name, gone in (
            ("attention", "layers.attention", later),
            ("mlp", "layers.mlp", later),
            ("layer", "layers", half),
        ):
            if gone and _prunable(self.structure, axis_name):
                stay = tuple(layer for layer in range(len(self.structure.layer_paths)) if layer not in gone)
                found.append(_Trial(name, None, {axis_name: stay}, len(gone)))
        return found


def _prunable(structure: Structure, axis_name: str) -> bool:
    return axis_name in structure.axes and structure.axes[axis_name].prunable


def _widths(axis: Axis, number: int) -> list[int]:
    """Widths below the dense one, evenly spaced, multiples of what the axis needs."""
    step = axis.multiple_of * axis.num_blocks
    widths = (round(axis.num_units * i / number / step) * step for i in range(1, number))
    return sorted({width for width in widths if axis.least * axis.num_blocks <= width < axis.num_units})


def compare_requests(
    model: PreTrainedModel, other: PreTrainedModel, prompt_len: int, new_tokens: int, batch_size: int, *, repeats: int
) -> tuple[Pair, Pair]:
    """Seconds of a request to `model`, and which fraction of them `other` takes, for prefill and decoding.

    Both are timed in turns. Prefill: the fastest rounds, as whatever else the machine does only adds to them. Decoding:
    the median token of each round; the fraction is the median over the rounds. A warm-up round is not counted.
    """
    prefill: tuple[list[float], list[float]] = ([], [])
    token: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for i, each in enumerate((model, other)):
            first, rest = time_request(each, prompt_len, new_tokens, batch_size, each=True)
            if repeat > 0:
                prefill[i].append(first)
                token[i].append(statistics.median(rest) if rest else 0.0)
    parts = [after / before if before else 1.0 for before, after in zip(*token, strict=True)]
    reference = min(prefill[0]), statistics.median(token[0]) * new_tokens
    return reference, (min(prefill[1]) / reference[0], statistics.median(parts))


def _typical(times: Sequence[Pair]) -> Pair:
    """The fastest prefill, the median decoding."""
    return min(prefill for prefill, _ in times), statistics.median(decode for _, decode in times)
