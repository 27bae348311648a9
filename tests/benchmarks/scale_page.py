"""The page docs/scale.md, from docs/scale.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.report.tables import markdown_table

if TYPE_CHECKING:
    from pathlib import Path

TITLES = {
    "1b": "1.1 billion parameters, disk against memory",
    "7b": "7 billion parameters",
    "7b1": "One of its layers: `obs`",
}
Results = dict[str, Any]


def write_page(results: Results, path: Path) -> None:
    """Write the page of these numbers."""
    parts = [
        "# Models larger than memory",
        "Made by `tests/benchmarks/scale.py`; the numbers are in `docs/scale.json`. Weights are random: time and "
        "memory do not depend on them. Each run is a process of its own; memory is resident size above what the "
        "process held after pruning a tiny model both ways (all imports done), and time is that of scoring, pruning, "
        "repair and saving. Pages of files that are mapped (safetensors) count in the peak, though the system may drop "
        "them: they stand in a column of their own.",
    ]
    for shape in TITLES:
        parts += measured(results[shape], TITLES[shape]) if shape in results else missing(shape)
    parts += counted(results["counted"]) if "counted" in results else []
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def missing(shape: str) -> list[str]:
    """The place of what was not measured yet."""
    return [
        f"## {TITLES[shape]}",
        f"*Not measured yet:* `python tests/benchmarks/scale.py --shape {shape}` fills this in.",
    ]


def measured(found: Results, title: str) -> list[str]:
    """The runs of one shape."""
    facts = [f"- {name}: {value}" for name, value in found["circumstances"].items()]
    size = f"{found['num_hidden_layers']} layers of {found['hidden_size']} and {found['intermediate_size']} channels"
    text = (
        f"A random bfloat16 Llama, {size}: {_giga(found['bytes'])} GB on disk. {found['samples']} × {found['tokens']} "
        f"calibration tokens, layers run on {found['device']}."
    )
    lines = []
    memory = {row["method"]: row for row in found["rows"] if row["layers_on"] == "memory"}
    for row in found["rows"]:
        other = memory.get(row["method"])
        ratio = ""
        if other is not None and row["layers_on"] == "disk" and "obs_layers" not in row:
            ratio = f"{row['seconds'] / other['seconds']:.2f}, {row['cpu_seconds'] / other['cpu_seconds']:.2f}"
        line = {
            "": f"{row['method']}, {row['layers_on']}"
            + (f" ({row['obs_layers']} layers)" if "obs_layers" in row else ""),
            "peak": f"{_giga(row['peak']['peak'])} GB",
            "anonymous": f"{_giga(row['peak']['anonymous'])} GB",
            "of files": f"{_giga(row['peak']['file_backed'])} GB",
            "seconds": f"{row['seconds']:,.0f}",
            "of CPU": f"{row['cpu_seconds']:,.0f}",
            "÷ in memory (wall, CPU)": ratio,
        }
        lines.append(line)
    allowed = found["rows"][0]["allowance"]
    goal = (
        f"Allowed are 2.5 × the largest layer ({_giga(allowed['layer'])} GB) + what is outside of the layers "
        f"({_giga(allowed['embeddings'])} GB) + hidden states in memory ({_giga(allowed['boundaries'])} GB) = "
        f"**{_giga(allowed['total'])} GB**; with the layer in float64, in which repair and `obs` solve, "
        f"{_giga(allowed['total'] + 2.5 * 3 * allowed['layer'])} GB."
    )
    phases = [
        {
            "peak by phase, GB (anonymous)": f"{row['method']}, {row['layers_on']}",
            **{name: f"{_giga(phase['peak'])} ({_giga(phase['anonymous'])})" for name, phase in row["phases"].items()},
        }
        for row in found["rows"]
        if "obs_layers" not in row
    ]
    timed = [
        f"`obs` takes {row['seconds_each']:,.1f} s for each layer beyond the passes: "
        f"{32 * row['seconds_each'] / 60:,.0f} minutes for 32 of them."
        for row in found["rows"]
        if "obs_layers" in row
    ]
    tables = [markdown_table(lines).rstrip(), goal, markdown_table(phases).rstrip()]
    return [f"## {title}", text, "\n".join(facts), *filter(None, tables), *timed]


def counted(found: Results) -> list[str]:
    """What large models would read, write and compute."""
    lines, hours = [], []
    for row in found["rows"]:
        name = {"": f"{row['model']}, {row['method']}"}
        lines.append(
            name
            | {
                "weights, GB": f"{2 * row['parameters'] / 1e9:,.0f}",
                "a layer, GB": f"{row['largest_layer_bytes'] / 1e9:,.1f}",
                "read, GB": f"{(row['bytes_read'] + row['pruned_bytes_read']) / 1e9:,.0f}",
                "written, GB": f"{row['bytes_written'] / 1e9:,.0f}",
                "boundaries on disk, GB": f"{row['boundary_bytes'] / 1e9:,.0f}",
                "hidden states held, GB": f"{row['held_bytes'] / 1e9:,.0f}",
                "largest H in float64, GB": f"{row['largest_gram_bytes'] / 1e9:,.1f}",
            }
        )
        parts = [row[f"{kind}_hours"] for kind in ("disk", "pass", "gram", "solving")]
        hours.append(
            name
            | {
                "passes, TFLOP": f"{row['operations'] / 1e12:,.0f}",
                "sums of products, TFLOP": f"{row['gram_operations'] / 1e12:,.0f}",
                "factorisations, TFLOP": f"{row['solving_operations'] / 1e12:,.0f}",
                **dict(
                    zip(
                        ("disk, h", "passes, h", "sums, h", "factorisations, h"),
                        (f"{x:.2f}" for x in parts),
                        strict=True,
                    )
                ),
                "together, h": f"{sum(parts):.1f}",
            }
        )
    rates = found["rates"]
    note = (
        f"Counted, not measured (`hf_prune.layers.price`), at ratio {found['ratio']} with repair on "
        f"{found['samples']} × {found['tokens']} tokens, in bfloat16 on one card, which holds one layer at a time. "
        f"Hours = (read + written) / {rates['disk'] / 1e9:g} GB/s + passes / {rates['passes'] / 1e12:g} TFLOP/s "
        f"(bfloat16) + sums of products / {rates['gram'] / 1e12:g} TFLOP/s (float32) + factorisations and eliminations "
        f"/ {rates['solving'] / 1e12:g} TFLOP/s (float64), as if nothing overlapped; the rates are assumptions. Not "
        "counted: attention scores, reading hidden states back, transfers to the card. H is the matrix of a "
        "consumer's inputs; factorisations and eliminations hold several copies of it."
    )
    return ["## Counted: one 24 GB card", note, markdown_table(lines).rstrip(), markdown_table(hours).rstrip()]


def _giga(number: float) -> str:
    return f"{number / 1e9:.2f}"
