"""Learning a policy: sample masks, measure their losses, step, project; widths first, then units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError, ConfigError, ScoreError
from hf_prune.layers.weights import input_device
from hf_prune.scores.policy_gradient import estimators
from hf_prune.scores.policy_gradient.forward import MaskedModel, open_model
from hf_prune.scores.policy_gradient.policy import (
    SCORE_SOFTNESS,
    UnitSpace,
    fill,
    find_units,
    initial_widths,
    lowest_widths,
    paper_profile,
    project_widths,
    soft_profile,
)
from hf_prune.scores.policy_gradient.state import LearningState, StateFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_prune.config import PolicyGradientConfig
    from hf_prune.layers.walk import Walk
    from hf_prune.structure.axes import Structure

LOG_STEPS = 10
"""Steps between two looks at the values on the device."""
MOMENTUM, SCALE_MEMORY = 0.9, 0.99


@dataclass(frozen=True)
class LearnedPolicy:
    """What learning gives."""

    units: UnitSpace
    keep_probs: Tensor
    """float32 `[N]`, on the device of the model's input."""
    initial: Tensor
    """The same before learning."""
    history: list[dict[str, float | int | str]]
    """Per step: `phase`, `loss` (mean over the masks, nats per token), `kept` (expected fraction of the budget's
    total), `entropy` (mean bits per unit that may go), `token_forwards` so far."""


def learn_policy(
    walk: Walk,
    structure: Structure,
    config: PolicyGradientConfig,
    initial_scores: Mapping[str, Tensor],
    generator: torch.Generator,
) -> LearnedPolicy:
    """Learn keep-probabilities that minimise the expected loss of sampled masks under the budget.

    Args:
        walk: a model and windows of equal length, drawn in a new random order each time all were used. Works with
            `device_map`, in any floating dtype, from disk (the model is read once per step), and with several processes
            (`accelerate launch`): all draw the same masks and share the windows.
        structure: its structure.
        config: settings; `config.state_dir` makes it resumable.
        initial_scores: per axis, higher = keep: the order of the units, and where probabilities start.
        generator: one number is drawn from it, which seeds everything random here.

    Raises:
        BudgetError: the ratio is out of reach.
        ConfigError: a budget of latency, memory or active parameters.
        CalibrationError: no batches, windows of different lengths, or fewer windows than a step takes.
        ScoreError: a loss is not finite.
        StructureError: units of an axis cannot be masked row by row.
        CheckpointError: `state_dir` holds a damaged state, or that of another run.
    """
    if config.budget in ("latency", "memory", "active"):
        raise ConfigError(
            f"budget: found {config.budget!r}, expected decoder, model or units: learning counts parameters."
        )
    windows = all_windows(walk, config)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    units = find_units(structure, config, input_device(walk.model))
    with open_model(
        walk,
        structure,
        units,
        reward=config.reward,
        forward_rows=config.forward_rows,
        sliced_forward=config.sliced_forward,
    ) as masked:
        learning = _Learning(masked, units, config, windows, initial_scores, seed)
        learning.run()
        return learning.result()


def all_windows(walk: Walk, config: PolicyGradientConfig) -> Tensor:
    """All windows of the batches, int64 `[W, T]`."""
    found = walk.all_ids
    if walk.has_images:
        raise CalibrationError(
            "policy gradient draws windows and masks anew in each step, and found samples with images, which cannot be "
            "drawn: calibrate with text, or take another method."
        )
    lengths = sorted({ids.shape[1] for ids in found})
    if len(lengths) > 1 or lengths[0] < 2:
        raise CalibrationError(f"found windows of {lengths} tokens, expected one length of 2 or more in all batches.")
    windows = torch.cat(found)
    if len(windows) < config.windows_per_step:
        raise CalibrationError(
            f"found {len(windows)} calibration windows, but a step takes windows_per_step={config.windows_per_step}: "
            "give more text, or take fewer."
        )
    return windows


