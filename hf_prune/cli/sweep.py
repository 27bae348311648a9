"""Many plans of one model: methods × allocations × repairs × ratios, one table, one picture.

Scores are computed once per method and kept; each row is written when it is measured, so that a second run measures
only what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_prune.atomic import held_by, replaced_file
from hf_prune.calibration import calibration_names, is_text
from hf_prune.checkpoint.files import REPORT_NAME
from hf_prune.config import CONFIGS, PruningConfig, selected_axes
from hf_prune.data import evaluation_windows, load_text
from hf_prune.errors import BudgetError, CheckpointError, ConfigError, ScoreError
from hf_prune.evaluation.estimates import mean_of
from hf_prune.evaluation.generation import samples
from hf_prune.evaluation.latency import measure_latency
from hf_prune.evaluation.perplexity import exp, window_losses
from hf_prune.evaluation.speed import measure_speed, num_parameters, usual_request
from hf_prune.gate import check_model, check_windows, unwrapped
from hf_prune.latency import LatencyTable
from hf_prune.layers.processes import main_writes, of_main_process, reserved_for_all
from hf_prune.layers.work import read_tensors, write_tensors
from hf_prune.pipeline import base_model_of, calibration_data, prune
from hf_prune.reading import save_text_file
from hf_prune.report.card import calibration_words, command_block, samples_table, setting_words
from hf_prune.report.html import html_page
from hf_prune.report.pictures import tradeoff_picture
from hf_prune.report.tables import markdown_table
from hf_prune.scores import METHODS, check_scores, score
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.layers.walk import Batch
    from hf_prune.pipeline import Calibration, PruningResult
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

Values = dict[str, Any]
Key = tuple[str, str, str, float]
"""Method, allocation, repair (empty: the method's own), asked ratio: which row it is."""
_DENSE: Key = ("dense", "", "", 0.0)
_COLUMNS = ("method", "allocation", "repair", "pruning_ratio")
_APART = ("plan", "samples")
"""What a row has that is no cell of a table."""


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    methods: Sequence[str],
    ratios: Sequence[float],
    text: str,
    calibration: Calibration | None = None,
    allocations: Sequence[Any] = (),
    repairs: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 8,
    latency: LatencyTable | None = None,
    seconds: float = math.inf,
) -> list[Values]:
    """Prune `model` in all combinations, and measure perplexity, size and speed of each. Writes into `output_dir`.

    Of several processes the main one writes, and its measurements count.

    `results.json` holds the rows and what they were measured with, `results.md` the table, `tradeoff.png` the picture
    (with matplotlib), `report.html` all for people, `scores/` the scores, `plans/` the plan of each row, `latency.json`
    the latency table where the budget is `latency`. A second call goes on where an interrupted one stopped. The model
    is not changed.

    Args:
        model: the dense causal LM.
        tokenizer: its tokenizer.
        output_dir: made if missing; new, or that of an earlier sweep of the same model, text and settings.
        methods: names of methods, each with its own defaults.
        ratios: fractions to remove, above 0 and below 1.
        text: what perplexity is measured on: a file or a dataset, see `load_text`.
        calibration: for methods, allocations and repairs that need it; see `prune`.
        allocations: names or mappings; default: that of each method.
        repairs: values of `repair`; default: that of each method.
        settings: other fields of the configurations; methods that do not have a field do without.
        window: tokens of each window of `text`.
        max_windows: so many of them, evenly spaced; default: all.
        batch_size: windows per forward pass.
        latency: table for the budget `latency`; default: measured once.
        seconds: no row is begun after so many; another call measures those that are missing.

    Returns:
        The rows, the dense model's first: `times_dense` is the perplexity over that of the dense model, with its 95 %
        interval over windows, `plan` the plan's file, `samples` what the model writes after some prompts. A ratio out
        of reach has a `note` in place of a perplexity.

    Raises:
        ConfigError: an unknown method or field, a wrong value, or a directory of another sweep.
        HFPruneError: other bad input, before anything is measured where that can be known.
    """
    start = time.perf_counter()
    cells = _cells(methods, ratios, allocations, repairs, dict(settings or {}))
    content, model = load_text(text), unwrapped(model)
    windows = evaluation_windows(tokenizer, content, window, max_windows, source=text)
    check_windows(model, [{"input_ids": windows}])
    study = _Study(model, tokenizer, infer_structure(model), calibration, batch_size, Path(output_dir), latency)
    asked = _circumstances(model, content, window, calibration, dict(settings or {})) | {"max_windows": max_windows}
    results = _Results(study.folder, asked)
    missing = {key: config for key, config in cells.items() if key not in results.rows}
    for config in missing.values():  # missing text and unknown axes are found now, not after hours
        batches = study.batches(config)
        check_windows(model, batches or ())
        selected_axes(study.structure, config)
        check_model(model, study.structure, config, batches)

    losses_of = partial(window_losses, windows=windows, batch_size=batch_size, progress=False)
    dense = losses_of(model) if missing or _DENSE not in results.rows else None

    def measured(subject: PreTrainedModel) -> Values:
        losses = losses_of(subject) if subject is not model else dense
        assert losses is not None
        assert dense is not None
        value = exp(float(losses.sum()) / (len(losses) * (window - 1)))
        found: Values = {"perplexity": value if math.isfinite(value) else None}
        if subject is not model and math.isfinite(value):
            ratio = mean_of([(losses - dense) / (window - 1)]).mapped(exp)
            found |= {"times_dense": ratio.value, "times_dense_low": ratio.low, "times_dense_high": ratio.high}
        return {
            **found,
            "num_parameters": num_parameters(subject),
            **_speed(subject),
            "samples": samples(subject, tokenizer),
        }

    with tqdm(total=len(missing) + (_DENSE not in results.rows), desc="sweep", unit="row") as bar:
        if _DENSE not in results.rows:
            results.add(_DENSE, {"achieved_ratio": 0.0, "decoder_ratio": 0.0, **measured(model)})
            bar.update()
        for key, config in missing.items():
            bar.set_postfix_str(", ".join(part for part in key[:3] if part))
            began = time.perf_counter()
            if of_main_process(began - start > seconds):
                logger.warning("%d rows were not begun: the time is over", sum(k not in results.rows for k in missing))
                break
            try:
                result = study.prune(config)
            except BudgetError as error:
                logger.warning("%s", error)
                results.add(key, {"perplexity": None, "note": str(error)})
                bar.update()
                continue
            prune_s = time.perf_counter() - began
            achieved = result.plan.achieved
            removed: Values = {"achieved_ratio": achieved[config.budget], "decoder_ratio": achieved["decoder"]}
            plan = f"plans/{len(results.rows)}.json"
            row = {**removed, **measured(result.model), "prune_s": prune_s, "plan": plan}
            results.add(key, row, result.plan)
            bar.update()
    words = ["sweep", base_model_of(model) or "MODEL", str(output_dir)]
    words += ["--methods", ",".join(methods), "--ratios", ",".join(map(str, ratios)), "--text", str(text)]
    words += calibration_words(calibration_names(calibration))
    words += ["--repairs", ",".join(repairs)] if repairs else []
    for allocation in allocations:
        words += ["--allocations", allocation if isinstance(allocation, str) else json.dumps(allocation)]
    words += [*setting_words(settings or {}), "--window", str(window)]
    return results.report([_DENSE, *cells], command_block(words))


