"""`hf-prune auto`: a small sweep within a time budget, and from it the one command to run."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.atomic import replaced_file
from hf_prune.calibration import (
    GENERAL,
    asks_model,
    calibration_batches,
    calibration_names,
    parts_of,
    sources_of,
    text_of,
)
from hf_prune.checkpoint.saving import check_apart
from hf_prune.cli.sweep import check_folder, label, sweep, write_page
from hf_prune.config import PruningConfig, axes_of_kind
from hf_prune.config.checks import Range
from hf_prune.data import evaluation_windows, load_text, token_stream
from hf_prune.errors import BudgetError, CalibrationError, ConfigError
from hf_prune.evaluation.speed import time_request, usual_request
from hf_prune.gate import check_config, check_windows, positions_of
from hf_prune.layers.price import count_price
from hf_prune.layers.processes import main_writes
from hf_prune.layers.weights import free_memory
from hf_prune.loading import MEMORY_SHARE, bytes_of, load_config, load_model, load_tokenizer
from hf_prune.memory import fit_ratio
from hf_prune.plan import PruningPlan
from hf_prune.report.card import calibration_words, command_block
from hf_prune.report.pictures import widths_picture
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.cli.sweep import Values
    from hf_prune.config import Budget
    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)

TEXT = Path(__file__).parents[1] / "demo_model" / "evaluation.txt"
"""What is measured on where no text is given: a novel, of which nothing is in the bundled calibration text."""
METHODS = ("llm_pruner", "obs", "magnitude")
"""What is measured, the most worth for its time first; `magnitude` is what the others have to beat."""
WINDOWS, SAMPLES = 48, (128, 64, 32, 16, 8)
"""Windows that are measured on, and numbers of calibration windows to choose from."""
WORTH_RECOVERING, RECOVERED, RECOVERY_TOKENS = 1.05, 0.43, 2_000_000
"""Perplexity over the dense one from which training is advised; which share of its logarithm was left after so many
tokens of the preset `distill`: SmolLM2-135M, 20 to 50 % removed (docs/recovery.md)."""
REPEATS, FEWEST_TOKENS = 4, 100_000
"""Times that a text may be trained on, and tokens below which training is not advised."""
_ENOUGH_CHARS, _SOME_CHARS = 8_000_000, 100_000
"""Characters of a text in which there are tokens enough, and those that are counted."""
_SAFETY = 1.5
"""Estimated seconds are multiplied by it: solving and backward passes are slower than the forward pass they are
measured by."""
_THIN = 0.1
"""A layer that keeps less of an axis than this is named."""


@dataclass(frozen=True)
class Advice:
    """What `advise` recommends."""

    command: tuple[str, ...]
    """The words of the command that does it."""
    row: Values
    """The row of the sweep that it is."""
    plan: PruningPlan
    """Its widths."""
    structure: Structure
    """Of the dense model."""
    recovery_tokens: int
    """To train on afterwards; 0: none."""
    expected: str
    """The loss, in words."""
    unsure: tuple[str, ...]
    """What the measurement does not say."""
    rows: tuple[Values, ...]
    """All that was measured, the dense model first."""


def advise(
    name: str,
    output_dir: str | Path,
    *,
    pruning_ratio: float | None = None,
    fit: str | None = None,
    minutes: float = 10.0,
    text: str | None = None,
    calibration: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Advice:
    """Measure a few methods on a model, and recommend one with its widths and recovery. Prunes nothing for good.

    `output_dir` is that of a sweep, with its `report.html`; an interrupted call goes on, one with more minutes measures
    what is missing. The advised checkpoint would go to `<name>-pruned`.

    Args:
        name: directory or Hub id of a model that fits into memory.
        output_dir: new, or that of an earlier call.
        pruning_ratio: fraction of the decoder to remove; or
        fit: what must fit, as `8GB`, with the key-value cache.
        minutes: above 0; no measurement begins later, one that has begun is finished.
        text: what perplexity is measured on; default: a bundled novel.
        calibration: as for `prune`.
        device: where the model runs; default: the CPU.
        dtype: of the weights; default: the checkpoint's own.
        trust_remote_code: whether code of the checkpoint may run.

    Raises:
        ConfigError: a value out of range, a model that does not fit into memory, or a directory of something else.
        BudgetError: nothing has to go, or the ratio is out of reach for every method.
        HFPruneError: other bad input, before the model is loaded.
    """
    start, folder = time.monotonic(), Path(output_dir)
    if (pruning_ratio is None) == (fit is None):
        raise ConfigError("auto: give either --pruning-ratio, the fraction to remove, or --fit, the size to fit into.")
    if not Range(0, ends="()").holds(minutes):
        raise ConfigError(f"minutes: found {minutes!r}, expected a number above 0.")
    budget: Budget = "decoder" if fit is None else "memory"
    asked = PruningConfig(0.5 if pruning_ratio is None else pruning_ratio, method="random", budget=budget)
    check_apart(folder, model=name, text=text, **sources_of(calibration))
    check_folder(folder)
    config = load_config(name, trust_remote_code=trust_remote_code)
    check_config(config)
    structure = infer_structure(config, cache=fit is not None)
    ratio = asked.pruning_ratio if fit is None else round(fit_ratio(structure, fit, asked), 4)
    needed, free = bytes_of(structure, config, dtype), free_memory(device)
    if needed > MEMORY_SHARE * free:
        raise ConfigError(
            f"auto measures models in memory, several times; this one takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} "
            "are free. Choose by docs/which_method.md, and prune it with --layers-on disk."
        )
    tokenizer = load_tokenizer(name, required=True, trust_remote_code=trust_remote_code)
    assert tokenizer is not None
    length = min([256, *positions_of(config).values()])
    content = load_text(TEXT if text is None else text)
    windows = evaluation_windows(tokenizer, content, length, WINDOWS, source=str(text or "the bundled text"))
    choices = _feasible(tokenizer, calibration, length)
    model = load_model(name, device=device, dtype=dtype, config=config)
    check_windows(model, [{"input_ids": windows}])

    pace = _Pace.of(model, structure, ratio, windows.numel())
    number = _begun(folder) or next((n for n in choices if pace.seconds(n, length) <= 60 * minutes), choices[-1])
    logger.info(
        "about %.1f of at most %g minutes: %d methods, then other allocations and ratios of the best, with %d "
        "calibration windows of %d tokens; interrupted, the same command goes on",
        pace.seconds(number, length) / 60,
        minutes,
        len(METHODS),
        number,
        length,
    )

    def measure(methods: tuple[str, ...], ratios: list[float], **varied: Any) -> list[Values]:
        return sweep(
            model,
            tokenizer,
            folder,
            methods=methods,
            ratios=ratios,
            text=str(TEXT if text is None else text),
            calibration=calibration,
            settings={"num_samples": number, "seq_len": length, "budget": budget},
            window=length,
            max_windows=WINDOWS,
            seconds=60 * minutes - (time.monotonic() - start),
            **varied,
        )

    rows = measure(METHODS, [ratio], repairs=["least_squares"])
    if any(axis.prunable for axis in axes_of_kind(structure, "expert")):
        rows += measure(("reap",), [ratio])[1:]
    best = _best(rows)
    method, repairs = (best["method"],), [best["repair"]] if best["repair"] else []
    if best["method"] != "reap":
        rows += measure(method, [ratio], repairs=repairs, allocations=["global", "uniform"])[1:]
        best = _best(rows)
    others = [round(part * ratio, 4) for part in (0.5, 1.5) if part * ratio < 0.9]
    rows += measure(method, others, repairs=repairs, allocations=[best["allocation"]])[1:]
    rows = list({(label(row), row["pruning_ratio"]): row for row in rows}.values())

    plan = PruningPlan.load(folder / best["plan"])
    tokens = _recovery_tokens(best, tokenizer, calibration)
    words = ["hf-prune", "prune", name, f"{Path(name).name}-pruned", "--method", best["method"]]
    words += ["--pruning-ratio", f"{ratio:g}"] if fit is None else ["--fit", fit]
    words += ["--allocation", best["allocation"], *(["--repair", best["repair"]] if best["repair"] else [])]
    words += ["--num-samples", str(number), "--seq-len", str(length)]
    words += calibration_words(calibration_names(calibration))
    words += [word for flag, value in (("--device", device), ("--dtype", dtype)) if value for word in (flag, value)]
    words += ["--trust-remote-code"] * trust_remote_code + (["--recover", str(tokens)] if tokens else [])
    missing = [method for method in METHODS if not any(row["method"] == method for row in rows)]
    unsure = _unsure(best, rows, plan, missing, number if number < SAMPLES[0] else None, text, calibration)
    expected = _expected(best, tokens, pace)
    advice = Advice(tuple(words), best, plan, structure, tokens, expected, tuple(unsure), tuple(rows))
    with main_writes(f"report in {folder}") as mine:
        if mine:
            _write(advice, folder, name)
    return advice


@dataclass(frozen=True)
class _Pace:
    """How fast this machine is with this model."""

    structure: Structure
    ratio: float
    hidden_size: int
    operations_per_s: float
    row_s: float
    """Seconds to measure one model: perplexity, speed, samples of text."""

    @classmethod
    def of(cls, model: PreTrainedModel, structure: Structure, ratio: float, num_tokens: int) -> _Pace:
        """Timed with the usual request, after one that warms up; perplexity is measured on `num_tokens`."""
        request = usual_request(model)
        times = [time_request(model, request["prompt_len"], request["new_tokens"], 1) for _ in range(2)]
        prefill, (decode,) = times[1]
        operations = 2 * structure.num_parameters(budget="active") * request["prompt_len"]
        embedding: Any = model.get_input_embeddings()
        row_s = num_tokens / request["prompt_len"] * prefill + 6 * (prefill + decode) + 2 * decode
        return cls(structure, ratio, embedding.weight.shape[1], operations / prefill, row_s)

    def seconds(self, num_samples: int, seq_len: int) -> float:
        """Of all measurements, about."""
        total = self.row_s
        for method in METHODS:
            config = PruningConfig(self.ratio, method=method, repair="least_squares", num_samples=num_samples)
            price = count_price(self.structure, config, [seq_len] * num_samples, self.hidden_size, 4)
            computed = price.operations + price.gram_operations + price.solving_operations
            total += self.row_s + _SAFETY * computed / self.operations_per_s
        return total + 3 * (total - self.row_s) / len(METHODS)  # another allocation, two more ratios

    def training_s(self, num_tokens: int) -> float:
        """Of distillation: a forward pass of the dense model, forward and backward passes of the pruned one."""
        dense = self.structure.num_parameters(budget="active")
        return num_tokens * 2 * dense * (1 + 3 * (1 - self.ratio)) / self.operations_per_s


def _feasible(tokenizer: PreTrainedTokenizerBase, calibration: Any, seq_len: int) -> list[int]:
    """Numbers of calibration windows that the text has, the most first."""
    sources = GENERAL if calibration is None else calibration
    if asks_model(sources):
        return list(SAMPLES)
    for first, number in enumerate(SAMPLES):
        try:
            calibration_batches(tokenizer, sources, num_samples=number, seq_len=seq_len, batch_size=8, seed=0)
        except CalibrationError:
            if number == SAMPLES[-1]:
                raise
        else:
            return list(SAMPLES[first:])
    return []


def _begun(folder: Path) -> int | None:
    """Calibration windows of the sweep that is in `folder`, if one is: it goes on with the same."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return int(found["circumstances"]["settings"]["num_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged file is named by the sweep


