"""Run the forward pass of a model built without weights, on the meta device, with the few values that it asks for."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_prune.structure.constants import ConstantValues

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH_SIZE, SEQ_LEN = 2, 11
TOKEN = 1
"""Every token of the input: no positions look like it."""
_META = torch.device("meta")
_NEED_VALUES = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))


class TraceError(Exception):
    """A forward pass that cannot be traced: what was raised, and in which module."""

    def __init__(self, error: Exception, where: str) -> None:
        lines = [line for line in str(error).splitlines() if line.strip()]
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else 'no message'} (in {where})"[:300])
        self.needs_values = isinstance(error, NeedsValuesError)


class Forward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operation on the meta device, and those on known values for real beside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = ConstantValues()
        self.alive: list[Tensor] = []  # ids stay unique while their tensors live
        self.module_path: list[str] = []
        self._known: dict[Any, Any] = {}  # sizes of results, by operation and sizes of what went in: layers repeat

    @property
    def where(self) -> str:
        """Path of the module whose forward runs now."""
        return self.module_path[-1] if self.module_path else "the model"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = list(tensors((args, kwargs)))
        if name == "index":
            args = (args[0], [place for index in args[1] for place in self._integers(index)])
            inputs = list(tensors((args, kwargs)))
        decided = self.values.evaluate(name, args)
        out = self._computed(func, args, kwargs, inputs) if decided is None else decided
        outputs = list(tensors(out))
        if outputs:
            self.alive += inputs
            self.alive += outputs
            if decided is None:
                self.values.propagate(func, args, kwargs, inputs, outputs)
            self.saw(func, name, args, kwargs, inputs, outputs)
        return out

    def _integers(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as whole numbers: how many entries a mask takes depends on its values."""
        return list(self.values.of_mask(index)) if index is not None and index.dtype == torch.bool else [index]

    def _computed(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """Run an operation on the meta device, or make the result that it had before for tensors of these sizes."""
        if not inputs or not _makes_new(func):
            return _on_meta(func, args, kwargs, inputs)
        key = (func, _sizes((args, kwargs)))
        if key not in self._known:
            out = _on_meta(func, args, kwargs, inputs)
            self._known[key] = _sizes(out)
            return out
        return _made(self._known[key])

    def saw(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Called after every operation that returns tensors."""

    def entered(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Called before the forward of every module but the model itself."""
        self.module_path.append(path)

    def left(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Called after it."""
        self.module_path.pop()

    def run(self, model: nn.Module, *, use_cache: bool = False, ids: Tensor | None = None) -> Any:
        """What `model`, whose parameters are on the meta device, returns, run once.

        Args:
            model: built by `build_empty`.
            use_cache: as for the model.
            ids: token ids `[B, T]`; default: 2 × 11 of them.

        Raises:
            TraceError: the forward pass does not run, or not without values.
        """
        handles = []
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(partial(self.entered, path), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(self.left, path)))
        try:
            with torch.no_grad(), self, Lists(self.values):
                known = torch.full((BATCH_SIZE, SEQ_LEN), TOKEN) if ids is None else self.values.note(ids)
                return model(input_ids=known, use_cache=use_cache)
        except Exception as error:  # whatever a model's own code raises
            raise TraceError(error, self.where) from error
        finally:
            for handle in handles:
                handle.remove()


class NeedsValuesError(Exception):
    """An operation whose result, or the shape of its result, depends on values that are not known."""


class Lists(TorchFunctionMode):
    """Sees the values that torch reads from, or gives as, Python lists: on the meta device it loses them."""

    def __init__(self, values: ConstantValues) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            known = self.values.get(args[0])
            return _Unknown(args[0].shape) if known is None and args[0].dim() == 1 else _listed(known)
        if func in (torch.split, Tensor.split) and isinstance(parts := args[1], _Unknown):
            dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else 0)
            return args[0].tensor_split(len(parts), dim)
        if func.__name__ == "one_hot":
            num_classes = (kwargs or {}).get("num_classes", args[1] if len(args) > 1 else -1)
            if (known := self.values.one_hot(args[0], num_classes)) is not None:
                return known
        if func is torch.tensor:
            kwargs = {**(kwargs or {}), "device": "cpu"}  # seen with its values by `Forward`, which moves it
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index, *rest = args[1:]
            index = tuple(map(_as_tensor, index)) if isinstance(index, tuple) else _as_tensor(index)
            args = (args[0], index, *rest)
        return func(*args, **(kwargs or {}))


class _Unknown(list[None]):
    """Whole numbers that depend on weights, as many as experts: only how many there are is known.

    As the sizes of parts that something is split into they count as equal.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__([None] * shape[0])


def _listed(known: Tensor | None) -> Any:
    if known is None:
        raise NeedsValuesError("tolist")
    return known.tolist()


def _as_tensor(index: Any) -> Any:
    """An index that is a list of integers as a tensor."""
    return torch.tensor(index) if isinstance(index, list) and all(isinstance(i, int) for i in index) else index


def _on_meta(func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
    """Run an operation on the meta device, whatever device it names and wherever its inputs are."""
    if not all(tensor.is_meta for tensor in inputs):
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if _takes_device(func) and (not inputs or kwargs.get("device") is not None):
        kwargs = {**kwargs, "device": _META}
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if _NEED_VALUES.isdisjoint(func.tags):
            raise
        raise NeedsValuesError(str(func)) from error


def _sizes(value: Any) -> Any:
    """Nested values with the sizes, strides and dtypes of tensors in their place; hashable."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _sizes(item)) for name, item in value.items())
    return tuple(map(_sizes, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _made(sizes: Any) -> Any:
    """Tensors on the meta device of such sizes."""
    if sizes[0] is Tensor:
        return torch.empty_strided(*sizes[1:3], dtype=sizes[3], device=_META)
    return tuple(map(_made, sizes))


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether an operation writes to nothing, and returns tensors of their own and nothing else."""
    schema = func._schema
    own = all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    return own and all(str(value.type) == "Tensor" for value in schema.returns)


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
