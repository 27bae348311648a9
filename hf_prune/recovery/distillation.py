"""`DistillationTrainer`: train a pruned model to predict what the dense one does."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_prune.checkpoint.save_hook import plan_of, tokens_in_dense
from hf_prune.errors import ConfigError
from hf_prune.layers.losses import divergence, precision, rows_at_once
from hf_prune.loading import load_model
from hf_prune.recovery.teacher import LOG_PROBS, REST, TOKENS, top_k_divergence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss is (1 − alpha)·LM + alpha·T²·KL(teacher ‖ student) + hidden_weight·hidden.

    LM is the model's own loss; KL is taken at temperature T between the next-token distributions at every position
    that has a label (Hinton et al., arXiv 1503.02531). `hidden` is the squared error of the hidden states after each
    layer, relative to the teacher's squares at the same token: 0 where equal, 1 where the student's are zero. Layers
    and channels are those that the plan of the model kept. The evaluation loss is the LM loss alone, so that it stays
    comparable.

    Args:
        *args: as for `Trainer`.
        teacher: the dense model, in memory, or its directory or Hub id (loaded in its own dtype). It is set to
            evaluation mode, asked without gradients, and moved to the device of the run. `None`: the rows are
            `TaughtRows`, which say what it predicts.
        temperature: T, above 0.
        alpha: weight of KL against LM, 0 to 1; 1, as Minitron has it, leaves the text to the teacher.
        hidden_weight: weight of hidden-state matching, 0 or more; 0 leaves it out.
        layer_map: teacher layer for every layer of the student, counted from 0. Default: from the plan.
        trust_remote_code: whether code that comes with the teacher's checkpoint may run, if it is given by name.
        **kwargs: as for `Trainer`.

    Raises:
        ConfigError: a number is out of range, or teacher and student do not fit.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | Path | None,
        temperature: float = 1.0,
        alpha: float = 1.0,
        hidden_weight: float = 0.0,
        layer_map: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value, valid, expected in (
            ("temperature", temperature, temperature > 0, "a number above 0"),
            ("alpha", alpha, 0 <= alpha <= 1, "a number from 0 to 1"),
            ("hidden_weight", hidden_weight, hidden_weight >= 0, "a number from 0"),
        ):
            if not valid or not math.isfinite(value):
                raise ConfigError(f"{name}: found {value!r}, expected {expected}.")
        super().__init__(*args, **kwargs)
        self.temperature, self.alpha, self.hidden_weight = temperature, alpha, hidden_weight
        self.teacher: Any = teacher
        if isinstance(teacher, (str, Path)):
            self.teacher = load_model(str(teacher), trust_remote_code=trust_remote_code)
        self.layer_map: list[int] = []
        self.kept_channels: Tensor | None = None
        self.kept_tokens: Tensor | None = None
        if teacher is None:
            if hidden_weight > 0:
                raise ConfigError("hidden_weight: written predictions hold no hidden states; pass the teacher itself.")
            return
        self.teacher = self.teacher.eval().to(self.args.device)
        self.kept_tokens = tokens_in_dense(self.model, self.teacher)
        if hidden_weight > 0:
            self.layer_map, self.kept_channels = _matching(self.model, self.teacher, layer_map)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the class, normalised as `Trainer` asks: by `num_items_in_batch` where it gives that."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = self.hidden_weight > 0
        asked = {"output_hidden_states": True} if hidden else {}
        written = [inputs.pop(name).flatten(0, 1) for name in (TOKENS, LOG_PROBS, REST) if name in inputs]
        read = {name: value for name, value in inputs.items() if name != "labels"}
        lm_loss: Any = 0.0
        if self.alpha < 1:
            lm_loss, outputs = super().compute_loss(model, {**inputs, **asked}, True, num_items_in_batch)
        else:
            outputs = model(**read, **asked)
        where = inputs["labels"][:, 1:] != -100
        if self.teacher is not None:
            if self.kept_tokens is not None:
                read["input_ids"] = self.kept_tokens.to(read["input_ids"].device)[read["input_ids"]]
            with torch.no_grad():
                taught = self.teacher(**read, **asked, use_cache=False)
            expected = taught.logits.flatten(0, 1)
            written = [expected if self.kept_tokens is None else expected[:, self.kept_tokens.to(expected.device)]]
        loss_of = partial(_kl if self.teacher is not None else top_k_divergence, temperature=self.temperature)
        positions = F.pad(where, (0, 1)).flatten().nonzero().squeeze(-1)
        student = outputs.logits.flatten(0, 1)
        kl = _ByRows.apply(student, positions, loss_of, *written)  # type: ignore[no-untyped-call]
        loss = self.alpha * kl
        if hidden:
            loss = loss + self.hidden_weight * self._hidden_loss(outputs.hidden_states, taught.hidden_states, where)
        # Sums over this micro-batch's tokens become shares of the whole batch, as those of the LM loss are.
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            share = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                share = share * (self.accelerator.num_processes // self.get_tp_size())
        else:
            share = loss / where.sum().clamp_min(1)
        total = (1 - self.alpha) * lm_loss + share
        return (total, outputs) if return_outputs else total

    def _hidden_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], where: Tensor) -> Tensor:
        """Relative squared error summed over tokens with a label, averaged over the matched layers."""
        terms = []
        for layer, of_teacher in enumerate(self.layer_map):
            target = teacher[of_teacher + 1][:, :-1][where].float()
            if self.kept_channels is not None:
                target = target[:, self.kept_channels.to(target.device)]
            found = student[layer + 1][:, :-1][where].float()
            terms.append(((found - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).sum())
        return torch.stack(terms).mean()


class _ByRows(torch.autograd.Function):
    """The sum of a loss over rows of logits, a few at a time, with its gradient: no `[N, V]` in float32, ever."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Tensor, loss_of: Callable[..., Tensor], *taught: Tensor) -> Tensor:  # type: ignore[override]
        """`logits` `[N, V]`; `loss_of` takes rows of them, in float32 at least, and the same rows of `taught`."""
        wide = precision(logits)
        # what is below the least number of float16 would be lost: it has not been scaled yet
        gradient = torch.zeros_like(logits, dtype=wide if logits.dtype == torch.float16 else None)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for rows in torch.split(positions, rows_at_once(logits)):
            with torch.enable_grad():
                own = logits.detach()[rows].to(wide).requires_grad_()
                loss = loss_of(own, *(known[rows.to(known.device)] for known in taught))
            gradient[rows] = torch.autograd.grad(loss, own)[0].to(gradient.dtype)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0]).to(ctx.dtype), None, None, *(None for _ in ctx.needs_input_grad[3:])


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) summed over tokens; logits `[N, V]`."""
    return temperature**2 * divergence(teacher.to(student) / temperature, student / temperature).sum()


def _matching(student: Any, teacher: Any, layer_map: Sequence[int] | None) -> tuple[list[int], Tensor | None]:
    """Teacher layer per student layer, and the hidden channels that the student kept (`None`: all)."""
    base = student.get_base_model() if hasattr(student, "peft_config") else student
    plan = plan_of(base)
    layers, taught = base.config.num_hidden_layers, teacher.config.num_hidden_layers
    if layer_map is None:
        if layers == taught:
            layer_map = range(taught)
        elif plan is not None and layers == taught - len(plan.removed_layers):
            layer_map = [layer for layer in range(taught) if layer not in plan.removed_layers]
        else:
            raise ConfigError(f"the student has {layers} layers, the teacher {taught}: pass a layer_map.")
    if len(layer_map) != layers or not all(type(layer) is int and 0 <= layer < taught for layer in layer_map):
        raise ConfigError(
            f"layer_map: found {list(layer_map)}, expected {layers} teacher layers from 0 to {taught - 1}."
        )
    widths = base.config.hidden_size, teacher.config.hidden_size
    if widths[0] == widths[1]:
        return list(layer_map), None
    kept = plan.kept_indices.get("hidden", ()) if plan is not None else ()
    if len(kept) != widths[0] or kept[-1] >= widths[1]:
        raise ConfigError(
            f"hidden size: found {widths[0]} in the student and {widths[1]} in the teacher, and no plan that says "
            "which channels stayed. Set hidden_weight to 0."
        )
    return list(layer_map), torch.tensor(kept)
