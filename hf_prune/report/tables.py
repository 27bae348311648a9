"""Tables of results, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from hf_prune.errors import ConfigError

Row = Mapping[str, str | int | float | None]
"""One result, by column. `*_ratio` columns are shown in percent, `speedup` as a factor, other floats to 0.01."""

_HEADINGS = {"achieved_ratio": "removed", "pruning_ratio": "asked", "times_dense": "× dense", "latency_ms": "ms"}


def comparison_table(rows: Sequence[Row], *, title: str | None = None) -> Table:
    """Put results into a table for the terminal.

    Args:
        rows: the results; a column is shown if any row has it, in the order of first appearance.
        title: above the table.

    Returns:
        A table for `rich.print`. Fractions are shown in percent; missing values as an en dash.

    Raises:
        ConfigError: there is no row.
    """
    columns = _columns(rows)
    table = Table(title=title)
    for column in columns:
        table.add_column(_heading(column), justify="right" if _is_numeric(rows, column) else "left")
    for row in rows:
        table.add_row(*(Text(_cell(column, row.get(column))) for column in columns))  # Text: no markup in names
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Write the results that `comparison_table` shows as a Markdown table, for model cards and documents.

    Args:
        rows: the results.

    Returns:
        Lines of Markdown, each with a line end.

    Raises:
        ConfigError: there is no row.
    """
    columns = _columns(rows)
    lines = [
        [_heading(column) for column in columns],
        ["---:" if _is_numeric(rows, column) else "---" for column in columns],
        *([_cell(column, row.get(column)).replace("|", "\\|") for column in columns] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _columns(rows: Sequence[Row]) -> list[str]:
    if not rows:
        raise ConfigError("no rows to show: expected at least one result")
    return list(dict.fromkeys(column for row in rows for column in row))


def _heading(column: str) -> str:
    return _HEADINGS.get(column) or column.removesuffix("_ratio").removeprefix("num_").replace("_", " ")


def _is_numeric(rows: Sequence[Row], column: str) -> bool:
    values = [row.get(column) for row in rows]
    return any(value is not None for value in values) and not any(isinstance(value, str) for value in values)


def _cell(column: str, value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if column.endswith("_ratio"):
        return f"{100 * value:.1f} %"
    if column == "speedup":
        return f"{value:.2f} ×"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
