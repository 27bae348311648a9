"""Repair one decoder layer: its attention on what arrives, then its MLP on what the repaired attention wrote.

A branch is computed once per batch: its consumers' inputs are kept until their weights are known, and where the branch
is one module that returns its consumer's output, later passes through the layer get that output instead.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.layers.masking import keep_mask, mask_axis
from hf_prune.layers.processes import of_main_process, shard_batches
from hf_prune.layers.statistics import Solution, Statistics, best_ridge, is_held_out, solve_, solving
from hf_prune.layers.walk import StopForward, Walk, hidden_of, replaced_forward, with_hidden
from hf_prune.layers.watch import watching
from hf_prune.repair.training import train_layer_
from hf_prune.structure.axes import BRANCHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hf_prune.repair.consumers import Branches, Refit
    from hf_prune.structure.axes import Branch, Structure
    from hf_prune.structure.consumers import Consumer

logger = logging.getLogger(__name__)

MIN_TOKENS_PER_INPUT = 0.25
"""An expert that saw fewer calibration tokens per input than this stays as it is."""
ADDITIVE = 1e-2
"""Relative error up to which a layer counts as hidden states + attention + MLP."""


@dataclass(frozen=True)
class Repaired:
    """Squared error of a consumer's output against its target, summed over outputs, mean over tokens; ridge used."""

    error_before: float
    error_after: float
    ridge: float


@dataclass
class _Dense:
    """What the dense layer did: for each batch its output, and what each consumer gave."""

    outputs: list[Tensor] = field(default_factory=list)
    given: dict[str, list[Tensor]] = field(default_factory=dict)
    returned: dict[Branch, Any] = field(default_factory=dict)
    """For branches that are one module, which returns the output of its only consumer: what it returned at first."""
    additive: bool = False
    """Whether the layer adds the outputs of its consumers to the hidden states, and nothing else."""


Outputs = dict["Branch", list[Tensor]]
"""What the consumers of the repaired branches give in the pruned layer, per batch."""


