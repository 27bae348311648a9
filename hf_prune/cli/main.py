"""The command line, `hf-prune`: parse, call, print. Settings are the fields of the methods' configurations."""

from __future__ import annotations

import dataclasses
import errno
import inspect as inspect_module
import math
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hf_prune.cli.flags import METHOD, RUN, TEXT, UNITS, config_flags, read_asked, read_sweep
from hf_prune.errors import ConfigError, HFPruneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_prune.recovery.recover import RecoveryResult


_GOES_ON = {"auto": "", "prune": "--work-dir", "sweep": "", "recover": "--resume"}
"""Commands that take up what was done when they are given again, with this option."""


class LogFile:
    """A file in place of a terminal: progress bars are lines of it, one in `EVERY_S` seconds and the last."""

    EVERY_S = 30.0

    def __init__(self, file: Any) -> None:
        self._file, self._bar, self._in_bars, self._shown = file, "", False, -math.inf

    def write(self, text: str) -> int:
        """Write text as it is; of bars, which begin with a carriage return or move up again, a line now and then."""
        moves = "\r" in text or "\x1b[A" in text
        if not moves and not (self._in_bars and not text.strip()):  # between bars there are line ends
            self.end()
            self._file.write(text)
            return len(text)
        if line := text.replace("\r", "").replace("\x1b[A", "").strip():
            self._bar, self._in_bars = line, True
            if time.monotonic() - self._shown >= self.EVERY_S:
                self.end()
                self._in_bars, self._shown = True, time.monotonic()
        return len(text)

    def end(self) -> None:
        """Write the last bar, if it was not shown."""
        if self._bar:
            self._file.write(self._bar + "\n")
        self._bar, self._in_bars = "", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Commands(TyperGroup):
    """Bad input and a full disk end in one red line and exit code 2. Any other error is ours and keeps its traceback.

    SIGTERM is taken as Ctrl-C is: what was begun is cleaned up, and one line says how to go on.
    """

    def invoke(self, ctx: Any) -> Any:
        words, before = list(ctx.args), signal.getsignal(signal.SIGTERM)
        stderr = sys.stderr
        if not stderr.isatty():
            sys.stderr = LogFile(stderr)  # type: ignore[assignment]  # what it does not do itself is the file's
        if threading.current_thread() is threading.main_thread() and before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except HFPruneError as error:
            _print_error(str(error))
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _print_error(f"no space is left: {error}. Free disk space, or choose another directory.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            number = int(stop.args[0]) if stop.args else signal.SIGINT
            if not int(os.environ.get("RANK", "0")):
                typer.echo(f"interrupted{_how_to_go_on(str(ctx.invoked_subcommand), words)}.", err=True)
            raise typer.Exit(128 + number) from None
        finally:
            if isinstance(sys.stderr, LogFile):
                sys.stderr.end()
            sys.stderr = stderr
            if signal.getsignal(signal.SIGTERM) is _terminate:
                signal.signal(signal.SIGTERM, before)


def _print_error(message: str) -> None:
    from hf_prune.cli.printing import print_error

    print_error(message)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _how_to_go_on(command: str, words: list[str]) -> str:
    if command not in _GOES_ON:
        return ""
    option = _GOES_ON[command]
    given = not option or any(word.split("=")[0] == option for word in words)
    return ": the same command goes on" if given else f"; runs with {option} go on"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Structural pruning of Hugging Face causal LMs: smaller ordinary models."""
    if version:
        from hf_prune import __version__

        typer.echo(f"hf-prune {__version__}")
        raise typer.Exit


Model = Annotated[str, typer.Argument(help="Directory or Hub id of a language model.", metavar="MODEL")]
Device = Annotated[
    str | None, typer.Option(help="cpu (the default), cuda, cuda:1, ...", metavar="NAME", rich_help_panel=RUN)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, ...; else the checkpoint's.", metavar="NAME", rich_help_panel=RUN),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Files, Hub datasets, general, self.",
        metavar="TEXT[:WEIGHT]",
        rich_help_panel=TEXT,
    ),
]
Table = Annotated[
    Path | None, typer.Option(help="Measured latencies, for that budget.", metavar="FILE", rich_help_panel=RUN)
]
BatchSize = Annotated[
    int, typer.Option(help="Windows in a forward pass.", metavar="N", rich_help_panel=RUN, show_default=False)
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let code of the checkpoint run.", rich_help_panel=RUN),
]
Dequantise = Annotated[
    bool, typer.Option("--dequantise", help="Make plain weights of quantised ones.", rich_help_panel=RUN)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint in the output.", rich_help_panel=RUN)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUN)]


@app.command()
def inspect(
    model: Model,
    as_json: AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Load the weights; prove that slicing = masking.")] = False,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="For --verify: float32 or float64.")] = "float32",
    fit: Annotated[
        str | None, typer.Option(help="What fits into this memory, weights and key-value cache.", metavar="8GB")
    ] = None,
    context: Annotated[int, typer.Option(help="For --fit: tokens in the cache of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="For --fit: sequences at a time.")] = 1,
    bits: Annotated[int, typer.Option(help="For --fit: 4, 8, 16 or 32 bits of each weight.")] = 16,
    trust_remote_code: Trust = False,
) -> None:
    """Show which axes a model has, what can be pruned, and what cannot and why. Needs config.json only."""
    from hf_prune.cli import inspection, printing
    from hf_prune.loading import load_config, load_model

    if fit is not None and verify:
        raise ConfigError("--fit needs no weights and --verify does: ask one question at a time.")
    config = load_config(model, trust_remote_code=trust_remote_code)
    if fit is not None:
        found = inspection.inspect_fit(config, fit, context=context, batch=batch, bits=bits)
        _print_json({"rows": found}) if as_json else printing.print_rows(found)
        return
    report, checks = inspection.inspect_config(config), []
    if verify:
        checks = inspection.verify(load_model(model, device=device, dtype=dtype, config=config))
    if as_json:
        verified = [dataclasses.asdict(check) | {"equal": check.equal} for check in checks]
        _print_json(report.to_dict() | ({"verification": verified} if verify else {}))
    else:
        printing.print_inspection(report)
        if checks:
            printing.print_verification(checks)
    if not all(check.equal or check.refused for check in checks):
        raise typer.Exit(1)


def _with_config_flags(command: Callable[..., None], without: tuple[str, ...] = ()) -> Callable[..., None]:
    """Give `command` one option for each field of any method's configuration, in place of its `**fields`."""
    own = inspect_module.signature(command, eval_str=True)
    parameters = [parameter for parameter in own.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    flags = [flag for flag in config_flags() if flag.name not in without]
    positional = [parameter for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
    rest = [parameter for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    command.__signature__ = own.replace(parameters=[*positional, *flags, *rest])  # type: ignore[attr-defined]
    return command


@app.command()
@_with_config_flags
def prune(
    model: Model,
    output: Annotated[
        Path | None, typer.Argument(help="New directory for the pruned checkpoint.", metavar="OUTPUT")
    ] = None,
    *,
    fit: Annotated[
        str | None,
        typer.Option(help="Instead: what must fit, with the cache.", metavar="8GB", rich_help_panel=UNITS),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="recommended, paper_block, ... of llm_pruner.", metavar="NAME", rich_help_panel=METHOD),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON of settings; flags override it.", metavar="FILE", rich_help_panel=METHOD)
    ] = None,
    calibration: Calibration = None,
    latency_table: Table = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(help="Text: the only tokens that stay.", metavar="TEXT", rich_help_panel=UNITS),
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(help="Share of them that stays.", metavar="0-1", rich_help_panel=UNITS, show_default=False),
    ] = 1.0,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = None,
    layers_on: Annotated[
        str,
        typer.Option(
            help="Where layers are: memory, disk, auto.", metavar="NAME", rich_help_panel=RUN, show_default=False
        ),
    ] = "auto",
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Keeps results: a killed run goes on.", metavar="DIRECTORY", rich_help_panel=RUN),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(help="Then train so long, towards MODEL.", metavar="TOKENS", rich_help_panel=RUN),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, save nothing.", rich_help_panel=RUN)
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    dequantise: Dequantise = False,
    **fields: Any,
) -> None:
    """Prune a model and save it: weights, widths, plan, tokenizer, card.

    `hf-prune prune my-model smaller --method obs --pruning-ratio 0.3`
    """
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dequantise": dequantise}
    chosen = read_asked(model, fields, config=config, preset=preset, fit=fit, vocabulary=vocabulary, where=where)
    if output is None and not dry_run:
        raise ConfigError("no output directory was given: name one after the model, or pass --dry-run.")

    from hf_prune.cli import pruning

    target = None if dry_run else output
    then = None
    if recover is not None:
        then = pruning.recovery(model, target, calibration, recover, device, overwrite, trust_remote_code)
        assert target is not None
        target = target.with_name(f"{target.name}-pruned")
    if then is None or not pruning.is_pruned(target, model, chosen):  # else a run was interrupted while it trained
        read = {"config": config, "latency_table": latency_table, "work_dir": work_dir}
        pruning.check_output(target, model, chosen, read, calibration, vocabulary, overwrite)
        run = {"batch_size": batch_size, "coverage": coverage, "layers_on": layers_on, "work_dir": work_dir}
        run |= {"device": device, "dtype": dtype, **where}
        made = pruning.prune_and_save(model, chosen, target, calibration, vocabulary, latency_table, run)
        if as_json and then is None:
            _print_once(pruning.values_of(made, model, target))
        elif not as_json:
            _print_once(partial(pruning.print_made, made, target))
    if then is not None and output is not None:
        _print_recovered(then(), output, as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show all settings of this one.", metavar="[NAME]")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the methods, or the settings of one: meaning, default, what is allowed."""
    from hf_prune.cli import printing
    from hf_prune.cli.flags import describe_methods, describe_settings

    rows = describe_methods() if name is None else describe_settings(name)
    _print_json({"rows": rows}) if as_json else printing.print_texts(rows)


@app.command()
@partial(_with_config_flags, without=("method", "pruning_ratio", "allocation", "repair"))
def sweep(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Directory for the table, the picture and the scores.")],
    *,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")],
    ratios: Annotated[str, typer.Option(help="Fractions to remove, separated by commas.")],
    text: Annotated[str, typer.Option(help="Text to measure perplexity on: a file, or a Hub dataset.")],
    calibration: Calibration = None,
    allocations: Annotated[
        list[str] | None,
        typer.Option(
            help="Allocations, separated by commas; or a JSON object of weights, or a .json file (repeatable)."
        ),
    ] = None,
    repairs: Annotated[str, typer.Option(help="Values of repair, separated by commas.")] = "",
    window: Annotated[int, typer.Option(help="Tokens of each window of the text, 2 or more.")] = 256,
    batch_size: BatchSize = 8,
    latency_table: Table = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    **fields: Any,
) -> None:
    """Compare methods, allocations and ratios: one table, one picture. Run again to go on where it stopped."""
    from hf_prune.calibration import parts_of
    from hf_prune.checkpoint.saving import check_apart
    from hf_prune.cli import printing
    from hf_prune.cli.sweep import check_folder
    from hf_prune.cli.sweep import sweep as run_sweep
    from hf_prune.data import check_source
    from hf_prune.gate import check_config
    from hf_prune.latency import LatencyTable
    from hf_prune.loading import load_config, load_model, load_tokenizer

    chosen = read_sweep(methods, ratios, allocations or [], repairs, fields)
    check_apart(output, model=model)
    check_folder(output)
    table = LatencyTable.load(latency_table) if latency_table is not None else None
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, required=True, **where)
    assert tokenizer is not None
    described = load_config(model, trust_remote_code=trust_remote_code)
    check_config(described)
    check_source(text)
    if calibration:
        parts_of(calibration)
    dense = load_model(model, device=device, dtype=dtype, config=described)
    rows = run_sweep(
        dense,
        tokenizer,
        output,
        **chosen,
        text=text,
        calibration=calibration[0] if calibration and len(calibration) == 1 else calibration,
        window=window,
        batch_size=batch_size,
        latency=table,
    )
    _print_once({"rows": rows} if as_json else partial(printing.print_sweep, rows, output))


@app.command()
def auto(
    model: Model,
    output: Annotated[
        Path | None, typer.Argument(help="Directory for the report. Default: MODEL's name and -auto.", metavar="OUTPUT")
    ] = None,
    *,
    pruning_ratio: Annotated[
        float | None, typer.Option(help="Fraction of the decoder to remove.", metavar="FRACTION")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="Or what must fit, with the cache.", metavar="8GB")] = None,
    minutes: Annotated[float, typer.Option(help="Time that measuring may take.")] = 10.0,
    text: Annotated[
        str | None, typer.Option(help="Text to measure perplexity on. Default: a novel.", metavar="FILE|DATASET")
    ] = None,
    calibration: Calibration = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a few methods for some minutes, and print the one command to run, with what it will cost.

    `hf-prune auto my-model --pruning-ratio 0.3 --calibration my-text.txt`
    """
    from hf_prune.cli import printing
    from hf_prune.cli.auto import advise

    folder = output or Path(f"{Path(model).name}-auto")
    printing.show_price()
    where: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    asked: dict[str, Any] = {"pruning_ratio": pruning_ratio, "fit": fit, "minutes": minutes, "text": text}
    advice = advise(model, folder, **asked, calibration=calibration, **where)
    values = {name: value for name, value in vars(advice).items() if name not in ("plan", "structure")}
    values |= {"num_units": advice.plan.num_units, "widths": advice.plan.widths}
    _print_once(values if as_json else partial(printing.print_advice, advice, folder))


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        list[str],
        typer.Option(help="Text to measure perplexity on (repeatable).", metavar="FILE|DATASET"),
    ],
    dense: Annotated[
        str | None,
        typer.Option(help="Compare with this dense model; 'base': the one that the checkpoint was pruned from."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of each window, 2 or more; windows do not overlap.")] = 256,
    max_windows: Annotated[int | None, typer.Option(help="Of each text, evenly spaced. Default: all.")] = None,
    batch_size: BatchSize = 8,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Zero-shot accuracy too: an lm-eval task, a .jsonl file of questions, or a directory of them.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions of each task.")] = None,
    generate: Annotated[
        int | None, typer.Option(help="Answer so many prompts (32 or more): loops, length, ends, agreement with dense.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="For --generate: a .jsonl file with a prompt in each line. Default: bundled.")
    ] = None,
    assists: Annotated[
        str | None, typer.Option(help="Measure it as the draft of this dense model: speculative decoding.")
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model, dense or pruned: perplexity on texts, size, speed, zero-shot accuracy, what it writes."""
    from hf_prune import evaluation
    from hf_prune.calibration import text_of
    from hf_prune.cli import printing
    from hf_prune.format.building import build_empty
    from hf_prune.gate import check_windows
    from hf_prune.loading import dense_source, load_config, load_model, load_tokenizer

    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer, config = load_tokenizer(model, required=True, **trust), load_config(model, **trust)
    assert tokenizer is not None
    texts = evaluation.read_texts(tokenizer, text, window, max_windows)
    check_windows(build_empty(config), [{"input_ids": ids} for ids in texts.values()])
    questions = evaluation.read_prompts(generate, prompts) if generate is not None else []
    names = {"model": model, "dense": None if dense is None else dense_source(dense, config)}
    loaded = load_model(model, device=device, dtype=dtype, config=config)
    other = None
    if names["dense"] is not None:
        other = load_model(names["dense"], device=device, dtype=dtype, **trust)
    quality = evaluation.evaluate(loaded, tokenizer, texts, dense=other, batch_size=batch_size)
    speed = evaluation.measure_speed(loaded, **evaluation.usual_request(loaded))
    values: dict[str, Any] = {
        **names,
        "window": window,
        **evaluation.flat(quality),
        "num_tokens": sum(row.num_tokens for row in quality.texts),
        "num_parameters": evaluation.num_parameters(loaded),
        "num_bytes": evaluation.num_bytes(loaded),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "prompt_len": speed.prompt_len,
        "new_tokens": speed.new_tokens,
        "device": speed.device,
        "num_threads": speed.num_threads,
    }
    if tasks:
        values["tasks"] = _tasks(loaded, other, tokenizer, tasks, limit, batch_size)
    if questions:
        written = evaluation.check_generation(loaded, tokenizer, questions, dense=other, batch_size=batch_size)
        values["generation"] = evaluation.flat(written)
    if assists is not None:
        draft_of = load_model(assists, device=device, dtype=dtype, **trust)
        values |= _assisted(draft_of, loaded, tokenizer, text_of(text[0], tokenizer))
    _print_json(values) if as_json else printing.print_evaluation(values)


@app.command()
def quantise(
    checkpoint: Annotated[str, typer.Argument(help="Directory or Hub id of a pruned model.")],
    output: Annotated[Path, typer.Argument(help="New directory for the quantised checkpoint.")],
    scheme: Annotated[str, typer.Option(help="int8, fp8 or int4 (torchao), or nf4 (bitsandbytes).")] = "int8",
    text: Annotated[
        str | None,
        typer.Option(help="Measure perplexity on it: dense, pruned, both quantised.", metavar="FILE|DATASET"),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of each window of the text, 2 or more.")] = 256,
    batch_size: BatchSize = 8,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Quantise a pruned checkpoint: weights of 8 or 4 bits that `from_pretrained` loads."""
    from hf_prune.cli import printing
    from hf_prune.exporting.quantising import quantise as run

    options: dict[str, Any] = {"window": window, "batch_size": batch_size, "device": device, "overwrite": overwrite}
    options["trust_remote_code"] = trust_remote_code
    rows = run(checkpoint, output, scheme, text=text, **options)
    _print_json({"rows": rows}) if as_json else printing.print_rows(rows, output)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def recover(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a pruned model.")],
    output: Annotated[Path, typer.Argument(help="Directory for the recovered model; checkpoints go beside it.")],
    train: Annotated[
        list[str],
        typer.Option(
            help="Text to train on; of several, each with its weight, a mixture.", metavar="FILE|DATASET[:WEIGHT]"
        ),
    ],
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            "--eval", "--text", help="Text to choose the best checkpoint by.", metavar="FILE|DATASET[:WEIGHT]"
        ),
    ] = None,
    other: Annotated[
        str,
        typer.Option(help="Text of another kind, to warn if the model gets worse on it, or 'none'.", metavar="FILE"),
    ] = "general",
    preset: Annotated[
        str,
        typer.Option(
            help="lora: adapters, merged at the end; norms: norms and biases; full: all weights; distill: all weights, "
            "towards the dense model."
        ),
    ] = "lora",
    teacher: Annotated[
        str | None,
        typer.Option(help="Dense model to distil from; 'base': the one it was pruned from, as preset distill takes."),
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(help="Directory to write the teacher's predictions to before training: it is not loaded then."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the distributions that are compared, above 0.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Weight of the teacher against the text, 0 to 1.")] = 1.0,
    hidden_weight: Annotated[float, typer.Option(help="Weight of hidden-state matching, 0 or more.")] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: 300.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to train on, in place of --steps: 500k, 2M, ...", metavar="N")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    assistant_only_loss: Annotated[
        bool, typer.Option("--assistant-only-loss", help="Of chats only what the assistant says is learnt.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last whole checkpoint.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train a pruned model and save it: adapters (the default), norms or all weights, with or without a teacher.

    After the two directories, every option of transformers' TrainingArguments may be given too, as in
    `--learning-rate 1e-4 --bf16 --per-device-train-batch-size 4`. Several GPUs, FSDP and DeepSpeed: start it by
    `accelerate launch --no_python hf-prune recover ...`.
    """
    from hf_prune.cli import printing
    from hf_prune.recovery.arguments import parse_training_options, read_tokens
    from hf_prune.recovery.recover import recover as run

    if model.startswith("-") or str(output).startswith("-"):
        raise ConfigError("the pruned model and the output directory come first, before any option.")
    options = parse_training_options(context.args)
    printing.show_price()
    result = run(
        model,
        output,
        train=train,
        eval=eval_text or None,
        other=None if other == "none" else other,
        preset=preset,
        teacher=teacher,
        teacher_cache=teacher_cache,
        temperature=temperature,
        alpha=alpha,
        hidden_weight=hidden_weight,
        steps=steps,
        tokens=None if tokens is None else read_tokens(tokens),
        seq_len=seq_len,
        assistant_only_loss=assistant_only_loss,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        **options,
    )
    _print_recovered(result, output)


@app.command()
def export(
    checkpoint: Model,
    output: Annotated[Path, typer.Argument(help="New file (gguf) or directory.")],
    format: Annotated[
        str, typer.Option(help="plain: stock transformers, all layers alike; gguf: llama.cpp; onnx.", metavar="FORMAT")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="gguf: f32, f16, bf16, q8_0 or q4_0; else as torch has it. Default: the checkpoint's own."),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            help="gguf: MLP widths become a multiple of this by zeros; 256 for K-quants. Default: as dtype needs."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a pruned or dense checkpoint in a format that other engines read."""
    from hf_prune.cli import printing
    from hf_prune.exporting import export as run

    options: dict[str, Any] = {"dtype": dtype, "round_to": round_to, "trust_remote_code": trust_remote_code}
    written = run(checkpoint, output, format=format, overwrite=overwrite, **options)
    values = {name: value for name, value in vars(written).items() if name != "notes"} | {"path": str(written.path)}
    if as_json:
        _print_json({**values, "notes": written.notes})
    else:
        notes = {f"note {i}": note for i, note in enumerate(written.notes, 1)}
        printing.print_values({**values, **notes})


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the pictures, the table and the pruned model.")] = Path(
        "demo_output"
    ),
) -> None:
    """Prune the bundled model in several ways, compare perplexities, save, reload, generate. Needs no network."""
    from hf_prune.cli.demo import run_demo

    run_demo(output)


def _tasks(
    model: Any, dense: Any, tokenizer: Any, tasks: list[str], limit: int | None, batch_size: int
) -> list[dict[str, Any]]:
    """A row for each task, with the dense model's accuracy if there is one."""
    from hf_prune import evaluation

    found = evaluation.zero_shot(model, tokenizer, tasks, limit=limit, batch_size=batch_size)
    rows = [evaluation.flat(task) for task in found]
    if dense is not None:
        known = evaluation.zero_shot(dense, tokenizer, tasks, limit=limit, batch_size=batch_size)
        for row, task in zip(rows, known, strict=True):
            row["dense_accuracy"] = task.accuracy.value
    return rows


def _assisted(dense: Any, draft: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """Decoding of a dense model with this one as its draft."""
    from hf_prune.evaluation import usual_request
    from hf_prune.evaluation.assisting import measure_assisted

    request = usual_request(draft)
    lengths = {"prompt_len": max(2, min(64, request["prompt_len"])), "new_tokens": min(64, 2 * request["new_tokens"])}
    found = measure_assisted(dense, draft, tokenizer, text, **lengths)
    return {f"draft {name}": value for name, value in dataclasses.asdict(found).items()}


def _print_once(content: dict[str, Any] | Callable[[], None]) -> None:
    """Of several processes the first one prints."""
    if int(os.environ.get("RANK", "0")):
        return
    content() if callable(content) else _print_json(content)


def _print_recovered(result: RecoveryResult, output: Path, as_json: bool = False) -> None:
    from hf_prune.cli import printing

    names = ("perplexity_before", "perplexity_after", "other_before", "other_after")
    measured = {name: value for name in names if (value := getattr(result, name)) is not None}
    values = {"num_parameters": result.model.num_parameters(), **measured, "output": str(output)}
    _print_once(values if as_json else partial(printing.print_values, values))


def _print_json(values: dict[str, Any]) -> None:
    from hf_prune.cli.printing import strict_json

    typer.echo(strict_json(values))
