"""Pictures of results. Matplotlib (the extra `plot`) is imported only to draw."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError, HFPruneError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from hf_prune.report.tables import Row


INK, MUTED, GRID, GHOST = "#22252a", "#6b7280", "#e5e7eb", "#eceef2"
COLORS = ("#3b6fb6", "#d9803a", "#4c9f70", "#a8508f", "#8a6d3b", "#5b5fc7", "#c44e52", "#4aa3b5")
SUFFIXES = (".png", ".svg", ".pdf")
CURVES = (("loss", "loss (nats per token)"), ("entropy", "entropy (bits per unit)"))

_PER_LAYER = re.compile(r"layers\.(\d+)\.((?:attention|mlp|experts)(?:\..+)?)")
_LABELS = {"attention": "Attention groups", "mlp": "MLP channels", "experts": "Experts"}
_WHOLE_MODEL = {
    "hidden": "hidden channels",
    "layers": "layers",
    "layers.attention": "attention blocks",
    "layers.mlp": "MLP blocks",
}
_COLUMNS, _LOWEST = 200, 1e-4
"""Of the picture of scores: columns, and the least score that has a colour of its own, over the highest."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def widths_picture(
    widths: Mapping[str, int], num_units: Mapping[str, int], path: str | Path, *, title: str = "What each layer keeps"
) -> None:
    """Draw which fraction of attention groups and MLP channels every layer keeps.

    One panel per family of axes (`layers.{i}.attention`, `layers.{i}.mlp`, `layers.{i}.mlp.{name}`), one bar per
    layer; a cross marks layers that keep nothing, a gap those without the axis. Axes of the whole model (`hidden`,
    `layers`, `layers.attention`, `layers.mlp`) are given in words where they lose units.

    Args:
        widths: units kept per axis; an axis not named keeps all.
        num_units: units of every axis of the dense model.
        path: where to write, `.png`, `.svg` or `.pdf`; folders are made.
        title: above the picture.

    Raises:
        ConfigError: no per-layer axis, a width out of range, or an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    panels = _panels(widths, num_units)
    num_layers = 1 + max(layer for panel in panels.values() for layer in panel)
    figure = _new_figure(path, width=min(14.0, max(7.0, 2.2 + 0.16 * num_layers)), height=1.1 + 1.85 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (family, panel), color in zip(axes, panels.items(), COLORS * len(panels), strict=False):
        _draw_panel(ax, family, panel, color)
    axes[-1].set_xlabel("decoder layer", color=MUTED, fontsize=9)
    axes[-1].set_xlim(-0.7, num_layers - 0.3)
    axes[-1].set_xticks(range(0, num_layers, _tick_step(num_layers)))
    whole_model = " · ".join(
        f"{widths.get(name, num_units[name]):,} of {num_units[name]:,} {label}"
        for name, label in _WHOLE_MODEL.items()
        if name in num_units and widths.get(name, num_units[name]) < num_units[name]
    )
    if whole_model:
        figure.supxlabel(f"also kept: {whole_model}", color=MUTED, fontsize=9)
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    save_figure(figure, path)


def scores_picture(
    scores: Mapping[str, Tensor], widths: Mapping[str, int], path: str | Path, *, title: str = "Scores, and what stays"
) -> None:
    """Draw the scores of every layer's units, the best on the left, and how many of them stay.

    One panel per family of axes, as in `widths_picture`; colours are logarithms, over the highest score of the family.

    Args:
        scores: of all units of each axis.
        widths: units kept per axis; an axis not named keeps all.
        path: where to write, `.png`, `.svg` or `.pdf`; folders are made.
        title: above the picture.

    Raises:
        ConfigError: no per-layer axis, or an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    from matplotlib.ticker import PercentFormatter

    num_units = {name: len(own) for name, own in scores.items()}
    panels = _panels({name: widths.get(name, number) for name, number in num_units.items()}, num_units)
    figure = _new_figure(path, width=8.0, height=1.1 + 2.1 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (family, panel) in zip(axes, panels.items(), strict=True):
        layers = sorted(panel)
        own = [scores[f"layers.{layer}.{family}"].double().sort(descending=True).values for layer in layers]
        highest = max(float(row[0]) for row in own)
        places = [[round(i * (len(row) - 1) / (_COLUMNS - 1)) for i in range(_COLUMNS)] for row in own]
        shown = [(row / highest).clamp(_LOWEST).log10()[at].tolist() for row, at in zip(own, places, strict=True)]
        extent = (0, 1, len(layers) - 0.5, -0.5)
        ax.imshow(shown, aspect="auto", cmap="viridis", vmin=math.log10(_LOWEST), vmax=0, extent=extent)
        kept = [panel[layer][0] / panel[layer][1] for layer in layers for _ in range(2)]
        ax.plot(kept, [i + side for i in range(len(layers)) for side in (-0.5, 0.5)], color="white", linewidth=2)
        ax.set_title(_family_label(family), color=INK, fontsize=10, loc="left")
        ax.set_ylabel("decoder layer", color=MUTED, fontsize=9)
        ax.set_yticks(range(0, len(layers), step := _tick_step(len(layers))), map(str, layers[::step]))
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        _without_frame(ax)
    axes[-1].set_xlabel("units, the best on the left; what stays ends at the white line", color=MUTED, fontsize=9)
    figure.supxlabel(f"yellow: the highest score · dark: {_LOWEST:g} of it, or less", color=MUTED, fontsize=9)
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    save_figure(figure, path)


def perplexity_picture(
    rows: Sequence[Row],
    path: str | Path,
    *,
    x: str = "achieved_ratio",
    y: str = "perplexity",
    title: str = "Perplexity after pruning",
) -> None:
    """Draw perplexity against the fraction removed, one line per method, on a logarithmic scale.

    Rows that removed nothing are the dense model: a dashed line.

    Args:
        rows: results with the columns `method`, `x` and `y`; rows where `y` is missing or not finite are left out.
        path: where to write, `.png`, `.svg` or `.pdf`; folders are made.
        x: column of the fraction removed, 0 to 1.
        y: column of the perplexity, above 0.
        title: above the picture.

    Raises:
        ConfigError: no row with all three columns, or an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    lines, dense = _lines(rows, x, y, along=x)
    figure = _new_figure(path, width=7.2, height=4.4)
    ax = figure.subplots()
    _draw_lines(ax, lines, dense, y)
    ax.set_xlabel("removed", color=MUTED, fontsize=9)
    ax.set_xlim(left=0)
    _format_axes(ax, log_y=True)
    ax.legend(edgecolor="none", framealpha=0.9, fontsize=9, labelcolor=INK)
    ax.set_title(title, color=INK, fontsize=12, weight="bold", loc="left")
    save_figure(figure, path)


def tradeoff_picture(
    rows: Sequence[Row], path: str | Path, *, y: str = "perplexity", title: str = "What pruning costs and gains"
) -> None:
    """Draw perplexity against decoder parameters removed and against latency, one line per method, side by side.

    All lines start at the dense model, a star.

    Args:
        rows: results with the columns `method`, `decoder_ratio`, `latency_ms` and `y`; those with ratio 0 are dense.
        path: where to write, `.png`, `.svg` or `.pdf`; folders are made.
        y: column of the perplexity, above 0.
        title: above the picture.

    Raises:
        ConfigError: no row with these columns, or an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    lines, dense = _lines(rows, "decoder_ratio", y)
    figure = _new_figure(path, width=10.4, height=4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    starts = [row["latency_ms"] for row in rows if row.get("decoder_ratio") == 0 and row.get("latency_ms")]
    _draw_lines(left, lines, dense, y, start=0.0)
    _draw_lines(right, _lines(rows, "latency_ms", y)[0], dense, y, start=starts[0] if starts else None)
    for ax, label in ((left, "decoder parameters removed"), (right, "milliseconds of a request, as measured")):
        ax.set_xlabel(label, color=MUTED, fontsize=9)
        _format_axes(ax, log_y=True)
    right.xaxis.set_major_formatter(_plain_number)
    right.set_ylabel("")
    left.legend(edgecolor="none", framealpha=0.9, fontsize=8, labelcolor=INK)
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    save_figure(figure, path)


def learning_curve_picture(
    history: Sequence[Mapping[str, float | int | str]], path: str | Path, *, title: str = "Learning the masks"
) -> None:
    """Draw loss and entropy of the sampled masks against the token-forwards spent.

    Args:
        history: `PruningResult.history`: per step `loss`, `entropy`, `token_forwards` and `phase`.
        path: where to write, `.png`, `.svg` or `.pdf`; folders are made.
        title: above the picture.

    Raises:
        ConfigError: fewer than two steps, or an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    if len(history) < 2:
        raise ConfigError(f"found {len(history)} steps, expected two or more to draw a curve.")
    figure = _new_figure(path, width=8.0, height=1.1 + 1.9 * len(CURVES))
    axes = figure.subplots(len(CURVES), 1, sharex=True)
    tokens = [float(row["token_forwards"]) / 1e6 for row in history]
    window = max(1, len(history) // 50)
    for ax, (name, label), color in zip(axes, CURVES, COLORS, strict=False):
        values = [float(row[name]) for row in history]
        smooth = [math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
        ax.plot(tokens, values, color=color, linewidth=0.8, alpha=0.3)
        ax.plot(tokens, smooth, color=color, linewidth=1.8)
        ax.set_title(label, color=INK, fontsize=10, loc="left")
        ax.grid(color=GRID, linewidth=0.8)
        _without_frame(ax)
        for i in range(1, len(history)):
            if history[i]["phase"] != history[i - 1]["phase"]:
                ax.axvline(tokens[i - 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
                ax.annotate(
                    f" {history[i]['phase']}", (tokens[i - 1], ax.get_ylim()[1]), va="top", color=MUTED, fontsize=9
                )
    axes[-1].set_xlabel("million token-forwards", color=MUTED, fontsize=9)
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    save_figure(figure, path)


def _new_figure(path: str | Path, *, width: float, height: float) -> Figure:
    """An empty figure of this size in inches, to be saved at `path`.

    Raises:
        ConfigError: an unknown file type.
        HFPruneError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: found file type '{Path(path).suffix}', expected one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HFPruneError("pictures need matplotlib: pip install 'hf_prune[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` to `path`; folders are made. The same picture is the same bytes: no date, no random names."""
    from matplotlib import rc_context

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with rc_context({"svg.hashsalt": "hf_prune"}):
        figure.savefig(path, dpi=160, metadata=date)


def _panels(widths: Mapping[str, int], num_units: Mapping[str, int]) -> dict[str, dict[int, tuple[int, int]]]:
    """Per family of axes, kept and all units of each layer: attention first."""
    for name in [name for name in widths if name not in num_units or not 0 <= widths[name] <= num_units[name]]:
        raise ConfigError(f"{name}: found width {widths[name]}, expected 0 to {num_units.get(name, 'no such axis')}")
    panels: dict[str, dict[int, tuple[int, int]]] = {}
    for name, total in num_units.items():
        if match := _PER_LAYER.fullmatch(name):
            panels.setdefault(match[2], {})[int(match[1])] = (widths.get(name, total), total)
    if not panels:
        raise ConfigError(f"no axis of a layer (`layers.0.mlp`, ...) among {sorted(num_units)}: nothing to draw")
    return dict(sorted(panels.items()))


def _draw_panel(ax: Axes, family: str, panel: Mapping[int, tuple[int, int]], color: str) -> None:
    layers = sorted(panel)
    fractions = [panel[layer][0] / panel[layer][1] for layer in layers]
    ax.bar(layers, [1.0] * len(layers), width=0.78, color=GHOST)
    ax.bar(layers, fractions, width=0.78, color=color)
    gone = [layer for layer in layers if panel[layer][0] == 0]
    ax.plot(gone, [0.06] * len(gone), linestyle="none", marker="x", markersize=5, color=MUTED)
    kept, total = (sum(values) for values in zip(*panel.values(), strict=True))
    ax.axhline(kept / total, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_title(_family_label(family), color=INK, fontsize=10, loc="left")
    ax.set_title(f"{kept:,} of {total:,} kept ({kept / total:.0%})", color=MUTED, fontsize=9, loc="right")
    ax.set_ylim(0, 1.0)
    ax.set_yticks([0, 0.5, 1])
    _format_axes(ax)


def _family_label(family: str) -> str:
    name, _, member = family.partition(".")
    return _LABELS[name] + (f" ({member})" if member else "")


def _tick_step(num_layers: int) -> int:
    return next(step for step in (1, 2, 4, 5, 10, 20, 50, num_layers) if num_layers / step <= 24)


def _lines(
    rows: Sequence[Row], x: str, y: str, along: str = "decoder_ratio"
) -> tuple[dict[str, list[tuple[float, float]]], float | None]:
    """Points of each method in the order of their column `along`, and the dense perplexity if a row removed nothing."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    dense: float | None = None
    for row in rows:
        method, place, value, order = (row.get(name) for name in ("method", x, y, along))
        if not isinstance(place, int | float) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            continue
        if order == 0:
            dense = float(value)
        elif method is not None and isinstance(order, int | float):
            lines.setdefault(str(method), []).append((float(order), float(place), float(value)))
    if not lines and dense is None:
        raise ConfigError(f"no row has 'method', a number '{x}' and a finite '{y}' above 0: nothing to draw")
    return {method: [point[1:] for point in sorted(points)] for method, points in lines.items()}, dense


def _draw_lines(
    ax: Axes, lines: Mapping[str, list[tuple[float, float]]], dense: float | None, y: str, start: Any = None
) -> None:
    """One line per method in the order of its points, on a logarithmic scale; the dense model dashed.

    With a `start`, where the dense model lies, lines begin there.
    """
    ax.set_yscale("log")
    first = [] if start is None or dense is None else [(float(start), dense)]
    for i, (method, points) in enumerate(lines.items()):
        ax.plot(
            *zip(*first, *points, strict=True),
            color=COLORS[i % len(COLORS)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5.5,
            markevery=slice(len(first), None),
            linewidth=1.8,
            label=method,
        )
    for point in first:
        ax.plot(*point, color=MUTED, marker="*", markersize=11, linestyle="none", zorder=3)
    if dense is not None:
        ax.axhline(dense, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label=f"dense ({dense:.2f})")
    ax.set_ylabel(f"{y.replace('_', ' ')} (log scale)", color=MUTED, fontsize=9)


def _format_axes(ax: Axes, *, log_y: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    (ax.xaxis if log_y else ax.yaxis).set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if log_y:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(MaxNLocator(6) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(color=GRID, linewidth=0.8)
    _without_frame(ax)


def _without_frame(ax: Axes) -> None:
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)
    ax.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5)


def _plain_number(value: float, _: Any) -> str:
    return f"{value:,.10g}"
