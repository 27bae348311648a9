"""What the command line shows: tables for the terminal, strict JSON."""

from __future__ import annotations

import json
import logging
import math
import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_prune.config.checks import ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from hf_prune.cli.auto import Advice
    from hf_prune.cli.inspection import FamilyReport, InspectionReport, Verification
    from hf_prune.plan import PruningPlan
    from hf_prune.report.tables import Row
    from hf_prune.structure.axes import Structure

_MOST_ROWS = 16
"""Layers shown one by one; deeper models are shown in blocks."""


class _ToStderr(logging.Handler):
    """One line on stderr for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        Console(stderr=True, soft_wrap=True, highlight=False).print(record.getMessage())


def show_price() -> None:
    """Show on stderr what a run will read, write and compute, or how long it takes, before it starts."""
    for name in ("hf_prune.layers.price", "hf_prune.cli.auto", "hf_prune.recovery.recover"):
        price = logging.getLogger(name)
        if not price.handlers:
            price.addHandler(_ToStderr())
            price.setLevel(logging.INFO)


def print_error(message: str) -> None:
    """One red line on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"Error: {message}", style="red"))


def strict_json(values: Mapping[str, Any]) -> str:
    """JSON text; numbers that JSON does not have (NaN, infinity) become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(dict(values)), indent=2, allow_nan=False)


def print_evaluation(values: Mapping[str, Any]) -> None:
    """What `hf-prune eval --json` gives, as tables: texts, tasks, what was written, then size and speed."""
    from hf_prune.report.tables import comparison_table

    rest = {name: value for name, value in values.items() if not isinstance(value, (list, dict)) and value is not None}
    for name in ("texts", "tasks"):
        if name in values:
            _print(comparison_table([_with_intervals(row) for row in values[name]]))
    print_values(_with_intervals(values.get("generation", {})))
    print_values(_with_intervals(rest))


def _with_intervals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and the ends of their intervals (`name`, `name_low`, `name_high`) as one text each."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        if f"{name.rpartition('_')[0]}_low" in values or value is None:
            continue
        found[name] = value if low is None or high is None else f"{value:,.4g} ({low:,.4g} to {high:,.4g})"
    return found


def print_values(values: Mapping[str, str | int | float]) -> None:
    """Two columns: what, value."""
    rows = [(name.removeprefix("num_").replace("_", " "), _number(value)) for name, value in values.items()]
    _print(_grid(rows))


def print_inspection(report: InspectionReport) -> None:
    """The axes table, one row per family, then what stands in the way."""
    _print(
        f"{report.model_type}: {report.num_layers} layers, {report.num_parameters:,} parameters, "
        f"{report.num_decoder_parameters:,} of them in attention and MLP"
    )
    table = _table("axis", "layers", "units", "parameters/unit", "exact", "prunable", numbers=(2, 3))
    for row in report.families:
        table.add_row(
            row.name,
            ranges(row.layers) or "–",
            f"{row.num_units:,}",
            f"{row.parameters_per_unit:,}",
            "yes" if row.exact else "no",
            "yes" if row.prunable else "no",
        )
    _print(table)
    for row in report.families:
        _print("\n".join(_remarks(row)))
    if report.missing:
        _print(f"not found: {', '.join(report.missing)}")
    instead = "prune the model that it was made from, or pass --dequantise"
    _print(f"quantised ({report.quantised}): {instead}" if report.quantised else "")
    apart = "layers that predict further tokens (MTP) are not part of the loaded model: not pruned and not saved"
    _print(f"{report.mtp_layers} {apart}" if report.mtp_layers else "")
    for operation, module in report.unsupported_ops.items():
        _print(f"no rule for operation {operation} (first in {module}): the axes it touches stay whole")


def print_verification(checks: Sequence[Verification]) -> None:
    """Masked against sliced, one row per kind of axes."""
    table = _table("kind", "masked−sliced", "rounding up to", "dense−sliced", "equal", numbers=(1, 2, 3))
    for check in checks:
        differences = (f"{value:.2e}" for value in (check.difference, check.tolerance, check.effect))
        if not check.refused:
            table.add_row(check.kind, *differences, "yes" if check.equal else Text("NO", style="red"))
    table.title = "Largest difference of logits, random plans"
    _print(table)
    for check in checks:
        if check.refused:
            _print(f"{check.kind} cannot be removed: {check.refused}")


def print_plan(plan: PruningPlan, structure: Structure) -> None:
    """Asked and achieved ratios, parameters, and the widths of the layers."""
    from hf_prune.memory import memory_of  # imports torch, which an error or a help need not wait for

    config = plan.config
    before, after = structure.num_parameters(), plan.num_parameters(structure)
    achieved = ", ".join(f"{100 * value:.2f} % of {name}" for name, value in plan.achieved.items())
    rows = [
        ("asked", f"{100 * config.pruning_ratio:.2f} % of {config.budget} ({config.method}, {config.allocation_name})"),
        ("achieved", achieved),
        ("parameters", f"{before:,} → {after:,}"),
        *([("for", config.target.text)] if config.targets else []),
        *([("memory", memory_of(plan, structure).text)] if config.budget == "memory" else []),
    ]
    widths = plan.widths
    whole = [
        name for name in ("vocab", "hidden", "layers", "layers.attention", "layers.mlp") if name in plan.kept_indices
    ]
    rows += [(name, f"{widths[name]:,} of {plan.num_units[name]:,} stay") for name in whole]
    _print(_grid(rows))
    _print(widths_table(plan, len(structure.layer_paths)))


def print_outcome(
    *, output: Path | None, plugin: bool, perplexity: tuple[float | None, float | None], prune_s: float, save_s: float
) -> None:
    """Where the checkpoint is, what loading it takes, what pruning did to it, and how long it took."""
    before, after = perplexity
    measured = "not measured: no text was given, or no window of it is left to measure on"
    if before is not None and after is not None:
        measured = f"{before:,.4g} → {after:,.4g} on text that was not calibrated with"
    loads = "transformers, after `import hf_prune`" if plugin else "stock transformers (a plain checkpoint)"
    rows = [
        ("saved", "nothing (dry run)" if output is None else str(output)),
        ("loads with", loads),
        ("perplexity", measured),
        ("seconds", f"{prune_s:.1f} to prune" + ("" if output is None else f", {save_s:.1f} to save")),
    ]
    _print(_grid(rows))


def print_rows(rows: Sequence[Row], output: Path | None = None) -> None:
    """A table, the notes of its rows, and where it, or what it describes, was written."""
    from hf_prune.report.tables import comparison_table

    _print(comparison_table([{name: value for name, value in row.items() if name != "note"} for row in rows]))
    for row in rows:
        names = [str(row[name]) for name in ("method", "allocation", "axes") if name in row]
        _print(f"{', '.join(names)}: {row['note']}" if row.get("note") else "")
    _print(f"written to {output}" if output is not None else "")


def print_sweep(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Rows of a sweep in the columns that people compare by, readable at 80 columns."""
    from hf_prune.cli.sweep import in_short

    print_rows([{**short, "note": row.get("note")} for short, row in zip(in_short(rows), rows, strict=True)], output)


