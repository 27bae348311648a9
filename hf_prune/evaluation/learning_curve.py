"""A picture of how a policy was learned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_prune.errors import ConfigError
from hf_prune.evaluation.figures import COLORS, GRID, INK, MUTED, new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CURVES = (("loss", "loss (nats per token)"), ("entropy", "entropy (bits per unit)"))


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
    figure = new_figure(path, width=8.0, height=1.1 + 1.9 * len(CURVES))
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
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
        ax.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5)
        for i in range(1, len(history)):
            if history[i]["phase"] != history[i - 1]["phase"]:
                ax.axvline(tokens[i - 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
                ax.annotate(
                    f" {history[i]['phase']}", (tokens[i - 1], ax.get_ylim()[1]), va="top", color=MUTED, fontsize=9
                )
    axes[-1].set_xlabel("million token-forwards", color=MUTED, fontsize=9)
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    save_figure(figure, path)