class _Learning:
    """The loop, its constants, and the state after the last whole step."""

    def __init__(
        self,
        model: MaskedModel,
        units: UnitSpace,
        config: PolicyGradientConfig,
        windows: Tensor,
        scores: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        self.model, self.units, self.config, self.windows, self.seed = model, units, config, windows, seed
        self.device = units.costs.device
        self.ranks, self.scores = units.ranks(scores), scores
        self.low = lowest_widths(units, config)
        self.width_steps = {
            "units": 0,
            "widths": config.policy_steps,
            "widths_then_units": round(config.widths_fraction * config.policy_steps),
        }[config.policy]
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.start_widths = initial_widths(units, scores, config)
        self.file = StateFile(config, windows, units.join(scores), seed)
        self.state = self.file.load(self.device) or self.first_state()
        self.generator.set_state(self.state.generator_state)

    def first_state(self) -> LearningState:
        """Before the first step."""
        return LearningState(
            step=0,
            widths=self.start_widths,
            keep_probs=self.unit_start(self.start_widths),
            momentum=torch.zeros_like(self.start_widths),
            scale=torch.zeros((), device=self.device),
            baseline=torch.zeros(0, device=self.device),
            history=torch.zeros(0, 3, device=self.device),
            generator_state=self.generator.get_state(),
        )

    def unit_start(self, widths: Tensor) -> Tensor:
        """Keep-probabilities where learning by units starts."""
        config, units = self.config, self.units
        if config.policy == "units":
            found = paper_profile(units, widths, self.scores, config.clamp)
        else:
            found = soft_profile(units, widths, self.ranks, config.softness)
        return units.project(found, torch.ones_like(found), config.clamp)

    def run(self) -> None:
        """All steps that are left. The state is written every `state_steps` and when the run is interrupted."""
        total = self.config.policy_steps
        with tqdm(total=total, initial=self.state.step, desc="policy gradient", unit="step", leave=False) as bar:
            try:
                while self.state.step < total:
                    self.state = self.one_step(self.state)
                    step = self.state.step
                    bar.update()
                    if step % LOG_STEPS == 0 or step == total:
                        self.report(bar)
                    if step % self.config.state_steps == 0 or step == total:
                        self.file.save(self.state)
            except KeyboardInterrupt:
                self.file.save(self.state)
                raise

    def report(self, bar: tqdm[Any]) -> None:
        """Look at the latest values: the one place where the host waits for the device."""
        loss, kept, entropy = self.state.history[-LOG_STEPS:].mean(0).tolist()
        if not math.isfinite(loss):
            raise ScoreError(
                f"the loss of sampled masks is {loss}, expected a finite number. "
                "Learn in bfloat16 or float32, and check that the dense model works."
            )
        bar.set_postfix(loss=f"{loss:.4f}", kept=f"{kept:.3f}", entropy=f"{entropy:.3f}", refresh=False)

    def one_step(self, state: LearningState) -> LearningState:
        """The state after one more step; tensors of the old state are not changed."""
        windows = self.next_windows(state.step)
        if state.step < self.width_steps:
            state, loss = self.widths_step(state, windows)
            probs = fill(self.units, state.widths, self.ranks)
            if state.step + 1 == self.width_steps < self.config.policy_steps:
                state = replace(
                    state, keep_probs=self.unit_start(state.widths), scale=torch.zeros((), device=self.device)
                )
        else:
            state, loss = self.units_step(state, windows)
            probs = state.keep_probs
        row = torch.stack([loss, self.units.kept(probs) / self.units.total, self.entropy(probs)])
        return replace(
            state,
            step=state.step + 1,
            history=torch.cat([state.history, row[None]]),
            generator_state=self.generator.get_state(),
        )

    def widths_step(self, state: LearningState, windows: Tensor) -> tuple[LearningState, Tensor]:
        """Compare widths a little off the present ones in opposite directions, all within the budget."""
        config, units = self.config, self.units
        pairs = (len(windows) // config.windows_per_mask, config.num_masks // 2, len(units.sizes))
        signs = torch.randint(2, pairs, generator=self.generator, device=self.device) * 2.0 - 1
        fraction = torch.rand(pairs, generator=self.generator, device=self.device)[..., units.axis_ids]
        moves = config.widths_noise * signs
        both = torch.stack([state.widths + moves, state.widths - moves], 2)
        both = project_widths(units, both, self.low, self.ranks)
        masks = fill(units, both, self.ranks, fraction[:, :, None]) > 0
        losses = self.model.losses(windows, masks.flatten(1, 2), config.windows_per_mask)
        gradient = estimators.by_widths(losses, both.flatten(1, 2), config.widths_noise)
        # per parameter: at the optimum of the budget this is the same for all axes
        costs = torch.zeros_like(units.sizes).index_add_(0, units.axis_ids, units.parameters)
        gradient = gradient * (costs.mean() / costs)
        momentum = MOMENTUM * state.momentum + (1 - MOMENTUM) * gradient
        scale = SCALE_MEMORY * state.scale + (1 - SCALE_MEMORY) * gradient.square().mean()
        step = state.step + 1
        corrected = momentum / (1 - MOMENTUM**step) / (scale / (1 - SCALE_MEMORY**step)).sqrt().clamp_min(1e-20)
        rate = config.widths_learning_rate * _cosine(state.step, self.width_steps)
        widths = project_widths(units, state.widths - rate * corrected, self.low, self.ranks)
        return replace(state, widths=widths, momentum=momentum, scale=scale), losses.mean()

    def units_step(self, state: LearningState, windows: Tensor) -> tuple[LearningState, Tensor]:
        """One step of the keep-probabilities along the estimated gradient, onto the budget again."""
        config, units, s = self.config, self.units, state.keep_probs
        groups = len(windows) // config.windows_per_mask
        paired = config.estimator in ("arm", "disarm")
        masks, uniforms = estimators.sample(s, groups, config.num_masks, paired, self.generator)
        losses = self.model.losses(windows, masks, config.windows_per_mask)
        baseline = state.baseline
        if config.estimator == "paper":
            before = baseline.mean() if len(baseline) else losses.mean()
            gradient = estimators.paper(losses, masks, s, before)
            baseline = torch.cat([baseline, losses.mean()[None]])[-config.baseline_steps :]
        elif config.estimator == "arm":
            gradient = estimators.arm(losses, uniforms, s)
        elif config.estimator == "disarm":
            gradient = estimators.disarm(losses, masks, s)
        else:
            gradient = estimators.leave_one_out(losses, masks, s)
        removable = ~units.frozen
        metric = self.metric(s)
        moves = torch.where(removable, gradient * metric, 0)
        done = state.step - self.width_steps + 1
        scale = SCALE_MEMORY * state.scale + (1 - SCALE_MEMORY) * moves.square().sum() / removable.sum()
        rate = config.learning_rate * _cosine(done - 1, config.policy_steps - self.width_steps)
        moves = moves * rate / (scale / (1 - SCALE_MEMORY**done)).sqrt().clamp_min(1e-20)
        # the projection moves in the metric of the steps; the paper's is Euclidean
        even = torch.ones_like(s) if units.groups else metric * units.parameters / units.parameters.mean()
        shift = torch.where(removable, even, 0)
        keep_probs = units.project(s - moves, shift, config.clamp)
        return replace(state, keep_probs=keep_probs, scale=scale, baseline=baseline), losses.mean()

    def metric(self, s: Tensor) -> Tensor:
        """What turns the gradient into a step: a power of s(1 − s); over parameters where all share one budget."""
        power = {"plain": 0.0, "paper": 0.5, "natural": 1.0}[self.config.direction]
        variance = (s * (1 - s)).clamp_min(1e-6) ** power
        return variance if self.units.groups else variance * self.units.parameters.mean() / self.units.parameters

    def entropy(self, s: Tensor) -> Tensor:
        """Mean entropy in bits of the units that may go."""
        removable = ~self.units.frozen
        bits = -(torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)) / math.log(2)
        return torch.where(removable, bits, 0).sum() / removable.sum()

    def next_windows(self, step: int) -> Tensor:
        """Windows of a step: all of them in random order, then in another one, and so on; a function of the seed."""
        size, per_epoch = self.config.windows_per_step, len(self.windows) // self.config.windows_per_step
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.seed % 2**32 + epoch))
        return self.windows[order[place * size : (place + 1) * size]]

    def result(self) -> LearnedPolicy:
        """Keep-probabilities that tell all units of an axis apart, and the learning curve."""
        units, state = self.units, self.state
        probs = {}
        for name, widths, by_units in (
            ("initial", self.start_widths, self.unit_start(self.start_widths)),
            ("learned", state.widths, state.keep_probs),
        ):
            order = soft_profile(units, widths, self.ranks, SCORE_SOFTNESS)
            by_widths = self.config.policy == "widths" or (name == "initial" and self.config.policy != "units")
            # many probabilities end at their clamp: the order of the widths decides between these
            probs[name] = order if by_widths else by_units + 1e-3 * (order - by_units)
            probs[name] = torch.where(units.frozen, 1.0, probs[name])
        windows = self.config.windows_per_step
        tokens = windows * (self.config.num_masks + (self.config.reward == "kl")) * self.windows.shape[1]
        history: list[dict[str, float | int | str]] = [
            {
                "step": step,
                "phase": "widths" if step < self.width_steps else "units",
                "loss": loss,
                "kept": kept,
                "entropy": entropy,
                "token_forwards": (step + 1) * tokens,
            }
            for step, (loss, kept, entropy) in enumerate(state.history.tolist())
        ]
        return LearnedPolicy(units, probs["learned"], probs["initial"], history)


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))