def _cells(
    methods: Sequence[str],
    ratios: Sequence[float],
    allocations: Sequence[Any],
    repairs: Sequence[str],
    settings: dict[str, Any],
) -> dict[Key, PruningConfig]:
    """The configuration of every row; all values are checked here."""
    for what, values in (("methods", methods), ("ratios", ratios)):
        if not values:
            raise ConfigError(f"{what}: found none, expected one or more.")
    taken = [name for name in ("method", "pruning_ratio", "allocation", "repair") if name in settings]
    if taken:
        raise ConfigError(f"settings: found {taken}, which a sweep varies: pass methods, ratios, allocations, repairs.")
    known = {field.name for method in methods if method in CONFIGS for field in dataclasses.fields(CONFIGS[method])}
    unknown = sorted(settings.keys() - known)
    cells: dict[Key, PruningConfig] = {}
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"method: found {method!r}, expected one of {list(METHODS)}.")
        own = {field.name for field in dataclasses.fields(CONFIGS[method])}
        common = {name: value for name, value in settings.items() if name in own}
        for allocation in allocations or (None,):
            for repair in repairs or ("",):
                varied = {"allocation": allocation, "repair": repair or None}
                chosen = common | {name: value for name, value in varied.items() if value is not None}
                for ratio in ratios:
                    config = PruningConfig.from_dict({**chosen, "method": method, "pruning_ratio": ratio})
                    name = config.to_dict()["allocation"]
                    shown = name if isinstance(name, str) else json.dumps(name)
                    cells[method, shown, repair, float(ratio)] = config
    if unknown:
        raise ConfigError(f"settings: unknown fields {unknown} for the methods {list(methods)}.")
    return cells