class LayerRepair:
    """Walks the dense and the pruned model layer by layer."""

    def __init__(
        self,
        dense: Walk,
        pruned: Walk,
        change: tuple[int, int],
        structure: Structure,
        kept: Mapping[str, tuple[int, ...]],
        target: str,
        ridge: float,
        train: bool = False,
    ) -> None:
        self.dense, self.pruned, self.train = dense, pruned, train
        self.change, self.target, self.ridge = change, target, ridge
        self.kept_hidden = torch.as_tensor(kept["hidden"]) if "hidden" in kept else None
        self.structure = structure
        self.experts = {n: units for n, units in kept.items() if structure.axes[n].kind == "expert"}

    def skip(self, layer: int) -> None:
        """A layer that the pruned model does not have."""
        if self.target != "own":
            self._forward_dense(layer)

    def repair(self, found: Branches) -> dict[str, Repaired]:
        """Repair the consumers of one layer, and take the hidden states of both models through it."""
        if (found.layer, len(BRANCHES) - 1) < self.change:  # nothing was pruned so far
            self._forward_dense(found.layer)
            self.pruned.hidden = list(self.dense.hidden)
            return {}
        dense, outputs = self._run_dense(found), Outputs()
        result: dict[str, Repaired] = {}
        for branch in BRANCHES:
            if (found.layer, BRANCHES.index(branch)) < self.change:
                continue
            consumers = [consumer for consumer in found.consumers[branch] if consumer.pruned is not None]
            linear = [consumer for consumer in consumers if consumer.consumer.kind == "linear"]
            experts = [consumer for consumer in consumers if consumer.consumer.kind == "experts"]
            shared = linear if len(linear) == 1 and self._adds_up(found, linear[0], experts, dense, outputs) else []
            if linear and not shared:
                result.update(self._repair_linear(found, branch, linear, dense, outputs))
            for consumer in experts:
                result.update(self._repair_experts(found, branch, consumer, dense, outputs))
            for consumer in shared:
                result.update(self._repair_shared(found, consumer, dense, outputs))
        if self.train:
            targets = [self._kept(hidden) for hidden in dense.outputs]
            path = f"{self.dense.layer_paths[found.layer]}."
            aliases = self.structure.aliases
            common = {name.removeprefix(path) for name in (*aliases, *aliases.values()) if name.startswith(path)}
            errors = train_layer_(self.pruned, found.pruned_layer, targets, common)
            result[self.dense.layer_paths[found.layer]] = Repaired(*errors, self.ridge)
            outputs = Outputs()
        for batch, hidden in enumerate(self.pruned.hidden):
            with self._repaired(found, dense, outputs, batch):
                self.pruned.hidden[batch] = self.pruned.run(found.pruned_layer, batch, hidden)
        self.dense.hidden = list(self.pruned.hidden) if self.target == "own" else dense.outputs
        return result

    def _kept(self, hidden: Tensor) -> Tensor:
        """Hidden states of the dense model, the channels that the pruned one has."""
        return hidden if self.kept_hidden is None else hidden.index_select(-1, self.kept_hidden)

    def _forward_dense(self, layer: int) -> None:
        for batch, hidden in enumerate(self.dense.hidden):
            self.dense.hidden[batch] = self.dense.run(layer, batch, hidden)

    # --- the dense layer --------------------------------------------------------------------------------------------

    def _run_dense(self, found: Branches) -> _Dense:
        """Run the dense layer on all batches: on its own hidden states, or for `own` on the pruned model's."""
        dense = _Dense(given={c.name: [] for c in found.all() if c.consumer.kind == "linear"})
        returned: dict[Branch, Any] = {}
        for batch, hidden in enumerate(self.pruned.hidden if self.target == "own" else self.dense.hidden):
            with contextlib.ExitStack() as stack:
                for consumer in found.all():
                    if consumer.consumer.kind == "linear":
                        keep = dense.given[consumer.name].append
                        stack.callback(consumer.dense.register_forward_hook(self._keeper(keep)).remove)
                for branch, module in found.dense.items() if batch == 0 else ():
                    keep = partial(returned.__setitem__, branch)
                    stack.callback(module.register_forward_hook(self._keeper(keep)).remove)
                dense.outputs.append(self.dense.run(found.layer, batch, hidden))
            if batch == 0:
                self._look_at(dense, found, returned, hidden)
        dense.additive = of_main_process(dense.additive)
        return dense

    def _look_at(self, dense: _Dense, found: Branches, returned: dict[Branch, Any], hidden: Tensor) -> None:
        """How the branches of a layer add up, seen on the first batch."""
        before, after = _rows(hidden), _rows(dense.outputs[0])
        total = torch.zeros_like(before)
        known = True
        for branch in found.dense.keys() | {branch for branch in BRANCHES if found.consumers[branch]}:
            only = _only(found.consumers[branch])
            given = dense.given[only.name] if only is not None else []
            if len(given) == 1:
                output = _rows(given[0])
                if branch in returned and _equal(output, _rows(hidden_of(returned[branch]))):
                    dense.returned[branch] = returned[branch]
            elif branch == BRANCHES[-1] and branch in returned:  # experts
                output = _rows(hidden_of(returned[branch]))
            else:
                known = False
                continue
            known = known and output.shape == total.shape
            total = total + output if known else total
        rounding = 4 * torch.finfo(hidden.dtype).eps * float(after.norm())
        dense.additive = known and float((after - before - total).norm()) <= ADDITIVE * float(total.norm()) + rounding

    def _keeper(self, keep: Callable[[Any], None]) -> Callable[..., None]:
        """A hook that keeps a copy of what a module returned: some layers add to it in place."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(with_hidden(output, self.dense.held(hidden_of(output), copy=True)))

        return hook

    # --- linear consumers -------------------------------------------------------------------------------------------

    def _repair_linear(
        self,
        found: Branches,
        branch: Branch,
        consumers: list[Refit],
        dense: _Dense,
        outputs: Outputs,
    ) -> dict[str, Repaired]:
        """Fit the consumers of one branch; adds the new output of the branch to `outputs` where it has only one."""
        inputs: dict[str, list[Tensor]] = {consumer.name: [] for consumer in consumers}
        statistics = {
            (consumer.name, held_out): Statistics(
                len(consumer.kept_inputs), len(consumer.kept_outputs), consumer.weight.device
            )
            for consumer in consumers
            for held_out in (False, True)
        }
        firsts = shard_batches(list(accumulate((len(ids) for ids in self.pruned.all_ids), initial=0))[:-1])
        only = _only(found.consumers[branch])
        for batch in range(len(self.pruned.hidden)):
            self._collect(found, consumers, inputs, dense, outputs, batch)
            for consumer in consumers:
                seen, given = inputs[consumer.name], dense.given[consumer.name]
                if len(seen) != batch + 1 or len(given) <= batch or _tokens(seen[batch]) != _tokens(given[batch]):
                    continue
                target = _rows(given[batch]).index_select(1, consumer.kept_outputs)
                if self.target == "residual" and dense.additive and consumer is only:
                    target = target + self._missing(found, branch, dense, outputs, batch)
                windows = is_held_out(firsts[batch], len(self.pruned.hidden[batch]))
                others = windows.repeat_interleave(len(target) // len(windows))
                x = seen[batch].reshape(len(target), -1)
                for held_out, own in ((False, ~others), (True, others)):
                    statistics[consumer.name, held_out].add(x[own], target[own])
        solutions = {}
        for consumer in consumers:
            sums, held = (statistics.pop((consumer.name, other)).over_processes() for other in (False, True))
            if sums.num_tokens + held.num_tokens != self.pruned.num_tokens:
                logger.warning("%s is not given every token once in both models; it stays as it is.", consumer.name)
                continue
            with solving(consumer.name):
                weight, ridge = consumer.consumer.matrix(consumer.weight), self.ridge
                if ridge and held.num_tokens:
                    ridge = of_main_process(best_ridge(sums, held, weight, consumer.bias, ridge))
                sums.add_sums(held)
                solutions[consumer] = solve_(sums, weight, consumer.bias, ridge)
        for consumer, solution in solutions.items():
            consumer.write_(solution.weight, solution.bias)
        if only is not None and only.pruned is not None and only in solutions:
            hold, device = self.pruned.held, only.weight.device
            outputs[branch] = [hold(only.pruned(x.to(device))) for x in inputs[only.name]]
        return self._report({consumer.name: solution for consumer, solution in solutions.items()})

    # --- the shared expert ------------------------------------------------------------------------------------------

    def _adds_up(self, found: Branches, shared: Refit, experts: list[Refit], dense: _Dense, outputs: Outputs) -> bool:
        """Whether the layer adds what a linear consumer beside `experts` gives, as it is; seen on the first batch."""
        if not experts or self.target != "residual" or not self.pruned.hidden:
            return False
        given, whole, _ = self._with_shared(found, shared, dense, outputs, 0)
        _, without, _ = self._with_shared(found, shared, dense, outputs, 0, nothing=True)
        error = _rows(whole) - _rows(without) - _rows(given)
        adds = given.shape[-1] == whole.shape[-1] and float(error.norm()) <= ADDITIVE * float(_rows(given).norm())
        return bool(of_main_process(adds))

    def _repair_shared(self, found: Branches, shared: Refit, dense: _Dense, outputs: Outputs) -> dict[str, Repaired]:
        """Fit what runs for every token last, to all that the layer's output lacks: experts that went included."""
        sums = Statistics(len(shared.kept_inputs), len(shared.kept_outputs), shared.weight.device)
        for batch, wanted in enumerate(dense.outputs):
            given, whole, x = self._with_shared(found, shared, dense, outputs, batch)
            target = _rows(self._kept(wanted))
            sums.add(self.pruned.held(x), target - _rows(self.pruned.held(whole)) + _rows(self.pruned.held(given)))
        with solving(shared.name):
            weight = shared.consumer.matrix(shared.weight)
            solution = solve_(sums.over_processes(), weight, shared.bias, self.ridge)
        shared.write_(solution.weight, solution.bias)
        return self._report({shared.name: solution})

    def _with_shared(
        self, found: Branches, shared: Refit, dense: _Dense, outputs: Outputs, batch: int, *, nothing: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the shared expert's consumer gives, the pruned layer's output, and the consumer's input."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            seen.extend((output, args[0]))
            return torch.zeros_like(output) if nothing else None

        assert shared.pruned is not None
        handle = shared.pruned.register_forward_hook(see)
        try:
            with self._repaired(found, dense, outputs, batch):
                whole = self.pruned.run(found.pruned_layer, batch, self.pruned.hidden[batch])
        finally:
            handle.remove()
        return seen[0], whole, seen[1]

    def _missing(self, found: Branches, branch: Branch, dense: _Dense, outputs: Outputs, batch: int) -> Tensor:
        """What the residual stream of the pruned model lacks before `branch`: `[tokens, D]`."""
        missing = _rows(self._kept(self.dense.hidden[batch])) - _rows(self.pruned.hidden[batch])
        for earlier in BRANCHES[: BRANCHES.index(branch)]:
            only = _only(found.consumers[earlier])
            if only is None or (only.pruned is not None and earlier not in outputs):
                continue  # it comes before all that was pruned, so both models give the same
            missing += _rows(dense.given[only.name][batch]).index_select(1, only.kept_outputs)
            if earlier in outputs:
                missing -= _rows(outputs[earlier][batch])
        return missing

    def _collect(
        self,
        found: Branches,
        consumers: list[Refit],
        inputs: dict[str, list[Tensor]],
        dense: _Dense,
        outputs: Outputs,
        batch: int,
    ) -> None:
        """Run the pruned layer on one batch until the inputs of all `consumers` are known."""
        waiting = {consumer.name for consumer in consumers}

        def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name].append(self.pruned.held(args[0]))
            waiting.discard(name)
            if not waiting:
                raise StopForward

        with self._repaired(found, dense, outputs, batch), contextlib.ExitStack() as stack:
            for consumer in consumers:
                assert consumer.pruned is not None
                hook = partial(see, consumer.name)
                stack.callback(consumer.pruned.register_forward_pre_hook(hook).remove)
            with contextlib.suppress(StopForward):
                self.pruned.run(found.pruned_layer, batch, self.pruned.hidden[batch])

    @contextlib.contextmanager
    def _repaired(self, found: Branches, dense: _Dense, outputs: Outputs, batch: int) -> Iterator[None]:
        """Repaired branches that are one module give what they are known to give, without computing it again."""
        with contextlib.ExitStack() as stack:
            for branch, values in outputs.items():
                if branch in dense.returned:
                    known, only = values[batch], found.consumers[branch][0]
                    known = known.reshape(*self.pruned.hidden[batch].shape[:-1], -1)
                    give = partial(_give, dense.returned[branch], known, only.weight.device)
                    stack.enter_context(replaced_forward(found.pruned[branch], give))
            yield

    # --- experts ----------------------------------------------------------------------------------------------------

    def _repair_experts(
        self, found: Branches, branch: Branch, consumer: Refit, dense: _Dense, outputs: Outputs
    ) -> dict[str, Repaired]:
        """Fit each expert to the dense one on the tokens that are routed to it in the pruned model."""
        if branch not in found.pruned or self.kept_hidden is not None:
            logger.warning("%s cannot be given the pruned model's hidden states; it stays as it is.", consumer.name)
            return {}
        weight = consumer.dense.get_parameter(consumer.name.rpartition(".")[2])
        num_inputs = consumer.kept_inputs.shape[-1]
        if num_inputs == weight.shape[consumer.consumer.dim]:
            return {}  # nothing was pruned before it: it is its own solution
        statistics = [
            Statistics(num_inputs, len(consumer.kept_outputs), consumer.weight.device) for _ in consumer.weight
        ]
        position = {expert: new for new, expert in enumerate(consumer.kept_experts.tolist())}
        inputs = consumer.kept_inputs.to(weight.device).expand(len(position), -1)  # of each expert

        def see(_: Consumer, start: int, x: Tensor) -> None:
            for expert, own in enumerate(x, start):
                if len(own) and expert in position:
                    target = own @ consumer.consumer.matrix(weight[expert]).T
                    statistics[position[expert]].add(own.index_select(1, inputs[position[expert]]), target)

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with contextlib.ExitStack() as stack:
                for name, units in self.experts.items():
                    axis = self.structure.axes[name]
                    if axis.layer == found.layer:
                        mask = keep_mask(axis.num_units, units)
                        stack.enter_context(mask_axis(self.dense.model, self.structure, name, mask))
                stack.enter_context(watching(self.dense.model, [consumer.consumer], given=see))
                found.dense[branch](*args, **kwargs)
            raise StopForward

        handle = found.pruned[branch].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for batch, hidden in enumerate(self.pruned.hidden):
                with self._repaired(found, dense, outputs, batch), contextlib.suppress(StopForward):
                    self.pruned.run(found.pruned_layer, batch, hidden)
        finally:
            handle.remove()
        statistics = [sums.over_processes() for sums in statistics]
        enough = math.ceil(MIN_TOKENS_PER_INPUT * num_inputs)
        few = [expert for expert, sums in enumerate(statistics) if sums.num_tokens < enough]
        if few:
            logger.warning(
                "%s: experts %s saw fewer than %d tokens; they stay as they are.", consumer.name, few, enough
            )
        with solving(consumer.name):
            solutions = {
                expert: solve_(sums, consumer.consumer.matrix(consumer.weight[expert]), None, self.ridge)
                for expert, sums in enumerate(statistics)
                if expert not in few
            }
        for expert, solution in solutions.items():
            consumer.write_(solution.weight, expert=expert)
        return self._report({f"{consumer.name}[{expert}]": solution for expert, solution in solutions.items()})

    def _report(self, solutions: dict[str, Solution]) -> dict[str, Repaired]:
        for name, found in solutions.items():
            if found.ridge > found.asked:
                logger.warning("%s: its inputs are not independent; the ridge became %g.", name, found.ridge)
        return {name: Repaired(s.error_before, s.error_after, s.ridge) for name, s in solutions.items()}


def _only(consumers: list[Refit]) -> Refit | None:
    """The consumer of a branch that is a single linear layer."""
    return consumers[0] if len(consumers) == 1 and consumers[0].consumer.kind == "linear" else None


def _rows(hidden: Tensor) -> Tensor:
    """`[tokens, D]`, in float32 at least."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def _tokens(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _give(returned: Any, known: Tensor, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """What a module returned once, with other hidden states."""
    return with_hidden(returned, known.to(device, copy=True))