def _best(rows: list[Values]) -> Values:
    measured = [row for row in rows[1:] if row["perplexity"] is not None]
    if not measured:
        notes = dict.fromkeys(str(row["note"]) for row in rows[1:] if row.get("note"))
        raise BudgetError("; ".join(notes) or "nothing was measured within the time: give more --minutes.")
    return min(measured, key=lambda row: float(row["perplexity"]))


def _recovery_tokens(best: Values, tokenizer: PreTrainedTokenizerBase, calibration: Any) -> int:
    """Tokens to train on: none where little was lost, and of no text more than `REPEATS` times."""
    sources = GENERAL if calibration is None else calibration
    if best["times_dense"] < WORTH_RECOVERING or asks_model(sources):
        return 0
    found = 0.0
    for part in parts_of(sources):
        content = text_of(part.source, tokenizer, max_chars=_ENOUGH_CHARS)
        some = content[:_SOME_CHARS]
        found += len(token_stream(tokenizer, some)) * len(content) / len(some)
    tokens = min(RECOVERY_TOKENS, int(REPEATS * found) // 1000 * 1000)
    return tokens if tokens >= FEWEST_TOKENS else 0


def _expected(best: Values, tokens: int, pace: _Pace) -> str:
    """The loss, before recovery as measured and after it as elsewhere."""
    low, high = best["times_dense_low"], best["times_dense_high"]
    interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
    found = f"{best['times_dense']:.3f}{interval} times the dense perplexity before recovery"
    if not tokens:
        return found
    after = f"; about {best['times_dense'] ** RECOVERED:.2f} after it" if tokens == RECOVERY_TOKENS else ""
    return f"{found}{after}; recovery on {tokens:,} tokens takes about {pace.training_s(tokens) / 3600:.1f} hours here"


def _unsure(
    best: Values,
    rows: list[Values],
    plan: PruningPlan,
    missing: list[str],
    few_samples: int | None,
    text: str | None,
    calibration: Any,
) -> Iterator[str]:
    """What the measurement does not say."""
    where = "a bundled novel" if text is None else str(text)
    yield f"measured on {WINDOWS} windows of {where} at most: other kinds of text lose more or less, tasks too"
    if calibration is None:
        yield "calibrated with the bundled mixture: text like yours (--calibration) is worth more than any method"
    if few_samples is not None:
        yield f"{few_samples} calibration windows had to do: with {SAMPLES[0]} (more --minutes) less is lost"
    if missing:
        yield f"not measured within the time: {', '.join(missing)}"
    alike = [row for row in rows[1:] if row["pruning_ratio"] == best["pruning_ratio"] and label(row) != label(best)]
    for row in alike:
        low, high = row.get("times_dense_low"), best["times_dense_high"]
        if low is not None and high is not None and low <= high:
            yield f"{label(row)} ({row['times_dense']:.3f}) is within the interval: either may be the better"
    faster, slower = (row["latency_ms"] for row in (best, rows[0]))
    if faster > 0.95 * slower:
        yield f"a request took {slower:,.0f} ms before and {faster:,.0f} ms after: smaller, but hardly faster here"
    for axis, total in plan.num_units.items():
        if axis in plan.kept_indices and plan.widths[axis] < _THIN * total:
            yield f"{axis} keeps {plan.widths[axis]:,} of {total:,} units: --min-units sets a least width"
    if best["times_dense"] >= WORTH_RECOVERING:
        yield "what recovery brings is known of one model of 135 M parameters and 2 M tokens (docs/recovery.md)"


def summary(advice: Advice) -> list[tuple[str, str]]:
    """What is advised, as label and text."""
    row = advice.row
    recovery = f"{advice.recovery_tokens:,} tokens" if advice.recovery_tokens else "none advised"
    return [
        ("advised", f"{label(row)}: {100 * row['decoder_ratio']:.1f} % of the decoder goes"),
        ("expected", advice.expected),
        ("recovery", recovery),
        *(("not sure", line) for line in advice.unsure),
    ]


def _write(advice: Advice, folder: Path, name: str) -> None:
    """`report.html` of the sweep, with the advice on top."""
    head = [f"# What to prune of {Path(name).name}"]
    head += [f"- **{what}**: {said}" for what, said in summary(advice)]
    head += ["\nThe command that does it:\n", command_block(advice.command[1:])]
    if find_spec("matplotlib") is not None:
        with replaced_file(folder / "widths.png") as new:
            widths_picture(advice.plan.widths, advice.plan.num_units, new)
        head.append("\n![What each layer keeps](widths.png)")
    write_page(folder, "\n".join(head), "")