def print_advice(advice: Advice, output: Path) -> None:
    """What was measured, what is advised, its widths, and the command, ready for a shell."""
    from hf_prune.cli.auto import summary

    print_sweep(advice.rows, output / "report.html")
    print_plan(advice.plan, advice.structure)
    _print(_grid(summary(advice)))
    _print(shlex.join(advice.command))


def print_texts(rows: Sequence[Mapping[str, str]]) -> None:
    """A table of texts, which wrap where the terminal is narrow."""
    table = _table(*rows[0], numbers=())
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    _print(table)


def widths_table(plan: PruningPlan, num_layers: int) -> Table:
    """Widths of the layers: a row each for up to 16, else a row per run of equal layers, else blocks with ranges."""
    families = sorted({name.split(".", 2)[2] for name in plan.num_units if _is_per_layer(name)})
    cells = [tuple(_width(plan, layer, family) for family in families) for layer in range(num_layers)]
    groups = [[layer] for layer in range(num_layers)]
    if num_layers > _MOST_ROWS:
        groups = list(_runs(cells))
    if len(groups) > _MOST_ROWS:
        size = math.ceil(num_layers / _MOST_ROWS)
        groups = [list(range(first, min(first + size, num_layers))) for first in range(0, num_layers, size)]
    table = _table("layer", *families, numbers=tuple(range(1, 1 + len(families))))
    for group in groups:
        table.add_row(ranges(group), *(_cell([cells[layer][i] for layer in group]) for i in range(len(families))))
    return table


Width = tuple[int, int] | None


def _is_per_layer(name: str) -> bool:
    return name.startswith("layers.") and name.split(".")[1].isdigit()


def _width(plan: PruningPlan, layer: int, family: str) -> Width:
    """Kept and all units; `None` where the layer has no such prunable axis."""
    name = f"layers.{layer}.{family}"
    if name not in plan.num_units:
        return None
    gone = layer in plan.removed_layers or (layer, family.partition(".")[0]) in plan.removed_branches
    return (0 if gone else plan.widths[name], plan.num_units[name])


def _runs(cells: Sequence[tuple[Width, ...]]) -> Iterator[list[int]]:
    run = [0]
    for layer in range(1, len(cells)):
        if cells[layer] != cells[run[0]]:
            yield run
            run = []
        run.append(layer)
    yield run


def _cell(widths: Sequence[Width]) -> str:
    found = [width for width in widths if width is not None]
    if not found:
        return "–"
    kept, total = [width[0] for width in found], max(width[1] for width in found)
    if max(kept) == 0:
        return "removed"
    return f"{min(kept):,}–{max(kept):,} of {total:,}" if min(kept) < max(kept) else f"{kept[0]:,} of {total:,}"


def _remarks(row: FamilyReport) -> Iterator[str]:
    """What in the config holds the width, and what is against pruning."""
    where = f"{row.name} (layers {ranges(row.layers)})" if row.layers else row.name
    if row.reason:
        verdict = "not prunable" if not row.prunable else "depends on depth" if row.exact else "not exact"
        yield f"{where}: {verdict}: {row.reason}"
    if row.layers and row.prunable:
        yield f"{where}: width held by {row.attributes or 'no config attribute: its layers are built and resized'}"


def _number(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _table(*columns: str, numbers: Sequence[int]) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in numbers else "left", overflow="fold")
    return table


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for what, value in rows:
        grid.add_row(Text(what, style="bold"), Text(value))
    return grid


def _print(content: Table | str) -> None:
    if content:
        console = Console(highlight=False)
        console.print(Text(content) if isinstance(content, str) else content, soft_wrap=isinstance(content, str))
