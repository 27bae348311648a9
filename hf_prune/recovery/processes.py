"""How a run was launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments


def distributed_kind(args: TrainingArguments) -> str | None:
    """What wraps the model in this run: `DDP`, `FSDP`, `DeepSpeed`, another wrapper's name, or `None`."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, parse_flag_from_env

    if not PartialState._shared_state:
        return None
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else PartialState().distributed_type
    # `accelerate launch` says it in the environment, and its state only once a `Trainer` is there.
    if kind == DistributedType.FSDP or getattr(args, "fsdp", None) or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    named = getattr(args, "deepspeed", None) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if kind == DistributedType.DEEPSPEED or named:
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