@dataclasses.dataclass
class _Study:
    """What all rows share, each part made when it is first needed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    structure: Structure
    calibration: Calibration | None
    batch_size: int
    folder: Path
    latency: LatencyTable | None
    _batches: dict[Any, Sequence[Batch] | None] = dataclasses.field(default_factory=dict)
    _scores: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)

    def batches(self, config: PruningConfig) -> Sequence[Batch] | None:
        """Calibration batches, as far as this configuration needs any."""
        needed = (config.method, config.allocation_name, getattr(config, "repair", None))
        key = (needed, config.num_samples, config.seq_len, config.seed)
        if key not in self._batches:
            found = calibration_data(config, self.tokenizer, self.calibration, self.batch_size, self.model)
            same = (other for k, other in self._batches.items() if k[1:] == key[1:] and other is not None)
            self._batches[key] = None if found is None else next(same, found)
        return self._batches[key]

    def prune(self, config: PruningConfig) -> PruningResult:
        """One row's model, from scores that are computed once per method (and ratio, where the method looks at it)."""
        if config.budget == "latency" and self.latency is None:
            path = self.folder / "latency.json"
            found = of_main_process(LatencyTable.load(path) if path.exists() else None)
            self.latency = found or of_main_process(measure_latency(self.model, self.structure))
            with main_writes(str(path)) as mine:
                if mine and found is None:
                    self.latency.save(path)
        batches, scores = self.batches(config), self._scores_of(config)
        return prune(self.model, config, calibration=batches, latency=self.latency, scores=scores)

    def _scores_of(self, config: PruningConfig) -> dict[str, Tensor]:
        name = config.method
        if METHODS[name].uses_ratio:
            name += f"-{config.budget}-{config.pruning_ratio:g}"
        if name not in self._scores:
            path = self.folder / "scores" / f"{name}.safetensors"
            found = of_main_process(_load_scores(path, self.structure, config))
            if found is None:
                found = score(self.model, self.structure, config, batches=self.batches(config))
                with main_writes(str(path)) as mine:
                    if mine:
                        write_tensors(path, found)
            self._scores[name] = found
        return self._scores[name]


def _load_scores(path: Path, structure: Structure, config: PruningConfig) -> dict[str, Tensor] | None:
    """Scores of an earlier run; `None` if there are none, or not what this model needs."""
    if not path.exists():
        return None
    try:
        return check_scores(read_tensors(path)[0], structure, config)
    except (CheckpointError, ScoreError) as error:
        logger.warning("%s is computed anew: %s", path, error)
        return None


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if `folder` holds something, but no sweep."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "results.json").exists():
        raise ConfigError(f"{folder} is not empty and holds no sweep; name a new directory.")


