"""Several processes (`accelerate launch`): each walks its share of the samples, and sums are taken over all."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from torch import Tensor

from hf_prune.atomic import reserved
from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

T = TypeVar("T")


def shard_batches(items: Sequence[T]) -> list[T]:
    """What this process handles: the items are dealt out in turn."""
    state = PartialState()
    return list(items[state.process_index :: state.num_processes])


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, where `values` lie; they themselves where there is one process."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    total: Tensor = reduce(values.to(state.device, copy=True), reduction="sum")
    return total.to(values.device)


def sum_numbers(*values: float) -> list[float]:
    """The sums of some numbers over all processes."""
    found: list[float] = sum_over_processes(torch.tensor(values, dtype=torch.float64)).tolist()
    return found


def of_main_process(value: Any) -> Any:
    """What the main process has; for decisions that all must take alike: rounding may differ among processes."""
    if PartialState().num_processes == 1:
        return value
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def copy_of_main_process_(values: Tensor) -> None:
    """Give a tensor the values that it has in the main process, in place."""
    state = PartialState()
    if state.num_processes > 1:
        values.copy_(broadcast(values.detach().to(state.device, copy=True).contiguous()))


def least_of_processes(number: int) -> int:
    """The least of the numbers that the processes have: what all of them have done."""
    return min(gather_object([number])) if PartialState().num_processes > 1 else number


def reserved_for_all(directory: Path) -> AbstractContextManager[None]:
    """`reserved` for all processes of this run: the main one holds it."""
    return reserved(directory) if PartialState().is_main_process else nullcontext()


@contextmanager
def main_writes(what: str) -> Iterator[bool]:
    """Whether this process is to write `what`: the main one. The others that come here wait for it, and fail with it.

    The main process waits for none, so that it may also come alone, as in `if accelerator.is_main_process: ...`.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield True
        return
    store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
    done = f"{what}: end of {store.add(f'{what}: times of {rank}', 1)}"  # it may be written often
    failure = ""
    try:
        yield rank == 0
    except BaseException as error:
        failure = str(error) or type(error).__name__
        raise
    finally:
        if rank == 0:
            store.set(done, failure)
    while not store.check([done]):
        time.sleep(0.05)
    if failure := store.get(done).decode():
        raise CheckpointError(failure)
