"""Stop a run that has diverged while the last good checkpoint is still good."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_prune.errors import DivergenceError, check_whole_numbers

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class DivergenceGuard(TrainerCallback):  # type: ignore[misc]
    """Raises `DivergenceError` before a gradient that is not finite reaches a weight.

    The Trainer itself goes on: it hides NaN losses from the log and saves NaN weights over good ones. Under fp16 with
    a loss scaler an overflow now and then is normal, and the scaler skips the step; the guard stops a run that
    overflows again and again, whose scale has nothing left to give.

    Args:
        max_overflows: fp16 steps in a row that may overflow, 1 or more.
    """

    def __init__(self, max_overflows: int = 25) -> None:
        check_whole_numbers(max_overflows=(max_overflows, 1))
        self.max_overflows = max_overflows
        self.num_overflows = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all gradients: one pass over them, one number to the host."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self.num_overflows = 0
            return
        self.num_overflows += 1
        scaled = getattr(kwargs.get("optimizer"), "scaler", None) is not None
        if not scaled:
            raise _diverged("the gradient is not finite", args, state.global_step + 1)
        if self.num_overflows > self.max_overflows:
            raise _diverged(f"fp16 overflowed in {self.num_overflows} steps in a row", args, state.global_step + 1)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the evaluation loss, before a checkpoint is saved."""
        for name, value in (metrics or {}).items():
            if name.endswith("loss") and not math.isfinite(value):
                raise _diverged(f"{name} is {value}", args, state.global_step)


def _diverged(what: str, args: TrainingArguments, step: int) -> DivergenceError:
    kept = get_last_checkpoint(args.output_dir) if args.output_dir else None
    where = f"The last good checkpoint is {kept}." if kept else "No checkpoint was saved yet."
    return DivergenceError(
        f"training diverged at step {step}: {what}. {where} Resume from it, or start again, with a lower "
        f"learning_rate (found {args.learning_rate:g}) or more warmup_steps"
        + (", or in bf16 or float32 in place of fp16." if args.fp16 else ".")
    )
