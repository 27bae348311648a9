"""The tables of docs/results.md and README.md and the picture of both, from docs/results.json."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from quality_rows import ROWS as QUALITY_ROWS
from results_rows import RATIOS, README_SECTION, REPAIR, SECTIONS, ZERO_SHOT, ZERO_SHOT_QUESTIONS, Section

from hf_prune.report.pictures import perplexity_picture
from hf_prune.report.tables import markdown_table

if TYPE_CHECKING:
    from pathlib import Path

CORPORA = {"wikitext2": "WikiText-2 test", "novels": "novels (first 400,000 characters; part of the training data)"}
Results = dict[str, Any]


def write_pages(results: Results, root: Path) -> None:
    """Write docs/results.md, docs/results.svg, and the short table between the markers of README.md."""
    drawn = replace(README_SECTION, rows=README_SECTION.rows[:-1])  # the last two lie on each other
    picture(results, drawn, root / "docs" / "results.svg")
    short = "\n".join([table(results, README_SECTION, "wikitext2"), achieved_line(results)])
    readme = root / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split("<!-- results -->", 1)
    _, after = rest.split("<!-- /results -->", 1)
    readme.write_text(f"{before}<!-- results -->\n{short}\n<!-- /results -->{after}", encoding="utf-8")

    facts = [f"- {name}: {value}" for name, value in results.items() if isinstance(value, str)]
    parts = [
        "# Results",
        "Of the small model, made by `tests/benchmarks/results.py`; the numbers are in `docs/results.json`.",
    ]
    parts += [
        "\n".join(facts),
        "Columns: fraction of decoder parameters removed. Nothing was retrained unless said. Repair with ridge 0.01 "
        "throughout: these rows are older than the choice by held-out windows.",
    ]
    parts += ["![Perplexity on WikiText-2 test against the fraction removed](results.svg)"]
    if (quality := root / "docs" / "quality.json").exists():
        parts[1:1] = [*real_model(json.loads(quality.read_text(encoding="utf-8"))), "## A small model, every setting"]
    for section in SECTIONS:
        parts += [f"## {section.title}", *([section.note] if section.note else [])]
        for corpus, title in CORPORA.items():
            parts += [f"Perplexity on {title}:", table(results, section, corpus).rstrip()]
            parts += [repair_line(results, corpus)] if section is REPAIR else []
    if results.get("zero_shot"):
        parts += zero_shot_table(results)
    if results.get("rank_correlation"):
        parts += rank_correlation(results)
    recovery = "LoRA, all weights and distillation, beside the dense model: [recovery.md](recovery.md)."
    parts += ["## Training after pruning", recovery]
    parts += ["## Asked and achieved", achieved_line(results)]
    (root / "docs" / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


QUALITY_TEXTS = {
    "wikitext2_test": "WikiText-2",
    "novels_test": "novels",
    "boolq": "passages of BoolQ",
    "lambada": "LAMBADA",
}


def real_model(found: Results) -> list[str]:
    """What quality.py measured: the geometric mean of ratios to dense, and the texts one by one."""
    columns = ("20 %", "30 %", "50 %", "20 % repaired", "30 % repaired", "50 % repaired")
    order = {row.name: number for number, row in enumerate(QUALITY_ROWS)}

    def ratios(row: Results) -> list[float]:
        return [row[text] / found["dense"][text] for text in QUALITY_TEXTS]

    means: dict[str, dict[str, str]] = {}
    texts = []
    for row in sorted(found["rows"], key=lambda row: (row["repaired"], order[row["name"]], row["ratio"])):
        removed = f"{100 * row['ratio']:.0f} %"
        line = means.setdefault(row["name"], {"": row["name"], **dict.fromkeys(columns, "–")})
        line[removed + " repaired" * row["repaired"]] = f"{geometric_mean(ratios(row)):,.4g}"
        each = {title: f"{ratio:,.4g}" for title, ratio in zip(QUALITY_TEXTS.values(), ratios(row), strict=True)}
        on, _, coarse = row.get("device", found["device"]).partition(", products in bfloat16")
        name = row["name"] + " + repair" * row["repaired"]
        texts.append({"": name, "removed": removed, **each, "pruned on": on + "¹" * bool(coarse)})
    dense = ", ".join(f"{title} {found['dense'][text]:.2f}" for text, title in QUALITY_TEXTS.items())
    windows = sorted({found["windows"][text] for text in QUALITY_TEXTS})
    note = (
        f"{found['model']}, {found['dtype']}. Calibrated with a third each of WikiText-2 train, novels and "
        "instructions, 128 × 256 tokens unless said; judged by perplexity on windows of 256 tokens spread over each "
        f"text ({', '.join(map(str, windows))} of each), of which the last two are of kinds that nothing was "
        "calibrated with; LAMBADA was not looked at for any choice either, passages of BoolQ "
        "were in the trial of the ridge. Made by `tests/benchmarks/quality.py`; the numbers are in "
        "`docs/quality.json`. –: not measured."
    )
    return [
        "## A real model",
        note,
        f"Dense: {dense}. Geometric mean of the four ratios to it, by the fraction of decoder parameters removed:",
        markdown_table(list(means.values())).rstrip(),
        "The ratios one by one; ¹ products of layers but `down_proj` in bfloat16 while pruning and repairing:",
        markdown_table(texts).rstrip(),
    ]


def table(results: Results, section: Section, corpus: str) -> str:
    """One line per row of the section, one column per ratio."""
    ratios = [ratio for ratio in RATIOS if any(_found(results, row.cells(ratio), corpus) for row in section.rows)]
    columns = [f"{100 * ratio:.0f} %" for ratio in ratios]
    dense = f"{results['dense'][corpus]['perplexity']:.2f}"
    lines = [{"": f"dense: {dense}", **dict.fromkeys(columns, "")}]
    for row in section.rows:
        cells = [_cell(_found(results, row.cells(ratio), corpus)) for ratio in ratios]
        lines.append({"": row.label, **dict(zip(columns, cells, strict=True))})
    for label, values in section.published.items() if corpus == "wikitext2" else ():
        cells = ["–" if value is None else f"{value:.4g}" for value in (*values, *[None] * (len(ratios) - len(values)))]
        lines.append({"": f"*{label}*", **dict(zip(columns, cells, strict=True))})
    return markdown_table(lines)


def picture(results: Results, section: Section, path: Path) -> None:
    """Draw the section's perplexity on WikiText-2 test; seeds by their mean."""
    points: list[dict[str, Any]] = [
        {"method": "dense", "achieved_ratio": 0.0, "perplexity": results["dense"]["wikitext2"]["perplexity"]}
    ]
    for row in section.rows:
        for ratio in RATIOS:
            if found := _found(results, row.cells(ratio), "wikitext2"):
                points.append({"method": row.label, "achieved_ratio": ratio, "perplexity": fmean(found)})
    perplexity_picture(points, path, title="ref10m on WikiText-2 test, nothing retrained")


