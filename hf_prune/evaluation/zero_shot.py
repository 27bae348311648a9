"""Zero-shot accuracy through lm-eval: its own tasks by name, or questions from files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.evaluation.estimates import Estimate, share_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ZeroShotReport:
    """Accuracy on one task."""

    task: str
    num_questions: int
    accuracy: Estimate
    """Fraction of questions, 0 to 1, whose most likely choice is right; for one-choice tasks (LAMBADA) whose greedy
    continuation is the choice. With its 95 % interval."""
    accuracy_norm: float | None
    """The same with log-likelihoods divided by the choice's bytes; `None` where lm-eval does not give it."""


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[ZeroShotReport]:
    """Accuracy without examples in the prompt and without training, one report per task.

    Args:
        model: a causal LM, dense or pruned.
        tokenizer: the model's own.
        tasks: names of lm-eval tasks, `.jsonl` files, or directories whose `.jsonl` files are all used. A line of a
            file is `{"context": str, "choices": [str, ...], "answer": int}`; with `prefixes` and `continuation` the
            prefixes compete and the continuation is scored (WinoGrande's partial scoring); a single choice is scored as
            LAMBADA is.
        limit: at most so many questions of each task, the first ones.
        batch_size: sequences per forward pass.

    Raises:
        ConfigError: lm-eval is not installed, or no task was given.
        CalibrationError: a file is missing, empty or has other lines.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("zero-shot tasks need lm-eval: pip install 'hf_prune[eval]'.") from error
    chosen = [task for source in tasks for task in _tasks(source)]
    if not chosen:
        raise ConfigError(f"no zero-shot task in {[str(task) for task in tasks]}; name tasks or .jsonl files.")
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=chosen,
        task_manager=TaskManager(include_defaults=any(isinstance(task, str) for task in chosen)),  # else slow to start
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=2,  # any number: the error of a mean is exact
        log_samples=False,
    )
    return [_report(name, values) for name, values in found["results"].items()]


def _tasks(source: str | Path) -> list[str | dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        return [_file_task(file) for file in sorted(path.glob("*.jsonl"))]
    return [_file_task(path)] if path.suffix == ".jsonl" else [str(source)]


def _file_task(path: Path) -> dict[str, Any]:
    """lm-eval's configuration of a file of questions."""
    from datasets import Dataset

    try:
        questions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as JSON lines of questions ({error}).") from error
    for number, question in enumerate(questions, start=1):
        _check(question, f"{path}:{number}")
    if not questions:
        raise CalibrationError(f"{path} holds no question: expected one JSON object per line.")
    task: dict[str, Any] = {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda question: question["context"],
        "doc_to_choice": lambda question: question["choices"],
        "doc_to_target": lambda question: question["answer"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    if "prefixes" in questions[0]:
        task["doc_to_text"] = lambda question: question["answer"]
        task["doc_to_choice"] = lambda question: question["prefixes"]
        task["doc_to_target"] = lambda question: question["continuation"]
        task["metric_list"] = [{"metric": "acc"}]
    elif all(len(question["choices"]) == 1 for question in questions):
        task["output_type"] = "loglikelihood"
        task["doc_to_target"] = lambda question: question["choices"][0].strip()
        task["metric_list"] = [{"metric": "acc"}]
        del task["doc_to_choice"]
    return task


def _check(question: Any, where: str) -> None:
    choices = question.get("choices") if isinstance(question, dict) else None
    answer = question.get("answer") if isinstance(question, dict) else None
    valid = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not valid or type(answer) is not int or not 0 <= answer < len(choices or ()) or "context" not in question:
        raise CalibrationError(
            f'{where}: expected {{"context": str, "choices": [str, ...], "answer": index of the right choice}}.'
        )


def _report(name: str, values: dict[str, Any]) -> ZeroShotReport:
    norm, number = values.get("acc_norm,none"), int(values.get("sample_len", 0))
    accuracy = float(values["acc,none"])
    return ZeroShotReport(
        task=name,
        num_questions=number,
        accuracy=share_of(round(accuracy * number), number) if number else Estimate(accuracy),
        accuracy_norm=None if norm is None else float(norm),
    )