class _Results:
    """The rows in `results.json`: read when made, written at each change; of several processes by the main one."""

    def __init__(self, folder: Path, circumstances: dict[str, Any]) -> None:
        self._path = folder / "results.json"
        self._circumstances = circumstances
        self.rows: dict[Key, Values] = {}
        held_by(self, reserved_for_all(folder.absolute()))
        try:
            check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else None
            if (found := of_main_process(found)) is not None:
                self._take(found)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be used: {error}; name another directory.") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"{self._path} is damaged ({error}); delete it to measure anew.") from error

    def _take(self, found: dict[str, Any]) -> None:
        before = found["circumstances"]
        changed = [name for name in self._circumstances if before.get(name) != self._circumstances[name]]
        if changed:
            names = [name.removesuffix("_sha256") for name in changed]  # of a text its name differs, or what is in it
            values = {name: (before.get(name), self._circumstances[name]) for name in changed if name in names}
            was, now = ([pair[i] for pair in values.values()] for i in (0, 1))
            said = f" (found {was}, now {now})" if values else ""
            raise ConfigError(
                f"{self._path} is of another sweep: {', '.join(dict.fromkeys(names))} differ{said}. Name a new "
                "directory, or delete this one."
            )
        for row in found["rows"]:
            method, allocation, repair, ratio = (row[name] for name in _COLUMNS)
            self.rows[method, allocation, repair, float(ratio)] = row

    def add(self, key: Key, row: Values, plan: PruningPlan | None = None) -> None:
        """Keep a row, and write all of them; an interrupted write leaves the older file."""
        self.rows[key] = of_main_process({**dict(zip(_COLUMNS, key, strict=True)), **row})
        text = json.dumps({"circumstances": self._circumstances, "rows": list(self.rows.values())}, indent=1)
        with main_writes(str(self._path)) as mine:
            if mine and plan is not None:
                plan.save(self._path.parent / row["plan"])
            if mine:
                save_text_file(self._path, text + "\n")

    def report(self, keys: Sequence[Key], command: str) -> list[Values]:
        """Write tables and pages of all rows there are, and a picture if one has a point; return those of `keys`."""
        folder, rows = self._path.parent, list(self.rows.values())
        drawable = any(row.get("decoder_ratio") and row["perplexity"] for row in rows)
        with main_writes(str(folder)) as mine:
            if mine:
                whole = [{name: value for name, value in row.items() if name not in _APART} for row in rows]
                save_text_file(folder / "results.md", markdown_table(whole))
            if mine and drawable and find_spec("matplotlib") is not None:
                with replaced_file(folder / "tradeoff.png") as new:
                    tradeoff_picture([{**row, "method": label(row)} for row in rows], new)
            if mine:
                write_page(folder, f"# Sweep: {folder.name}", command)
        return [self.rows[key] for key in keys if key in self.rows]


def write_page(folder: Path, head: str, command: str) -> None:
    """Write `report.html` of the sweep in `folder`: Markdown on top, then trade-off, samples, settings and command."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    samples: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        for prompt, text in row.get("samples", {}).items():
            removed = row["achieved_ratio"]
            samples.setdefault(prompt, {})[label(row) + (f", {removed:.0%}" if removed else "")] = text
    parts = [head, "## What pruning costs and gains", markdown_table(in_short(found["rows"], intervals=True))]
    parts += [f"{label(row)}: {row['note']}" for row in found["rows"] if row.get("note")]
    if (folder / "tradeoff.png").exists():
        parts.append("![What pruning costs and gains](tradeoff.png)")
    parts += ["## What it writes", samples_table(samples)] if samples else []
    parts += ["## How", command, f"```json\n{json.dumps(found['circumstances'], indent=1)}\n```"]
    page = html_page("\n\n".join(parts), head.partition("\n")[0].lstrip("# "), folder)
    save_text_file(folder / REPORT_NAME, page)


def in_short(rows: Sequence[Values], *, intervals: bool = False) -> list[Values]:
    """The columns that people compare by, few enough for a terminal; `results.json` and `results.md` have all."""

    def times(row: Values) -> Any:
        value, low, high = (row.get(f"times_dense{end}") for end in ("", "_low", "_high"))
        return f"{value:.3f} ({low:.3f} to {high:.3f})" if intervals and low is not None else value

    return [
        {
            "method": label(row),
            "achieved_ratio": row.get("achieved_ratio", row["pruning_ratio"]),
            **{name: row.get(name) for name in ("num_parameters", "perplexity")},
            "times_dense": times(row),
            "latency_ms": row.get("latency_ms"),
        }
        for row in rows
    ]


def label(row: Values) -> str:
    """What the rows of one method, allocation and repair are called."""
    return ", ".join(row[name] for name in _COLUMNS[:3] if row[name])


def _speed(model: PreTrainedModel) -> Values:
    """Milliseconds of the usual request."""
    found = measure_speed(model, **usual_request(model))
    prefill_ms, decode_ms = 1000 * found.prefill_s, 1000 * found.decode_s
    return {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "latency_ms": prefill_ms + decode_ms}


def _circumstances(
    model: PreTrainedModel, content: str, window: int, calibration: Calibration | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """What rows must have in common to stand in one table."""
    found = {
        "model": base_model_of(model) or type(model).__name__,
        "num_parameters": num_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "window": window,
        "calibration": calibration if calibration is None or is_text(calibration) else "batches",
        "settings": {name: value for name, value in sorted(settings.items()) if value is not None},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=list))
    return plain
