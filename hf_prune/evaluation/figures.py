"""How all pictures look, and where they go. Matplotlib (the extra `plot`) is imported only to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_prune.errors import ConfigError, HFPruneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, GHOST = "#22252a", "#6b7280", "#e5e7eb", "#eceef2"
COLORS = ("#3b6fb6", "#d9803a", "#4c9f70", "#a8508f", "#8a6d3b", "#5b5fc7", "#c44e52", "#4aa3b5")
SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(path: str | Path, *, width: float, height: float) -> Figure:
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
