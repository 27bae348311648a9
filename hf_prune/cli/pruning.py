"""What `hf-prune prune` does, step by step: where the result goes, pruning, saving, recovery."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hf_prune.calibration import GENERAL, asks_model, sources_of
from hf_prune.checkpoint.files import load_plan
from hf_prune.checkpoint.saving import check_apart, check_directory, save_pruned
from hf_prune.cli import printing
from hf_prune.errors import ConfigError
from hf_prune.format.building import needs_plugin
from hf_prune.latency import LatencyTable
from hf_prune.layers.processes import reserved_for_all
from hf_prune.loading import load_processor, load_tokenizer
from hf_prune.pipeline import PruningResult, prune
from hf_prune.reading import load_text_file, parse_json
from hf_prune.recovery.arguments import read_tokens
from hf_prune.recovery.recover import recover
from hf_prune.recovery.resuming import checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_prune.config import PruningConfig
    from hf_prune.recovery.recover import RecoveryResult


@dataclass(frozen=True)
class Made:
    """A pruned model, and how long it took."""

    result: PruningResult
    prune_s: float
    save_s: float


def is_pruned(target: Path | None, model: str, chosen: PruningConfig) -> bool:
    """Whether `target` holds what is asked for."""
    plan = load_plan(target) if target is not None and target.is_dir() else None
    return plan is not None and (plan.config, plan.base_model_name_or_path) == (chosen, model)


def check_output(
    target: Path | None,
    model: str,
    chosen: PruningConfig,
    read: Mapping[str, Path | None],
    calibration: list[str] | None,
    vocabulary: list[str] | None,
    overwrite: bool,
) -> None:
    """Refuse an output that is read, as model, text or one of the paths in `read`, or that must not be replaced."""
    texts = sources_of(calibration)
    if target is None:
        return
    found = {name: getattr(chosen, name, None) for name in ("policy", "save_policy", "state_dir")}
    named = {name: Path(value) for name, value in found.items() if value}
    texts |= {f"vocabulary {number}": source for number, source in enumerate(vocabulary or ())}
    check_apart(target, model=model, **texts, **read, **named)
    check_directory(target.absolute(), overwrite=overwrite)


def prune_and_save(
    model: str,
    chosen: PruningConfig,
    target: Path | None,
    calibration: list[str] | None,
    vocabulary: list[str] | None,
    latency_table: Path | None,
    run: dict[str, Any],
) -> Made:
    """Prune, and save into `target` if there is one; `run` are the other arguments of `prune`."""
    trust = {"trust_remote_code": run["trust_remote_code"]}
    table = LatencyTable.load(latency_table) if latency_table is not None else None
    tokenizer = load_tokenizer(model, required=calibration is not None or vocabulary is not None, **trust)
    printing.show_price()
    start = time.perf_counter()
    tokens = _vocabulary(vocabulary)
    with reserved_for_all(target) if target is not None else nullcontext():
        own: dict[str, Any] = {"calibration": calibration, "latency": table, "vocabulary": tokens, "output": target}
        result = prune(model, chosen, tokenizer=tokenizer, **own, **run)
        prune_s = time.perf_counter() - start
        if target is not None and PartialState().is_main_process:  # of several processes: it saves
            reads = load_processor(model, result.model.config, **trust) or result.tokenizer
            save_pruned(result.model, target, plan=result.plan, tokenizer=reads, report=_quality(result))
    return Made(result, prune_s, time.perf_counter() - start - prune_s)


def recovery(
    dense: str,
    output: Path | None,
    calibration: list[str] | None,
    tokens: str,
    device: str | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> Callable[[], RecoveryResult]:
    """What `--recover` does once the pruned model is there; bad input is found now."""
    train, number = calibration or [GENERAL], read_tokens(tokens)
    if output is None:
        raise ConfigError("--recover trains what was saved: leave out --dry-run.")
    if asks_model(train):
        raise ConfigError("--recover trains on the calibration text, found 'self', which is written anew each time.")
    check_apart(output, model=dense, **sources_of(train))
    check_directory(output.absolute(), overwrite=overwrite)

    def then() -> RecoveryResult:
        PartialState().wait_for_everyone()
        begun = bool(checkpoints(output.with_name(f"{output.name}-training")))
        options: dict[str, Any] = {"preset": "distill", "teacher": dense, "tokens": number, "resume": begun}
        options |= {"trust_remote_code": trust_remote_code, **({"use_cpu": True} if device == "cpu" else {})}
        pruned = output.with_name(f"{output.name}-pruned")
        return recover(pruned, output, train=train, overwrite=overwrite, **options)

    return then


def values_of(made: Made, model: str, target: Path | None) -> dict[str, Any]:
    """What `--json` prints."""
    result, plan = made.result, made.result.plan
    return {
        "model": model,
        "output": None if target is None else str(target),
        "config": plan.config.to_dict(),
        "achieved": plan.achieved,
        "num_parameters_before": result.structure.num_parameters(),
        "num_parameters_after": plan.num_parameters(result.structure),
        "num_units": plan.num_units,
        "widths": plan.widths,
        "perplexity_before": result.perplexity_before,
        "perplexity_after": result.perplexity_after,
    }


def print_made(made: Made, target: Path | None) -> None:
    """Ratios, widths, and what came of it."""
    result = made.result
    printing.print_plan(result.plan, result.structure)
    printing.print_outcome(
        output=target,
        plugin=needs_plugin(result.model.config),
        perplexity=(result.perplexity_before, result.perplexity_after),
        prune_s=made.prune_s,
        save_s=made.save_s,
    )


def _quality(result: PruningResult) -> dict[str, Any] | None:
    """What the card says of it."""
    if result.perplexity_before is None:
        return None
    values = {"dense": result.perplexity_before, "pruned": result.perplexity_after}
    return {"perplexity on windows that it was not calibrated with": values}


def _vocabulary(sources: list[str] | None) -> Any:
    """Texts as they are named; the tokens that a single .json file lists."""
    if not sources or len(sources) > 1 or not sources[0].endswith(".json"):
        return sources
    with suppress(ValueError):  # records of text, one a line
        found = parse_json(load_text_file(sources[0], "vocabulary", ConfigError))
        if isinstance(found, list) and all(type(token) is int for token in found):
            return found
    return sources
