"""A small table of measured latencies, and what it predicts for a plan. A value: saved and loaded as JSON.

`evaluation/latency.py` measures it. The prediction adds up: the dense model's time, less what each layer saves at its
widths. Prefill is one forward pass over a prompt, decoding one pass per new token with a cache.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_prune.config import LAYER_AXES
from hf_prune.errors import PlanError
from hf_prune.reading import load_text_file, parse_json, save_text_file
from hf_prune.structure.axes import BRANCH_OF

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

Pair = tuple[float, float]
"""Seconds of prefill and of decoding."""

_WHOLE = ("layer", "attention", "mlp")


@dataclass(frozen=True)
class Latency:
    """Seconds of one request."""

    prefill_s: float
    """For the prompt."""
    decode_s: float
    """For all new tokens."""

    @property
    def total_s(self) -> float:
        """Prefill and decoding together."""
        return self.prefill_s + self.decode_s


@dataclass(frozen=True)
class LatencyTable:
    """What a dense model takes, and what it takes less where layers are narrower or gone.

    Layers of equal shape share a family.
    """

    model_type: str
    num_units: dict[str, int]
    """Units of every per-layer axis of the dense model: the fingerprint that `check` compares."""
    dense: Pair
    """The whole dense model."""
    family_of: tuple[int, ...]
    """Family of each decoder layer."""
    whole: tuple[dict[str, Pair], ...]
    """Per family: what is saved if the `layer` goes, or its `attention`, or its `mlp`; only what could be measured."""
    axes: tuple[dict[str, tuple[tuple[int, float, float], ...]], ...]
    """Per family and axis (its name without `layers.{i}.`): rows `(width, prefill_s, decode_s)`, saved at that width;
    ascending, the dense width not listed."""
    batch_size: int
    prompt_len: int
    """Tokens of each prompt."""
    new_tokens: int
    """Passes of one token after the prompt."""
    device: str
    dtype: str
    num_threads: int
    """CPU threads of torch."""

    def predict(
        self, widths: Mapping[str, int], layers: Iterable[int] = (), branches: Iterable[tuple[int, str]] = ()
    ) -> Latency:
        """Predict the time of one request.

        Args:
            widths: width of per-layer axes; an axis not named keeps all units.
            layers: decoder layers that are gone.
            branches: `(layer, "attention" | "mlp")` that are gone.
        """
        gone, without = frozenset(layers), frozenset(branches)
        seconds = np.array(self.dense)
        for layer, family in enumerate(self.family_of):
            saved = np.zeros(2)
            for branch in ("attention", "mlp"):
                part = np.zeros(2)
                for suffix, (at, values) in self._curves[family].items():
                    if BRANCH_OF[suffix.partition(".")[0]] == branch:
                        width = widths.get(f"layers.{layer}.{suffix}", at[-1])
                        part += [np.interp(width, at, column) for column in values]
                if (layer, branch) in without:
                    part = np.maximum(part, self.whole[family].get(branch, part))
                saved += part
            if layer in gone:
                saved = np.maximum(saved, self.whole[family].get("layer", saved))
            seconds -= saved
        prefill, decode = np.maximum(seconds, 0.0).tolist()
        return Latency(prefill, decode)

    def predict_plan(self, plan: PruningPlan) -> Latency:
        """`predict` for what a plan leaves.

        Raises:
            PlanError: the plan is for another model, or prunes the hidden axis or query heads inside of KV groups.
        """
        for name in plan.kept_indices.keys() - self.num_units.keys() - set(LAYER_AXES.values()):
            raise PlanError(f"the table says nothing about the axis {name}, which the plan prunes; measure the model.")
        self._check(plan.model_type, plan.num_units)
        widths = {name: width for name, width in plan.widths.items() if name not in plan.vanished_axes}
        return self.predict(widths, plan.removed_layers, plan.removed_branches)

    def seconds_per_unit(self, axis: str, num_units: int) -> npt.NDArray[np.float64]:
        """What one unit of an axis takes on average: float64 `[num_units]`."""
        dense = sum(self.dense)
        if axis in LAYER_AXES.values():
            branch = axis.partition(".")[2]
            layers = range(num_units)
            without = [
                self.predict({}, () if branch else (layer,), ((layer, branch),) if branch else ()) for layer in layers
            ]
            return np.array([dense - found.total_s for found in without])
        _, layer, suffix = axis.split(".", 2)
        at, values = self._curves[self.family_of[int(layer)]][suffix]
        return np.full(num_units, values.sum(0)[0] / (at[-1] - at[0]))

    def check(self, structure: Structure) -> None:
        """Raise `PlanError` unless the table was measured on a model of this structure."""
        self._check(structure.model_type, {name: axis.num_units for name, axis in structure.axes.items()})

    def _check(self, model_type: str, num_units: Mapping[str, int]) -> None:
        found = {name: num_units.get(name) for name in self.num_units}
        if model_type != self.model_type or found != self.num_units:
            raise PlanError(
                f"the latency table was measured on another {self.model_type} model than this {model_type}: its axes "
                "have other widths. Measure this model."
            )

    def _check_values(self) -> None:
        """Raise `ValueError` for a value of a wrong type or out of range."""
        counts = [*self.num_units.values(), self.batch_size, self.prompt_len, self.new_tokens, self.num_threads]
        _expect(all(type(n) is int and 0 < n < 2**40 for n in counts), "sizes and counts", "whole numbers from 1")
        texts = (self.model_type, self.device, self.dtype, *self.num_units)
        _expect(all(isinstance(text, str) for text in texts), "model_type, device, dtype and axes", "texts")
        families = range(len(self.whole))
        fits = len(self.axes) == len(families) and all(
            type(family) is int and family in families for family in self.family_of
        )
        _expect(fits and set(self.family_of) == set(families), "family_of", "the family of each layer")
        _expect(all(family.keys() <= set(_WHOLE) for family in self.whole), "whole", f"{_WHOLE}")
        rows = [row for family in self.axes for rows in family.values() for row in rows]
        pairs = [self.dense, *(pair for family in self.whole for pair in family.values()), *(row[1:] for row in rows)]
        fits = all(len(pair) == 2 and all(_is_seconds(value) for value in pair) for pair in pairs)
        _expect(fits, "times", "two finite numbers of seconds")
        for layer, family in enumerate(self.family_of):
            for suffix, found in self.axes[family].items():
                dense = self.num_units.get(f"layers.{layer}.{suffix}", 0)
                at = [0, *(width for width, *_ in found), dense]
                fits = all(type(width) is int for width in at) and all(x < y for x, y in itertools.pairwise(at))
                _expect(fits, f"layers.{layer}.{suffix}", "ascending widths below the dense one")

    @cached_property
    def _curves(self) -> tuple[dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]], ...]:
        """Per family and axis: widths `[P]` and seconds saved `[2, P]`, at the dense width last.

        Below the narrowest measured width the curve goes on as it does above it. Measured dips are averaged out
        (isotonic regression): a wider axis is never predicted to be faster.
        """
        curves = []
        for family, axes in enumerate(self.axes):
            found = {}
            layer = self.family_of.index(family)
            for suffix, rows in axes.items():
                at = np.array([width for width, *_ in rows] + [self.num_units[f"layers.{layer}.{suffix}"]], float)
                values = np.array([saved for _, *saved in rows] + [[0.0, 0.0]]).T
                values = np.maximum(np.stack([_falling(row) for row in values]), 0.0)
                values[:, -1] = 0.0
                slope = (values[:, 0] - values[:, 1]) / (at[1] - at[0]) if len(at) > 1 else np.zeros(2)
                found[suffix] = (np.append(0.0, at), np.column_stack([values[:, 0] + slope * at[0], values]))
            curves.append(found)
        return tuple(curves)

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read `to_json` back; `PlanError` if the text is not a table."""
        try:
            values: dict[str, Any] = parse_json(text)
            values["dense"] = tuple(values["dense"])
            values["family_of"] = tuple(values["family_of"])
            values["whole"] = tuple({k: tuple(v) for k, v in family.items()} for family in values["whole"])
            values["axes"] = tuple(
                {k: tuple(tuple(row) for row in rows) for k, rows in family.items()} for family in values["axes"]
            )
            table = cls(**values)
            table._check_values()
            table.predict({})
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            expected = [field.name for field in fields(cls)]
            raise PlanError(
                f"the latency table is damaged ({error}); expected JSON with the keys {expected}."
            ) from error
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to `path`; an interrupted write leaves an older file intact."""
        save_text_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table from `path`; `PlanError` if it is missing or damaged."""
        return cls.from_json(load_text_file(path, "latency table", PlanError))


def _expect(fits: bool, what: str, expected: str) -> None:
    if not fits:
        raise ValueError(f"{what}: expected {expected}")


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _falling(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The nearest sequence that never rises, by least squares: neighbours that rise become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (first, n), (second, m) = blocks[-2:]
            blocks[-2:] = [((first * n + second * m) / (n + m), n + m)]
    return np.repeat([value for value, _ in blocks], [n for _, n in blocks])
