"""The command line, `hf-prune`: parse, call, print. Flags are the fields of `PruningConfig` in kebab-case."""

from __future__ import annotations

import inspect as inspect_module
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hf_prune.config_flags import config_flags, read_config
from hf_prune.errors import ConfigError, HFPruneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


class _Commands(TyperGroup):
    """Bad input ends in one red line and exit code 2. Any other error is ours and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HFPruneError as error:
            from hf_prune.printing import print_error

            print_error(str(error))
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Structural pruning of Hugging Face causal LMs: smaller ordinary models.",
)

Model = Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, ... Default: cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: the checkpoint's own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def inspect(
    model: Model,
    as_json: AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Load the weights; prove that slicing = masking.")] = False,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="For --verify: float32 or float64.")] = "float32",
) -> None:
    """Show which axes a model has, what can be pruned, and what cannot and why. Needs config.json only."""
    from hf_prune import inspection, printing
    from hf_prune.loading import load_config, load_model

    report = inspection.inspect_config(load_config(model))
    checks = inspection.verify(load_model(model, device=device, dtype=dtype)) if verify else []
    if as_json:
        verified = [{"kind": c.kind, "difference": c.difference, "effect": c.effect, "equal": c.equal} for c in checks]
        _print_json(report.to_dict() | ({"verification": verified} if verify else {}))
    else:
        printing.print_inspection(report)
        if checks:
            printing.print_verification(checks)
    if not all(check.equal for check in checks):
        raise typer.Exit(1)


def _with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` one option for each field of any method's configuration, in place of its `**fields`."""
    own = inspect_module.signature(command, eval_str=True)
    parameters = [parameter for parameter in own.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    positional = [parameter for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
    rest = [parameter for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    command.__signature__ = own.replace(parameters=[*positional, *config_flags(), *rest])  # type: ignore[attr-defined]
    return command


@app.command()
@_with_config_flags
def prune(
    model: Model,
    output: Annotated[Path | None, typer.Argument(help="New directory for the pruned checkpoint.")] = None,
    *,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text, for methods that need it: a .txt, .jsonl, .json or .parquet file, or a Hub dataset "
            "(name:config:split).",
            metavar="FILE|DATASET",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of a PruningConfig; flags override it.")] = None,
    batch_size: Annotated[int, typer.Option(help="Calibration windows per forward pass.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but save: print the plan.")] = False,
    **fields: Any,
) -> None:
    """Prune a model and save it: weights, widths in config.json, plan, tokenizer and model card."""
    chosen = read_config(config, fields)
    if output is None and not dry_run:
        raise ConfigError("no output directory was given: name one after the model, or pass --dry-run.")

    from hf_prune import pipeline, printing
    from hf_prune.checkpoint.files import needs_plugin
    from hf_prune.checkpoint.saving import save_pruned
    from hf_prune.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(model, required=calibration is not None)
    dense = load_model(model, device=device, dtype=dtype)
    start = time.perf_counter()
    result = pipeline.prune(dense, chosen, tokenizer=tokenizer, calibration=calibration, batch_size=batch_size)
    prune_s = time.perf_counter() - start
    if output is not None and not dry_run:
        save_pruned(result.model, output, plan=result.plan, tokenizer=tokenizer)
    printing.print_plan(result.plan, result.structure)
    printing.print_outcome(
        output=None if dry_run else output,
        plugin=needs_plugin(result.model.config),
        prune_s=prune_s,
        save_s=time.perf_counter() - start - prune_s,
    )


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help="Text to measure perplexity on: a file, or a Hub dataset.")],
    window: Annotated[int, typer.Option(help="Tokens of each window, 2 or more; windows do not overlap.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Zero-shot accuracy too: an lm-eval task, a .jsonl file of questions, or a directory of them.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions of each task.")] = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model, dense or pruned: perplexity, parameters, bytes, tokens per second, zero-shot accuracy."""
    from hf_prune import evaluation, printing
    from hf_prune.data import load_text
    from hf_prune.loading import load_model, load_tokenizer

    content = load_text(text)
    tokenizer = load_tokenizer(model, required=True)
    loaded = load_model(model, device=device, dtype=dtype)
    assert tokenizer is not None
    quality = evaluation.perplexity(loaded, tokenizer, content, window=window, batch_size=batch_size)
    speed = evaluation.measure_speed(loaded, **_prompt(loaded))
    values: dict[str, str | int | float] = {
        "perplexity": quality.perplexity,
        "num_tokens": quality.num_tokens,
        "window": window,
        "num_parameters": evaluation.num_parameters(loaded),
        "num_bytes": evaluation.num_bytes(loaded),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "prompt_len": speed.prompt_len,
        "new_tokens": speed.new_tokens,
        "device": speed.device,
        "num_threads": speed.num_threads,
    }
    for report in evaluation.zero_shot(loaded, tokenizer, tasks, limit=limit, batch_size=batch_size) if tasks else ():
        values[f"{report.task} accuracy"] = report.accuracy
        if report.accuracy_norm is not None:
            values[f"{report.task} accuracy_norm"] = report.accuracy_norm
    _print_json(values) if as_json else printing.print_values(values)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the pictures, the table and the pruned model.")] = Path(
        "demo_output"
    ),
) -> None:
    """Prune the bundled model in several ways, compare perplexities, save, reload, generate. Needs no network."""
    from hf_prune.demo import run_demo

    run_demo(output)


def _prompt(model: PreTrainedModel) -> dict[str, int]:
    """A prompt of 256 tokens and 32 new ones, or what the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or 288
    new_tokens = min(32, positions // 2)
    return {"prompt_len": min(256, positions - new_tokens), "new_tokens": new_tokens}


def _print_json(values: dict[str, Any]) -> None:
    from hf_prune.printing import strict_json

    typer.echo(strict_json(values))
