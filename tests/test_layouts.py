"""Layouts against their brute-force meaning: which unit of each axis every position carries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.structure import layouts as lay
from hf_prune.structure.layouts import Concat, Fixed, Product, Units

NUM_UNITS = {"A": 3, "B": 4, "C": 5}


def positions(layout):
    """For each position the units it carries: `{axis: unit}`."""
    if isinstance(layout, Fixed):
        return [{} for _ in range(layout.length)]
    if isinstance(layout, Units):
        return [{layout.axis: unit} for unit in range(layout.num_units)]
    if isinstance(layout, Concat):
        return [position for part in layout.parts for position in positions(part)]
    found = [{}]
    for factor in layout.factors:
        found = [{**outer, **inner} for outer in found for inner in positions(factor)]
    return found


@st.composite
def layouts(draw, names=tuple(NUM_UNITS), depth=3):
    """Random layouts; a product carries each axis once, a concatenation may repeat it (`[I + I]`)."""
    kind = draw(st.sampled_from(["fixed", "units", "product", "concat"])) if depth else "fixed"
    if kind == "units" and names:
        name = draw(st.sampled_from(names))
        return Units(name, NUM_UNITS[name])
    if kind == "product":
        outer = draw(layouts(names, depth - 1))
        rest = tuple(name for name in names if name not in set(lay.axes(outer)))
        return Product((outer, draw(layouts(rest, depth - 1))))
    if kind == "concat":
        return Concat(tuple(draw(layouts(names, depth - 1)) for _ in range(draw(st.integers(1, 3)))))
    return Fixed(draw(st.integers(1, 3)))


kept_indices = st.fixed_dictionaries(
    {},
    optional={name: st.sets(st.integers(0, n - 1), min_size=1).map(sorted) for name, n in NUM_UNITS.items()},
)


@given(layouts(), kept_indices)
def test_indices_are_the_positions_whose_units_all_stay(layout, kept):
    expected = [
        index
        for index, units in enumerate(positions(layout))
        if all(unit in kept.get(axis, range(NUM_UNITS[axis])) for axis, unit in units.items())
    ]
    assert lay.indices(layout, kept).tolist() == expected
    assert lay.size(layout, {axis: len(units) for axis, units in kept.items()}) == len(expected)


@given(layouts())
def test_without_pruning_every_position_stays(layout):
    assert lay.indices(layout, {}).tolist() == list(range(lay.size(layout, {})))
    assert lay.size(layout, {}) == len(positions(layout))


@given(layouts(), st.sampled_from(list(NUM_UNITS)))
def test_unit_ids(layout, axis):
    assert lay.unit_ids(layout, axis).tolist() == [units.get(axis, -1) for units in positions(layout)]
    assert (axis in set(lay.axes(layout))) == any(axis in units for units in positions(layout))


@given(
    layouts(),
    layouts(),
    st.sampled_from(list(NUM_UNITS)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_reduce_sums_everything_but_one_axis(rows, columns, axis, dtype):
    shape = (lay.size(rows, {}), lay.size(columns, {}))
    values = torch.arange(shape[0] * shape[1]).reshape(shape).remainder(7).to(dtype)
    if axis not in {*lay.axes(rows), *lay.axes(columns)}:
        with pytest.raises(KeyError, match=axis):
            lay.reduce(values, (rows, columns), axis)
        return
    expected = [0.0] * NUM_UNITS[axis]
    for r, row in enumerate(positions(rows)):
        for c, column in enumerate(positions(columns)):
            for units in (row, column):  # an axis on both dimensions: both sums
                if axis in units:
                    expected[units[axis]] += values[r, c].item()
    result = lay.reduce(values, (rows, columns), axis)
    assert result.tolist() == expected
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if axis in lay.axes(columns):
        only_columns = [
            values[:, lay.unit_ids(columns, axis) == unit].to(result.dtype).sum().item()
            for unit in range(NUM_UNITS[axis])
        ]
        assert lay.reduce_dim(values, columns, 1, axis).tolist() == only_columns


@given(layouts(), kept_indices)
def test_pruning_in_two_steps_is_pruning_once(layout, kept):
    """Slicing to all kept units one axis after the other gives the positions of slicing once."""
    once = lay.indices(layout, kept)
    stepwise = torch.arange(lay.size(layout, {}))
    for axis, units in kept.items():
        stays = torch.zeros(lay.size(layout, {}), dtype=torch.bool)
        stays[lay.indices(layout, {axis: units})] = True
        stepwise = stepwise[stays[stepwise]]
    assert torch.equal(once, stepwise)


def test_text_shows_products_and_concatenations():
    layout = Concat((Product((Units("H", 4), Fixed(8))), Units("I", 3)))
    assert str(layout) == "[(H × 8) + I]"
