"""`PruningCallback`: prune during a `Trainer` run, or report what was pruned."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_prune.allocation import hill_exponents
from hf_prune.allocation.planning import allocate
from hf_prune.allocation.steps import Stage, next_plan
from hf_prune.calibration import is_text
from hf_prune.checkpoint.files import CODE_NAME, PLAN_NAME, agrees
from hf_prune.config import PruningConfig
from hf_prune.errors import ConfigError, check_whole_numbers
from hf_prune.gate import check_model, check_windows, unwrapped
from hf_prune.layers.processes import of_main_process
from hf_prune.pipeline import base_model_of, calibration_data, prune
from hf_prune.plan import PruningPlan
from hf_prune.recovery.gradual import Schedule, ZeroedUnits, check_maskable, ratio_at
from hf_prune.recovery.processes import distributed_kind, shards_on_load
from hf_prune.scores import METHODS, score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.in_place import apply_plan_, replace_contents_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

    from hf_prune.structure.axes import Structure

Mode = Literal["start", "gradual", "cut", "report"]
Rows = Sequence[Sequence[Sequence[int]]]
"""Batches as whole numbers: what JSON keeps of them."""

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Prunes the model of a `Trainer` (TRL's too), or reports on a model that is pruned already.

    Modes:
        `start`: slices the model before the optimizer exists; training is that of a small model, and any launcher
            works. A model that was pruned like this already (a checkpoint that is resumed) is left as it is.
        `gradual`: units are masked while training, more at every `every` steps from `begin_step` to `end_step`, and
            sliced at the end: `trainer.model` and `trainer.save_model()` then give the small model. Works on one
            process and under DDP. Checkpoints on the way have the dense shapes, with masked weights zero.
        `cut`: slices model and optimizer state after step `begin_step`. One process only.
        `report`: changes nothing.

    All write `prune/sparsity` (fraction removed of what `budget` names) and `prune/params` into the Trainer's log
    history with every training loss, and `prune/<axis>` (the width of every axis) whenever widths change; call `bind`
    to send them to reporters too. A run that is resumed (`resume_from_checkpoint`) goes on exactly, with or without
    `restore_callback_states_from_checkpoint`.

    Args:
        pruning: what to prune: a configuration, or for `start` and `cut` also a plan. `report` needs none.
        mode: see above.
        calibration: for methods that need data, as for `prune`: batches, or text that the Trainer's
            `processing_class` tokenises.
        batch_size: windows per forward pass while scoring.
        schedule: of `gradual`: `cubic` or `linear`, see `ratio_at`.
        begin_step: of `gradual`: the ratio rises from here, 0 or more; of `cut`: where it happens, 1 or more.
        end_step: of `gradual`: the full ratio is reached here (default: half of all steps).
        every: optimizer steps between two changes of the masks, 1 or more.
        rescore: of `gradual`: compute scores anew at every change, on the current weights; otherwise once.

    Raises:
        ConfigError: a value is out of range, or the mode cannot work in this run (said before training starts).
    """

    def __init__(
        self,
        pruning: PruningConfig | PruningPlan | Mapping[str, Any] | None = None,
        mode: Mode = "start",
        *,
        calibration: str | Sequence[Mapping[str, Any]] | Rows | None = None,
        batch_size: int = 8,
        schedule: Schedule = "cubic",
        begin_step: int = 0,
        end_step: int | None = None,
        every: int = 10,
        rescore: bool = True,
    ) -> None:
        self.pruning = _read(pruning)
        self.mode, self.schedule, self.rescore = mode, schedule, rescore
        self.begin_step, self.end_step, self.every = begin_step, end_step, every
        self.calibration, self.batch_size = _as_batches(calibration), batch_size
        self.progress: dict[str, Any] = {}
        """What a checkpoint keeps: the plan in force, the last scores, for allocation `spectral` the exponents of the
        dense model, and whether it is sliced."""
        self._structure: Structure | None = None
        self._zeroed: ZeroedUnits | None = None
        self._entry: dict[str, float] = {}
        self._check_settings()

    # --- settings and state -------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, get_args(Mode)),
            ("schedule", self.schedule, get_args(Schedule)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}: found {value!r}, expected one of {choices}.")
        check_whole_numbers(every=(self.every, 1), batch_size=(self.batch_size, 1))
        check_whole_numbers(begin_step=(self.begin_step, 1 if self.mode == "cut" else 0))
        if self.end_step is not None:
            check_whole_numbers(end_step=(self.end_step, self.begin_step + 1))
        if self.pruning is None and self.mode != "report":
            raise ConfigError(f"mode {self.mode!r} needs a PruningConfig: say what to prune.")
        if self.mode == "gradual" and not isinstance(self.pruning, PruningConfig):
            raise ConfigError("mode 'gradual' needs a PruningConfig: a plan does not say in which order units go.")

    def state(self) -> dict[str, Any]:
        """JSON for `trainer_state.json`: `Trainer` makes a callback of it again."""
        calibration: Any = self.calibration
        if calibration is not None and not is_text(calibration):
            calibration = [batch["input_ids"].tolist() for batch in calibration]
        arguments = {
            "pruning": None if self.pruning is None else self.pruning.to_dict(),
            "mode": self.mode,
            "calibration": calibration,
            "batch_size": self.batch_size,
            "schedule": self.schedule,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "every": self.every,
            "rescore": self.rescore,
        }
        return {"args": arguments, "attributes": {"progress": self.progress}}

    @property
    def plan(self) -> PruningPlan | None:
        """The plan in force: what is masked or sliced now."""
        return PruningPlan.from_dict(self.progress["plan"]) if self.progress.get("plan") else None

    def bind(self, trainer: Trainer) -> PruningCallback:
        """Put this callback before the reporters (TensorBoard, W&B, ...) of `trainer`, so that they see its numbers."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    # --- events -------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot work; in mode `start`, prune."""
        model = kwargs["model"]
        self._check_run(model, args)
        if self.mode in ("gradual", "cut") and isinstance(self.pruning, PruningConfig):
            structure = infer_structure(model)
            if self.mode == "gradual":
                check_maskable(structure, self.pruning)
            tokenizer = kwargs.get("processing_class")
            batches = calibration_data(self.pruning, tokenizer, self.calibration, self.batch_size, model)
            check_windows(model, batches or ())
            check_model(model, structure, self.pruning, batches)
        if self.mode == "start" and not self._is_done(model):
            self._slice(model, _own_optimizer(kwargs.get("optimizer")), kwargs.get("processing_class"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up where a checkpoint left off, check the schedule, and report."""
        model = kwargs["model"]
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(stored, dict) and not self.progress:
            self.progress = stored["attributes"].get("progress", {})
        if self.mode in ("gradual", "cut") and not self.progress.get("sliced"):
            self._check_run(model, args)
            self._check_schedule(args, state)
        if self.mode == "start" and not self._is_done(model):
            raise ConfigError("the model is not the one pruned at the start: prune inside of `model_init` instead.")
        if self.mode == "gradual" and not self.progress.get("sliced"):
            self._begin_masking(model, args, kwargs.get("processing_class"))
        self._note(model, state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what momentum and weight decay did to masked weights."""
        if self._zeroed is not None:
            self._zeroed.zero_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mask more units, or cut, if it is time."""
        model, tokenizer, step = kwargs["model"], kwargs.get("processing_class"), state.global_step
        if self.mode == "cut" and step == self.begin_step and not self.progress.get("sliced"):
            self._slice(model, _own_optimizer(kwargs.get("optimizer")), tokenizer)
            self._note(model, state)
        if self._structure is None or self.progress.get("sliced"):
            return
        end = self._end(state)
        if self.begin_step < step <= end and ((step - self.begin_step) % self.every == 0 or step == end):
            self._mask(model, self._ratio(step, end), tokenizer)
            self._note(model, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In mode `gradual`, slice what is masked."""
        if self._structure is None or self.progress.get("sliced"):
            return
        model = kwargs["model"]
        assert isinstance(self.pruning, PruningConfig)
        if state.global_step < self._end(state):
            logger.warning(
                "training ended at step %d, before the schedule did at step %d: the rest is pruned untrained",
                state.global_step,
                self._end(state),
            )
            self._mask(model, self.pruning.pruning_ratio, kwargs.get("processing_class"))
        plan = self.plan
        assert plan is not None
        self._release()
        apply_plan_(model, self._structure, plan, optimizer=_own_optimizer(kwargs.get("optimizer")))
        self.progress = {"plan": plan.to_dict(), "sliced": True}
        self._note(model, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the plan and the code of a checkpoint go along with the weights of it that `Trainer` pushes."""
        checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        for name in (PLAN_NAME, CODE_NAME):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, args.output_dir or "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ratio and parameters to the entry just logged, and to what later callbacks see."""
        if logs is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(self._entry)
            state.log_history[-1].update(self._entry)

    # --- work ---------------------------------------------------------------------------------------------------------

    def _check_run(self, model: Any, args: TrainingArguments) -> None:
        if self.mode == "report":
            if _pruning_of(model) is None:
                raise ConfigError("mode 'report' is for a pruned model, found one that is not; choose another mode.")
            return
        launched = distributed_kind(args)
        if self.mode == "start":
            if launched == "DeepSpeed" and shards_on_load():
                raise ConfigError("DeepSpeed ZeRO-3 has split the weights while loading: prune before, with `prune`.")
            return
        unwrapped(model)
        works = {"gradual": (None, "DDP"), "cut": (None,)}[self.mode]
        if launched not in works:
            raise ConfigError(
                f"mode {self.mode!r} cannot work under {launched}: the wrapper keeps the shapes or shards that it "
                "began with. Use mode 'start'" + (", or 'gradual' with DDP." if launched == "DDP" else ".")
            )
        if args.load_best_model_at_end:
            raise ConfigError(
                f"load_best_model_at_end does not go with mode {self.mode!r}: the best checkpoint would be one from "
                "before pruning. Set it to False."
            )

    def _check_schedule(self, args: TrainingArguments, state: TrainerState) -> None:
        last = self._end(state) if self.mode == "gradual" else self.begin_step
        name = "end_step" if self.mode == "gradual" else "begin_step"
        if last > state.max_steps or last <= (self.begin_step if self.mode == "gradual" else 0):
            raise ConfigError(
                f"{name}: found {last}, expected a step after begin_step and up to {state.max_steps}, the last step."
            )

    def _end(self, state: TrainerState) -> int:
        return self.end_step if self.end_step is not None else (self.begin_step + state.max_steps + 1) // 2

    def _ratio(self, step: int, end: int) -> float:
        assert isinstance(self.pruning, PruningConfig)
        return ratio_at(
            step,
            begin_step=self.begin_step,
            end_step=end,
            pruning_ratio=self.pruning.pruning_ratio,
            schedule=self.schedule,
        )

    def _is_done(self, model: Any) -> bool:
        """Whether the model was pruned as asked: a checkpoint that is resumed."""
        if _pruning_of(model) is None:
            return False
        if isinstance(self.pruning, PruningPlan):
            return agrees(self.pruning, model.config)
        assert self.pruning is not None
        return bool(model.config.pruning_config.get("settings") == self.pruning.to_dict())

    def _slice(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, tokenizer: Any) -> None:
        """Prune `model` in place, on every process by the plan of the first."""
        if isinstance(self.pruning, PruningPlan):
            plan = self.pruning
            apply_plan_(model, infer_structure(model), plan, optimizer=optimizer)
        else:
            assert self.pruning is not None
            result = prune(
                model, self.pruning, tokenizer=tokenizer, calibration=self.calibration, batch_size=self.batch_size
            )
            plan = of_main_process(result.plan)
            if plan == result.plan:
                replace_contents_(model, result.model, result.structure, plan, optimizer=optimizer)
            else:  # rounding made another decision here; DDP copies the first process's weights
                apply_plan_(model, result.structure, plan, optimizer=optimizer)
        self.progress = {"plan": plan.to_dict(), "sliced": True}

    def _begin_masking(self, model: PreTrainedModel, args: TrainingArguments, tokenizer: Any) -> None:
        assert isinstance(self.pruning, PruningConfig)
        self._structure = infer_structure(model, cache=self.pruning.budget == "memory")
        check_maskable(self._structure, self.pruning)
        if (plan := self.plan) is not None:
            self._hold(model, plan)
        elif not self.progress:  # nothing is masked yet; that the final ratio can be reached is checked here
            if self.pruning.allocation == "spectral":
                exponents = hill_exponents(model, self._structure)
                self.progress["exponents"] = [exponents[layer] for layer in sorted(exponents)]
            last = self._next(model, self.pruning.pruning_ratio, tokenizer)
            if last is not None and not self.rescore:
                self.progress["scores"] = _as_lists(last.scores)

    def _next(self, model: PreTrainedModel, pruning_ratio: float, tokenizer: Any) -> Stage | None:
        """What is to be masked at this ratio."""
        assert isinstance(self.pruning, PruningConfig)
        assert self._structure is not None
        config, structure, before = self.pruning, self._structure, self.plan
        last = {name: torch.tensor(values) for name, values in self.progress.get("scores", {}).items()}

        def scores_of(done: PruningPlan | None) -> Mapping[str, Tensor]:
            if last and not self.rescore:
                return last
            batches = calibration_data(config, tokenizer, self.calibration, self.batch_size, model)
            return score(model, structure, config, batches=batches)

        planned = partial(
            allocate,
            structure=structure,
            exponents=dict(enumerate(self.progress.get("exponents", []))),
            base_model_name_or_path=base_model_of(model),
        )
        return next_plan(planned, config, scores_of, None if before is None else Stage(before, last), pruning_ratio)

    def _mask(self, model: PreTrainedModel, pruning_ratio: float, tokenizer: Any) -> None:
        before, now = self.plan, self._next(model, pruning_ratio, tokenizer)
        if now is None:
            return
        plan = of_main_process(now.plan)
        self.progress = {**self.progress, "plan": plan.to_dict(), "scores": _as_lists(now.scores)}
        if plan != before:
            self._hold(model, plan)

    def _hold(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        assert self._structure is not None
        self._release()
        self._zeroed = ZeroedUnits(model, self._structure, plan)
        self._zeroed.zero_()

    def _release(self) -> None:
        if self._zeroed is not None:
            self._zeroed.release()
            self._zeroed = None

    def _note(self, model: Any, state: TrainerState) -> None:
        """Write ratio, parameters and widths into the log history."""
        masking = self._structure is not None and not self.progress.get("sliced")
        plan = self.plan if masking else None
        pruning = _pruning_of(model)
        if masking and self._structure is not None:
            assert isinstance(self.pruning, PruningConfig)
            params = self._structure.num_parameters() if plan is None else plan.num_parameters(self._structure)
            achieved = 0.0 if plan is None else plan.achieved[self.pruning.budget]
            widths = {} if plan is None else plan.widths
        elif pruning is not None:
            trainable, total = model.get_nb_trainable_parameters() if hasattr(model, "peft_config") else (0, None)
            params = _num_parameters(model) if total is None else total - trainable
            achieved = pruning["achieved"][pruning["settings"].get("budget", "decoder")]
            widths = pruning["widths"]
        else:  # mode `cut`, before it
            params, achieved, widths = _num_parameters(model), 0.0, {}
        self._entry = {"prune/sparsity": achieved, "prune/params": params}
        of_layers = {f"prune/{name}": width for name, width in widths.items()}
        state.log_history.append({**self._entry, **of_layers, "epoch": state.epoch, "step": state.global_step})


def _read(pruning: PruningConfig | PruningPlan | Mapping[str, Any] | None) -> PruningConfig | PruningPlan | None:
    if isinstance(pruning, Mapping):
        return PruningPlan.from_dict(pruning) if "format" in pruning else PruningConfig.from_dict(pruning)
    if isinstance(pruning, PruningConfig) and pruning.method not in METHODS:
        raise ConfigError(f"method: found {pruning.method!r}, which scores nothing; expected one of {list(METHODS)}.")
    if pruning is not None and not isinstance(pruning, (PruningConfig, PruningPlan)):
        raise ConfigError(f"pruning: found {type(pruning).__name__}, expected a PruningConfig or a PruningPlan.")
    return pruning


def _as_batches(calibration: Any) -> str | list[Mapping[str, Any]] | None:
    """Text or batches as they are; whole numbers, as a checkpoint keeps them, become batches."""
    if calibration is None or is_text(calibration):
        return calibration  # type: ignore[no-any-return]
    batches = list(calibration)
    if batches and not isinstance(batches[0], Mapping):
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in map(torch.tensor, batches)]
    return batches


def _as_lists(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in scores.items()}


def _pruning_of(model: Any) -> dict[str, Any] | None:
    recorded: dict[str, Any] | None = getattr(getattr(model, "config", None), "pruning_config", None)
    return recorded


def _num_parameters(model: Any) -> int:
    """Of the whole model; a part of it under DeepSpeed ZeRO-3 knows the size of the whole."""
    if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return int(model.num_parameters())


def _own_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer itself, not accelerate's wrapper."""
    own: torch.optim.Optimizer | None = getattr(optimizer, "optimizer", optimizer)
    return own
