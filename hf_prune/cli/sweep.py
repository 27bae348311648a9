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
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_prune.atomic import held_by, replaced_file
from hf_prune.calibration import is_text
from hf_prune.checkpoint.files import REPORT_NAME
from hf_prune.config import CONFIGS, PruningConfig, selected_axes
from hf_prune.data import load_text
from hf_prune.errors import BudgetError, CheckpointError, ConfigError, ScoreError
from hf_prune.evaluation.latency import measure_latency
from hf_prune.evaluation.perplexity import perplexity
from hf_prune.evaluation.speed import measure_speed, num_parameters, usual_request
from hf_prune.gate import check_model, check_windows, unwrapped
from hf_prune.latency import LatencyTable
from hf_prune.layers.processes import main_writes, of_main_process, reserved_for_all
from hf_prune.layers.work import read_tensors, write_tensors
from hf_prune.pipeline import base_model_of, calibration_data, prune
from hf_prune.reading import save_text_file
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
    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

Values = dict[str, str | int | float | None]
Key = tuple[str, str, str, float]
"""Method, allocation, repair (empty: the method's own), asked ratio: which row it is."""
_DENSE: Key = ("dense", "", "", 0.0)
_COLUMNS = ("method", "allocation", "repair", "pruning_ratio")


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
    batch_size: int = 8,
    latency: LatencyTable | None = None,
) -> list[Values]:
    """Prune `model` in all combinations, and measure perplexity, size and speed of each. Writes into `output_dir`.

    Of several processes the main one writes, and its measurements count.

    `results.json` holds the rows and what they were measured with, `results.md` the table, `tradeoff.png` the picture
    (with matplotlib), `scores/` the scores, `latency.json` the latency table where the budget is `latency`. A second
    call goes on where an interrupted one stopped. The model is not changed.

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
        batch_size: windows per forward pass.
        latency: table for the budget `latency`; default: measured once.

    Returns:
        The rows, the dense model's first. A ratio out of reach has a `note` in place of a perplexity.

    Raises:
        ConfigError: an unknown method or field, a wrong value, or a directory of another sweep.
        HFPruneError: other bad input, before anything is measured where that can be known.
    """
    cells = _cells(methods, ratios, allocations, repairs, dict(settings or {}))
    content, model = load_text(text), unwrapped(model)
    study = _Study(model, tokenizer, infer_structure(model), calibration, batch_size, Path(output_dir), latency)
    results = _Results(study.folder, _circumstances(model, content, window, calibration, dict(settings or {})))
    missing = {key: config for key, config in cells.items() if key not in results.rows}
    for config in missing.values():  # missing text and unknown axes are found now, not after hours
        batches = study.batches(config)
        check_windows(model, batches or ())
        selected_axes(study.structure, config)
        check_model(model, study.structure, config, batches)

    def measured(subject: PreTrainedModel) -> Values:
        found = perplexity(subject, tokenizer, content, window=window, batch_size=batch_size, progress=False)
        value = found.perplexity if math.isfinite(found.perplexity) else None
        return {"perplexity": value, "num_parameters": num_parameters(subject), **_speed(subject)}

    with tqdm(total=len(missing) + (_DENSE not in results.rows), desc="sweep", unit="row") as bar:
        if _DENSE not in results.rows:
            results.add(_DENSE, {"achieved_ratio": 0.0, "decoder_ratio": 0.0, **measured(model)})
            bar.update()
        for key, config in missing.items():
            bar.set_postfix_str(_label(key))
            start = time.perf_counter()
            try:
                result = study.prune(config)
            except BudgetError as error:
                logger.warning("%s", error)
                results.add(key, {"perplexity": None, "note": str(error)})
                bar.update()
                continue
            prune_s = time.perf_counter() - start
            achieved = result.plan.achieved
            removed: Values = {"achieved_ratio": achieved[config.budget], "decoder_ratio": achieved["decoder"]}
            results.add(key, {**removed, **measured(result.model), "prune_s": prune_s})
            bar.update()
    return results.report([_DENSE, *cells])


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
            raise ConfigError(
                f"{self._path} is of another sweep: {', '.join(changed)} differ (found "
                f"{[before.get(name) for name in changed]}, now {[self._circumstances[name] for name in changed]}). "
                "Name a new directory, or delete this one."
            )
        for row in found["rows"]:
            method, allocation, repair, ratio = (row[name] for name in _COLUMNS)
            self.rows[method, allocation, repair, float(ratio)] = row

    def add(self, key: Key, row: Values) -> None:
        """Keep a row, and write all of them; an interrupted write leaves the older file."""
        self.rows[key] = of_main_process({**dict(zip(_COLUMNS, key, strict=True)), **row})
        text = json.dumps({"circumstances": self._circumstances, "rows": list(self.rows.values())}, indent=1)
        with main_writes(str(self._path)) as mine:
            if mine:
                save_text_file(self._path, text + "\n")

    def report(self, keys: Sequence[Key]) -> list[Values]:
        """Write the table of all rows there are, and a picture if one has a point; return those of `keys`."""
        folder = self._path.parent
        drawable = any(row.get("decoder_ratio") and row["perplexity"] for row in self.rows.values())
        with main_writes(str(folder)) as mine:
            if mine:
                save_text_file(folder / "results.md", markdown_table(list(self.rows.values())))
            if mine and drawable and find_spec("matplotlib") is not None:
                rows = [{**row, "method": _label(key)} for key, row in self.rows.items()]
                with replaced_file(folder / "tradeoff.png") as new:
                    tradeoff_picture(rows, new)
            if mine:
                page = (folder / "results.md").read_text(encoding="utf-8")
                if (folder / "tradeoff.png").exists():
                    page += "\n![What pruning costs and gains](tradeoff.png)\n"
                save_text_file(folder / REPORT_NAME, html_page(page, f"Sweep: {folder.name}", folder))
        return [self.rows[key] for key in keys]


def _label(key: Key) -> str:
    """What the picture calls the rows of one method, allocation and repair."""
    return ", ".join(part for part in key[:3] if part)


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
