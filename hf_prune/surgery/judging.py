"""Whether the model of another config computes what the dense model does with the same units taken out.

Both are run once on the meta device, and every tensor gets the number of the expression that made it: the operation,
its literals (scales, epsilons), and the numbers of what went in. Parameters are named, constants count by value. Where
the logits have the same number, they are equal for all weights and all inputs, at any size and without a weight.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.errors import StructureError
from hf_prune.format.building import build_empty
from hf_prune.format.per_layer import SliceArgument
from hf_prune.layers.masking import masked
from hf_prune.structure.forward import Forward, Lists, TraceError, tensors
from hf_prune.structure.inference import traceable_config
from hf_prune.surgery.slicing import renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

_WITHOUT_VALUES = frozenset(("device", "layout", "pin_memory", "memory_format", "non_blocking"))
_VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias"))
_OF_SIZE = frozenset((*_VIEWS, "expand", "squeeze", "unsqueeze"))
"""Left out where sizes do not count: what `reshape` becomes depends on strides, and one head is not repeated."""
_PRODUCTS = {torch.einsum: "einsum"} | dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul")
_INDICES = ("layer_idx", "layer_id", "layer_number")


class Judge:
    """Compares configs with the dense model, in which the layers and branches that a plan removes are bypassed.

    Args:
        config: config of the dense model.
        structure: its structure.
        plan: what is removed.
        cls: model class, by default the one `AutoModelForCausalLM` chooses.
        sizes: whether shapes, indices and the layers of a cache count too: not where widths differ or branches go.
    """

    def __init__(
        self, config: Any, structure: Structure, plan: PruningPlan, cls: type | None, *, sizes: bool = False
    ) -> None:
        self._config, self._structure, self._plan, self._cls, self._sizes = config, structure, plan, cls, sizes
        self._stay = [i for i in range(len(structure.layer_paths)) if i not in plan.removed_layers]

    @functools.cached_property
    def _dense(self) -> _Run:
        layers = {n: kept for n, kept in self._plan.kept_indices.items() if self._structure.axes[n].kind == "layer"}
        run = partial(self._run, self._config, {}, replace(self._plan, kept_indices=layers))
        if layers:  # there are too many such plans to hold what each leaves
            return run()
        return self._structure.once(("run", repr(self._config.to_dict()), self._cls, self._sizes), run)

    def difference(self, config: Any) -> str:
        """Where the model of `config`, its tensors named as in the pruned model, computes something else; else ""."""
        try:
            dense = self._dense
            found = self._run(config, dict(dense.numbers))
        except (StructureError, TraceError) as error:
            return str(error)
        if found.result != dense.result:
            known = {number for number, *_ in dense.steps}
            new = ((path, text) for number, path, text in found.steps if number not in known)
            path, text = next(new, ("the model", "its inputs"))
            return self._constants(dense.model, found.model, path) or f"{path} computes something else: {text}"
        wanted = _cache_layers(self._config) if self._sizes else []
        of_cache = _cache_layers(config) if len(set(wanted)) > 1 else []
        each = len(wanted) // len(self._structure.layer_paths)  # longcat_flash: two attentions in each layer
        if of_cache and of_cache != [
            kind for layer in self._stay for kind in wanted[layer * each : (layer + 1) * each]
        ]:
            return f"its cache has the layers {of_cache}"
        return ""

    def _run(self, config: Any, numbers: dict[Any, int], bypassed: PruningPlan | None = None) -> _Run:
        with Forward() as construction, Lists(construction.values):  # what constants it computes
            model = build_empty(traceable_config(config), self._cls)
        run = _Expressions(numbers, construction, self._sizes)
        for name, tensor in model.state_dict(keep_vars=True).items():
            new = name if bypassed is None else renamed(name, self._structure, bypassed)
            run.names.setdefault(id(tensor), new or f"removed {name}")
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, SliceArgument):
                    module._forward_pre_hooks[key] = partial(_select, hook, run)  # type: ignore[assignment]
        with contextlib.nullcontext() if bypassed is None else masked(model, self._structure, bypassed):
            result = run.compute(model)
        return _Run(model, numbers, run.steps, result)

    def _constants(self, dense: nn.Module, model: nn.Module, path: str) -> str:
        """The attributes that differ in the modules around `path`."""
        old = {renamed(name, self._structure, self._plan): module for name, module in dense.named_modules()}
        texts = [
            f"{around}.{name} is {value!r}, {vars(old[around])[name]!r} in the dense model"
            for around in (path, path.rpartition(".")[0])
            if around in old
            for name, value in vars(model.get_submodule(around)).items()
            if isinstance(value, (bool, int, float, str))
            and name not in _INDICES
            and vars(old[around]).get(name, value) != value
        ]
        return "; ".join(texts[:3])


@dataclass(frozen=True)
class _Run:
    """What a model computes."""

    model: PreTrainedModel
    numbers: dict[Any, int]
    """Expression → its number."""
    steps: list[tuple[int, str, str]]
    """Expression, the module that computed it, and the operation with its literals."""
    result: int
    """The expression of the logits."""


class _Expressions(Forward):  # type: ignore[no-untyped-call]
    """Numbers the expression of every tensor of a forward pass; equal expressions have equal numbers."""

    def __init__(self, numbers: dict[Any, int], construction: Forward, sizes: bool) -> None:
        super().__init__()
        self._numbers, self._construction, self._sizes = numbers, construction, sizes
        self.names: dict[int, str] = {}
        """Of tensors that are saved, by id."""
        self._found: dict[int, int] = {}  # by id of a tensor
        self._written: dict[int, int] = {}  # the last write, by storage
        self.steps: list[tuple[int, str, str]] = []

    def compute(self, model: nn.Module) -> int:
        """Run the model; the expression of its logits."""
        with _Composites(self):
            output = self.run(model)
        return self.number(output["logits"] if "logits" in output else next(tensors(output)))

    def number(self, tensor: Tensor) -> int:
        """The number of the expression of a tensor, as it is now."""
        own = self._found.get(id(tensor))
        if own is None:
            self.alive.append(tensor)
            value = self._construction.values.get(tensor) if tensor.is_meta else tensor
            leaf = "unknown" if value is None else _value(value, self._sizes)
            own = self._found[id(tensor)] = self._of(self.names.get(id(tensor), leaf))
        written = self._written.get(tensor.untyped_storage()._cdata)
        return own if written is None else self._of((own, written))

    def _integers(self, index: Tensor | None) -> list[Tensor | None]:
        """Places that a mask takes are made from the mask."""
        found = super()._integers(index)
        for position, places in enumerate(found):
            if index is not None and places is not None and places is not index:
                self._found[id(places)] = self._of((position, ("places", self.number(index))))
        return found

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """Take `tensor` for the same as `other`."""
        self.alive.append(tensor)
        self._found[id(tensor)] = self.number(other)

    def composed(self, name: str, arguments: Any, output: Tensor) -> None:
        """Number the result of an operation as a whole, whatever it is made of at these sizes."""
        self.alive.append(output)
        self._found[id(output)] = self._of((0, (name, self._literal(arguments))))

    def saw(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Number the results of an operation."""
        whole = name == "slice" and outputs[0].shape == inputs[0].shape
        copied = name in ("clone", "_to_copy") and outputs[0].dtype == inputs[0].dtype
        if copied or (not self._sizes and (name in _OF_SIZE or whole)):
            self.same(outputs[0], inputs[0])
            return
        arguments, written = [], []
        for index, (argument, is_size, is_written) in enumerate(_arguments(func)):
            value = args[index] if index < len(args) else kwargs.get(argument)
            if is_written and isinstance(value, Tensor):
                written.append(value)
            if argument in _WITHOUT_VALUES or (is_size and not self._sizes):
                continue
            if isinstance(value, Tensor) and name.endswith("_like"):
                continue  # only its shape is used
            if name.startswith("arange") and isinstance(value, int) and not self._sizes:
                continue
            arguments.append(self._literal(value))
        key = ("view" if name in _VIEWS else name, *arguments)
        for position, output in enumerate(outputs):
            self._found[id(output)] = self._of((position, key))
        for tensor in written:
            self._written[tensor.untyped_storage()._cdata] = self._of((0, key))
        text = ", ".join(str(value) for value in arguments if not isinstance(value, tuple) and value is not None)
        self.steps.append((self._of((0, key)), self.where, f"{name}({text})"))

    def _of(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _literal(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(map(self._literal, value))
        return value if value is None or type(value) in (bool, int, str) else repr(value)


class _Composites(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Takes products for one operation: of which ones they are made depends on sizes, such as that of a single head."""

    def __init__(self, run: _Expressions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._run.composed(_PRODUCTS[func], args, output)
        return output


@functools.cache
def _arguments(func: Any) -> list[tuple[str, bool, bool]]:
    """Name of each argument of an operation, whether it is a size, and whether it is written to."""
    sizes = set(re.findall(r"SymInt(?:\[\d*\])?\??(?:\[\d*\])?\?? (\w+)", str(func._schema)))
    return [
        (a.name, a.name in sizes, a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments
    ]


def _value(value: Tensor, sizes: bool) -> Any:
    """A constant, by value; where sizes do not count, a uniform one by its one value."""
    flat = value.detach().cpu().flatten()
    if not sizes and len(flat) and bool((flat == flat[0]).all()):
        return str(value.dtype), repr(flat[0].item())
    return str(value.dtype), tuple(value.shape), hashlib.sha256(repr(flat.tolist()).encode()).digest()


def _select(hook: SliceArgument, run: _Expressions, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a hook that leaves out units of an argument: the rest is what it was."""
    result = hook(module, args, kwargs)
    for before, after in zip(tensors((args, kwargs)), tensors(result), strict=True):
        if after is not before:
            run.same(after, before)
    return result


def _cache_layers(config: Any) -> list[Any]:
    """Kind of each layer of a cache, [] where transformers cannot tell."""
    from transformers import cache_utils

    try:
        kinds, settings = cache_utils.get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    except Exception:  # configs of models without such a cache
        return []
    return [(kind, own.get("sliding_window")) for kind, own in zip(kinds, settings, strict=True)]
