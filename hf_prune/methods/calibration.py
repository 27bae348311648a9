"""What a model's weights are multiplied with: norms of the inputs of linear operations over calibration tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError

Batch = Mapping[str, Tensor]

_LINEAR = (F.linear,)
_MATMUL = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


def input_norms(model: nn.Module, inputs: Mapping[str, int], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Measure the norm of every input channel of weights, over all calibration tokens, in one pass.

    2-D weights are seen by a pre-hook on their module; 3-D expert weights by the matrix products that take a view of
    them (the eager expert implementation is used meanwhile, so that each expert sees only the tokens routed to it).
    The model is left as it was, also after an error.

    Args:
        model: a causal LM.
        inputs: name of each weight → its input dimension.
        batches: `input_ids`, int64 `[B, T]`, without padding.

    Returns:
        For each weight whose input was seen: float32 `[channels]`, or `[experts, channels]` for a 3-D weight: the
        root of the sum of squares (summed in float32), on the model's device. Weights never seen are left out.

    Raises:
        CalibrationError: no batch, or a batch without tokens or with padding.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, squares: Tensor) -> None:
        sums[name] = sums[name] + squares if name in sums else squares

    parameters = dict(model.named_parameters(remove_duplicate=False))
    flat = {name: dim for name, dim in inputs.items() if parameters[name].dim() == 2}
    stacked = {name: (parameters[name], dim) for name, dim in inputs.items() if parameters[name].dim() == 3}
    num_batches = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for name, dim in flat.items():
            module = model.get_submodule(name.rpartition(".")[0])
            hook = _recorder(name, parameters[name].shape[dim], add)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if stacked:
            stack.enter_context(eager_experts(model))

            def add_stacked(name: str, first: int, x: Tensor) -> None:
                total = x.new_zeros(parameters[name].shape[0], x.shape[-1], dtype=torch.float32)
                total[first : first + len(x)] = x.float().square().sum(1)
                add(name, total)

            stack.enter_context(StackedInputs(stacked, add_stacked))
        for batch in tqdm(batches, desc="calibration", unit="batch", leave=False):
            model(input_ids=checked_ids(batch).to(input_device(model)), use_cache=False)
            num_batches += 1
    if num_batches == 0:
        raise CalibrationError("calibration found no batch, expected one or more: give a longer text or more samples.")
    return {name: squares.sqrt() for name, squares in sums.items()}


def _recorder(name: str, num_channels: int, add: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None and x.is_floating_point() and x.shape[-1] == num_channels:
            add(name, x.detach().float().square().reshape(-1, num_channels).sum(0))

    return record


class StackedInputs(TorchFunctionMode):
    """Watches matrix products whose weight is a view of a `[experts, ...]` parameter.

    Args:
        watched: name → the parameter and its input dimension.
        see: gets the name, the first expert of the view, and the inputs `[experts, tokens, channels]` of its experts.
        see_output: gets the name, the first expert, their number, and the product.
    """

    def __init__(
        self,
        watched: Mapping[str, tuple[Tensor, int]],
        see: Callable[[str, int, Tensor], None] | None = None,
        see_output: Callable[[str, int, int, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._watched = {weight.untyped_storage().data_ptr(): (name, weight) for name, (weight, _) in watched.items()}
        self._dims = {name: dim for name, (_, dim) in watched.items()}
        self._see, self._see_output = see, see_output

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = None
        if (func in _LINEAR or func in _MATMUL) and len(args) >= 2:
            found = self._find(args[0], args[1])
        if found is not None and self._see is not None:
            name, first, used = found
            self._see(name, first, args[0].detach().reshape(used, -1, args[0].shape[-1]))
        result = func(*args, **(kwargs or {}))
        if found is not None and self._see_output is not None:
            self._see_output(*found, result)
        return result

    def _find(self, x: Tensor, weight: Tensor) -> tuple[str, int, int] | None:
        """Name of the watched parameter that `weight` is a view of, its first expert, and how many."""
        name, whole = self._watched.get(weight.untyped_storage().data_ptr(), ("", weight))
        if not name:
            return None
        num_experts, num_channels = whole.shape[0], whole.shape[self._dims[name]]
        first, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), whole.stride(0))
        used = weight.numel() // whole[0].numel()
        if rest or used not in (1, num_experts) or x.shape[-1] != num_channels:
            return None
        return name, first, used


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """The readable expert loop for a while: the fused ones gather copies of the weights."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    change: Any = getattr(model, "set_experts_implementation", None)
    if before is None or change is None:
        yield
        return
    change("eager")
    try:
        yield
    finally:
        change(before)


def checked_ids(batch: Batch) -> Tensor:
    """The `input_ids` `[B, T]` of a batch; `CalibrationError` if it has none, or padding."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(batch).__name__
        raise CalibrationError(
            f"a calibration batch is {{'input_ids': int64 [B, T]}} with tokens in it, found {found}."
        )
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise CalibrationError("a calibration batch holds padding; give windows of equal length without padding.")
    return ids


def input_device(module: nn.Module) -> torch.device:
    """Where a model or layer expects its input; the CPU if all of it is offloaded: accelerate's hooks then move it."""
    return next((weight.device for weight in module.parameters() if not weight.is_meta), torch.device("cpu"))
