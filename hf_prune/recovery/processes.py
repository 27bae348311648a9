"""How a run was launched, and decisions that all of its processes share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import TrainingArguments


def launcher(args: TrainingArguments) -> str | None:
    """What wraps the model in this run: `DDP`, `FSDP`, `DeepSpeed`, another wrapper's name, or `None`."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if not PartialState._shared_state:
        return None
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else PartialState().distributed_type
    if kind == DistributedType.FSDP or getattr(args, "fsdp", None):
        return "FSDP"
    if kind == DistributedType.DEEPSPEED or getattr(args, "deepspeed", None):
        return "DeepSpeed"
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        return str(kind.value)
    if PartialState().num_processes > 1:
        return "DDP"
    return "DataParallel" if args.n_gpu > 1 else None


def shards_on_load() -> bool:
    """Whether DeepSpeed ZeRO-3 splits weights while a model is loaded."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def of_first_process(plan: PruningPlan) -> PruningPlan:
    """The plan that the first process found: rounding must not make processes decide differently."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if not PartialState._shared_state or PartialState().num_processes == 1:
        return plan
    found = [plan.to_dict()]
    broadcast_object_list(found)
    return PruningPlan.from_dict(found[0])