def _found(results: Results, cells: list[dict[str, Any]], corpus: str) -> list[float]:
    return [row[corpus]["perplexity"] for cell in cells for row in results["rows"] if row["config"] == cell]


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{fmean(values):,.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.4g}–{max(values):,.4g})"


def repair_line(results: Results, corpus: str) -> str:
    """Where repair lowers perplexity, and where not."""
    rows = {row.label: row for row in REPAIR.rows}
    pairs = [(label, row, rows[f"{label} + repair"]) for label, row in rows.items() if f"{label} + repair" in rows]
    gains, losses = 0, []
    for ratio in RATIOS:
        for label, row, repaired in pairs:
            before, after = (_found(results, found.cells(ratio), corpus) for found in (row, repaired))
            if before and after and after < before:
                gains += 1
            elif before and after:
                losses.append(f"{label}, {100 * ratio:.0f} %")
    where = f"; not for {'; '.join(losses)}" if losses else ""
    return f"Repair lowers perplexity in {gains} of {gains + len(losses)} pairs{where}."


def achieved_line(results: Results) -> str:
    """The largest difference between the asked and the achieved ratio."""
    rows = [row for row in results["rows"] if row["config"].get("budget", "decoder") == "decoder"]
    differences = [abs(row["achieved"]["decoder"] - row["config"]["pruning_ratio"]) for row in rows]
    worst = max(d / row["config"]["pruning_ratio"] for d, row in zip(differences, rows, strict=True))
    return (
        f"Over these {len(rows)} runs the achieved ratio differs from the asked one by at most "
        f"{100 * max(differences):.3f} percentage points ({100 * worst:.2f} % of it)."
    )


def zero_shot_table(results: Results) -> list[str]:
    """Accuracy per task, and the mean over the tasks."""
    accuracies = {json.dumps(row["config"], sort_keys=True): row["accuracy"] for row in results["zero_shot"]}
    labelled = [("dense", "", None)]
    labelled += [(row.label, f"{100 * ratio:.0f} %", row.cells(ratio)[0]) for ratio in (0.3, 0.5) for row in ZERO_SHOT]
    lines = []
    for label, ratio, cell in labelled:
        found = accuracies.get(json.dumps(cell, sort_keys=True))
        if found:
            named = {task: f"{100 * value:.1f}" for task, value in sorted(found.items())}
            lines.append({"": label, "removed": ratio, **named, "mean": f"{100 * fmean(found.values()):.1f}"})
    note = (
        f"Percent, through lm-eval, the first {ZERO_SHOT_QUESTIONS} questions of each file (standard error about 3 "
        "points per task). A model of this size answers hardly better than chance: this shows little but that it runs."
    )
    return ["## Zero-shot accuracy", note, markdown_table(lines).rstrip()]


def rank_correlation(results: Results) -> list[str]:
    """Spearman correlation between the criteria, mean over the axes of each kind."""
    parts = ["## Rank correlation between LLM-Pruner's criteria", "Spearman, mean over the layers, 128 × 256 tokens."]
    for kind, rows in results["rank_correlation"].items():
        lines = [{kind: name, **{other: f"{value:.2f}" for other, value in row.items()}} for name, row in rows.items()]
        parts.append(markdown_table(lines).rstrip())
    return parts
