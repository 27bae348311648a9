"""Build transformers models whose decoder layers differ, from `per_layer_config` and `pruning_config` in config.json.

transformers reads `per_layer_config` into its configs but does not build layers from it yet; `install` adds that half.
It wraps six functions, once per process: `PreTrainedConfig.from_dict`, `PreTrainedModel.__init__`, `post_init` and
`from_pretrained`, the `__init__` of a family's decoder layer class, and `get_layer_types_and_kwargs`. All of them leave
models without such a config alone.

What config.json says is checked against one schema before anything is built (`check_config`), and what was loaded
against the model that was built (`check_loaded`): a tensor that is missing is an error, never random numbers.

This file imports only torch and transformers: pruned repositories carry a copy of it as `modeling_hf_prune.py`, so that
they load with `trust_remote_code=True` where hf_prune is not installed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Outputs = str | list[str | None] | None

_MARK = "_hf_prune_per_layer"
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
_NATIVE = "transformers.integrations.heterogeneity"
_DEFAULT_BRANCHES: dict[str, tuple[tuple[str, ...], Outputs]] = {
    "attention": (("self_attn", "self_attention", "attn", "attention"), ["zeros", None]),
    "mlp": (("mlp",), "zeros"),
}
DIGESTS = "pruning_digests"
"""Attribute of config.json with the SHA-256 of its own sections (`config_digest`) and of the files beside it."""


class CheckpointError(ValueError):
    """A checkpoint is damaged or contradicts itself. Where hf_prune is imported its own `CheckpointError` is raised."""


def refusal(message: str) -> ValueError:
    """The error to raise."""
    if "hf_prune" in sys.modules:
        error: ValueError = importlib.import_module("hf_prune.errors").CheckpointError(message)
        return error
    return CheckpointError(message)


def install() -> None:
    """Make transformers build decoder layers from `per_layer_config` and apply the surgery of `pruning_config`.

    Idempotent, also across copies of this file. Imports `transformers.modeling_utils`.
    """
    from transformers import cache_utils
    from transformers.modeling_utils import PreTrainedModel

    install_config_check()
    _wrap_class_method(PreTrainedModel, "from_pretrained", _checked_load)
    if hasattr(PreTrainedModel.__init__, _MARK):
        return

    def before_build(model: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        if _is_pruned(model.config):  # a config may have been read before this file was
            check_config(model.config.to_dict())
        if _builds_layers(model):
            _check_attention_left(model.config)
            _patch_layer_classes(model)
            _patch_auxiliary_loss(model)

    def before_post_init(model: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        # Before the original, so that weights are initialised and tied at their final shapes.
        if _builds_layers(model):
            _check_layers_were_built(model)
        apply_surgery(model)
        original(model, *args, **kwargs)

    _wrap_method(PreTrainedModel, "__init__", before_build)
    _wrap_method(PreTrainedModel, "post_init", before_post_init)
    _patch_cache(cache_utils)
    _patch_view()


def install_config_check() -> None:
    """Make transformers check the config of a pruned model when it reads one. Idempotent, also across copies."""
    from transformers.configuration_utils import PreTrainedConfig

    _wrap_class_method(PreTrainedConfig, "from_dict", _checked_config)


def _wrap_class_method(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    original = vars(owner)[name].__func__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        return replacement(cls, functools.partial(original, cls), *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped))


def _wrap_method(owner: type, name: str, replacement: Callable[..., None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        replacement(self, original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


# --- layers from per_layer_config -------------------------------------------------------------------------------------


def _is_heterogeneous(config: Any) -> bool:
    return bool(getattr(config, "is_heterogeneous", False))


def _is_pruned(config: Any) -> bool:
    return getattr(config, "pruning_config", None) is not None or _is_heterogeneous(config)


def _builds_layers(model: Any) -> bool:
    """Whether the layers of `model` are ours to build: its config is heterogeneous and transformers does not do it."""
    if _layers(model.config) is not None:
        return True
    if not _is_heterogeneous(model.config):
        return False
    # transformers' own half knows a family only if it has a spec for it.
    if getattr(model, "_heterogeneous_modeling_spec", None) is not None:
        return False
    return not _transformers_builds(model.config.model_type)


def _transformers_builds(model_type: str) -> bool:
    """Whether transformers itself builds the layers of this family."""
    if importlib.util.find_spec(f"{_NATIVE}.modeling_utils") is None:
        return False
    if importlib.util.find_spec(f"{_NATIVE}.supported_models") is None:
        return False
    supported = importlib.import_module(f"{_NATIVE}.supported_models")
    return model_type in getattr(supported, "MODEL_TYPE_TO_SPEC_FACTORY", {})


def _patch_view() -> None:
    """Let models that look up the config of a kind of layers (gemma4's rotary angles) have that of its first one."""
    view = getattr(importlib.import_module(f"{_NATIVE}.configuration_utils"), "_PerLayerConfigView", None)
    original = getattr(view, "__getitem__", None)
    if view is None or original is None:
        return

    @functools.wraps(original)
    def getitem(self: Any, layer_idx: Any) -> Any:
        kinds = getattr(self._config, "layer_types", None) or []
        ours = layer_idx in kinds and not _transformers_builds(self._config.model_type)
        return original(self, kinds.index(layer_idx) if ours else layer_idx)

    view.__getitem__ = getitem


def _patch_layer_classes(model: Any) -> None:
    classes = list(_layer_classes(model))
    if not classes:
        raise refusal(
            f"{type(model).__name__}: per_layer_config needs a decoder layer class whose constructor takes "
            f"`config` and one of {_INDEX_NAMES}; found none. "
            "Express the widths of this family as pruning_config['surgery']."
        )
    for cls in classes:
        if not hasattr(cls.__init__, _MARK):
            _patch_layer_class(cls)


def _layer_classes(model: Any) -> Iterator[Any]:
    """The decoder layer classes in the modules that define the classes of `model`."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = set(model._no_split_modules or ())
    for module in _modules_of(model):
        for name, value in vars(sys.modules[module]).copy().items():
            if not isinstance(value, type) or not issubclass(value, nn.Module):
                continue
            if name in names or issubclass(value, GradientCheckpointingLayer):
                parameters = inspect.signature(value.__init__).parameters
                if "config" in parameters and any(index in parameters for index in _INDEX_NAMES):
                    yield value


def _modules_of(model: Any) -> set[str]:
    """Names of the modules that define the classes of `model`."""
    return {cls.__module__ for cls in type(model).__mro__ if hasattr(cls, "_no_split_modules")} & set(sys.modules)


def _patch_auxiliary_loss(model: Any) -> None:
    """Let the loss that balances experts take layers with fewer: those that a layer lacks have logits of -inf."""
    for module in (sys.modules[name] for name in _modules_of(model)):
        original = getattr(module, "load_balancing_loss_func", None)
        if original is None or hasattr(original, _MARK):
            continue

        @functools.wraps(original)
        def loss(
            gate_logits: Any, num_experts: int | None = None, *args: Any, _own: Any = original, **kwargs: Any
        ) -> Any:
            if isinstance(gate_logits, tuple) and num_experts is not None:
                lacks = [num_experts - logits.shape[-1] for logits in gate_logits]
                pairs = zip(gate_logits, lacks, strict=True)
                gate_logits = tuple(F.pad(logits, (0, n), value=-torch.inf) if n > 0 else logits for logits, n in pairs)
            return _own(gate_logits, num_experts, *args, **kwargs)

        setattr(loss, _MARK, True)
        module.load_balancing_loss_func = loss  # type: ignore[attr-defined]


def _patch_layer_class(cls: Any) -> None:
    """Wrap `cls.__init__` so that layer i of a heterogeneous model is built with the config of layer i."""
    signature = inspect.signature(cls.__init__)
    index_name = next(name for name in _INDEX_NAMES if name in signature.parameters)

    def build(layer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(layer, *args, **kwargs)
        config = bound.arguments["config"]
        layers = _layers(config)
        if layers is None and (not _is_heterogeneous(config) or _transformers_builds(config.model_type)):
            original(layer, *args, **kwargs)
            return
        layer_idx = bound.arguments.get(index_name)
        if layer_idx is None:
            raise refusal(f"{cls.__name__} was built without `{index_name}`: its per_layer_config is unknown.")
        own = bound.arguments["config"] = layer_config(config, layer_idx)
        if layers is not None:
            bound.arguments[index_name] = _as_in_dense_model(own, layers, layer_idx)
        original(*bound.args, **bound.kwargs)
        for module in layer.modules() if layers is not None else ():
            for name in _INDEX_NAMES:  # the place in a cache
                if vars(module).get(name) == bound.arguments[index_name]:
                    setattr(module, name, layer_idx)
        skip_branches(layer, config, layer_idx)

    _wrap_method(cls, "__init__", build)


def _check_attention_left(config: Any) -> None:
    """Refuse a model without any attention: a cache would have no layer to count tokens by."""
    if _is_heterogeneous(config) and all("attention" in one.skip for one in config.per_layer_config):
        raise refusal("per_layer_config: all layers skip their attention, expected one that keeps it. Remove fewer.")


def _check_layers_were_built(model: Any) -> None:
    from transformers.modeling_utils import PreTrainedModel

    layers = (module for module in model.modules() if not isinstance(module, PreTrainedModel))
    if not any(hasattr(type(module).__init__, _MARK) for module in layers):
        raise refusal(f"{type(model).__name__}: per_layer_config reached no layer; this family is not supported.")


# --- the config of one layer ------------------------------------------------------------------------------------------


def _of_the_model(name: str) -> property:
    def change(config: Any, value: Any) -> None:
        if "_model_config" in vars(config):  # not while the class makes a config of its defaults
            setattr(config._model_config, name, value)

    return property(lambda config: getattr(vars(config).get("_model_config"), name, None), change)


class _LayerConfig:
    """Mixed into a config class: reads the attention and experts implementation of the model's config.

    Layers keep their config. A plain copy would go stale when `set_attn_implementation` changes the model's config:
    masks would be made for one implementation and used by another.
    """

    _model_config: Any

    _attn_implementation_internal = _of_the_model("_attn_implementation_internal")
    _experts_implementation_internal = _of_the_model("_experts_implementation_internal")

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values.pop("_model_config", None)
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_layer_config, (type(self).__bases__[1],), self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


@functools.cache
def _layer_config_class(cls: type) -> type:
    return type(cls.__name__, (_LayerConfig, cls), {"__module__": cls.__module__})


def _empty_layer_config(cls: type) -> Any:
    return object.__new__(_layer_config_class(cls))


def layer_config(config: Any, layer_idx: int) -> Any:
    """The config that decoder layer `layer_idx` of a model with `config` is built with.

    Args:
        config: config of the model. The result refers to it: a later change of its attention or experts
            implementation is seen by the layer.
        layer_idx: index of the layer, 0 <= `layer_idx` < `num_hidden_layers`.

    Returns:
        A copy of `config` with the layer's own values: not heterogeneous, an instance of the same class.
    """
    copy = config.per_layer_config[layer_idx]
    if copy is config:  # not heterogeneous
        copy = object.__new__(type(config))
        copy.__dict__.update(config.__dict__)
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        copy.__dict__.pop(name, None)
    copy.__dict__["_model_config"] = config
    copy.__class__ = _layer_config_class(copy.__class__)
    return copy


def _layers(config: Any) -> dict[str, Any] | None:
    """The record of layers that are built as they were in the dense model: with their index and its depth there."""
    return surgery_of(config).get("layers")


def _as_in_dense_model(own: Any, layers: Mapping[str, Any], layer_idx: int) -> int:
    """Give the config of one layer the depth and the lists by layer of the dense model; return the layer's index there.

    What classes compute from their place among the layers (`scale / (layer_idx + 1)`, `first_k_dense_replace`) comes
    out as it did.
    """
    kept, depth = layers["kept"], layers["num_hidden_layers"]
    count = own.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if len(kept) != getattr(own, count):
        raise refusal(
            f"pruning_config['surgery'] names {len(kept)} layers, expected {getattr(own, count)}, as {count} says. "
            "Save or download the checkpoint again."
        )
    for name, value in list(vars(own).items()):
        if isinstance(value, list) and len(value) == len(kept):
            of_dense = dict(zip(kept, value, strict=True))
            own.__dict__[name] = [of_dense.get(layer) for layer in range(depth)]
    own.__dict__[count] = depth
    index: int = kept[layer_idx]
    return index


# --- skipped branches -------------------------------------------------------------------------------------------------


class ZeroBranch(nn.Module):
    """Stands in for a removed attention or MLP module: no parameters, adds nothing to the residual stream."""

    def __init__(self, replaced: nn.Module, outputs: Outputs, reads_cache_length: bool) -> None:
        super().__init__()
        self.argument_names = tuple(inspect.signature(type(replaced).forward).parameters)[1:]
        self.__dict__ |= {k: v for k, v in vars(replaced).items() if type(v) in (bool, int, str) and k != "training"}
        self.outputs = outputs
        self.reads_cache_length = reads_cache_length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the removed module would, with zeros shaped as the hidden states `[B, T, D]` it is given."""
        arguments = dict(zip(self.argument_names, args, strict=False))
        arguments.update(kwargs)
        if self.reads_cache_length:
            _check_cache(arguments)
        if isinstance(self.outputs, list):
            return tuple(self._output(output, arguments) for output in self.outputs)
        return self._output(self.outputs, arguments)

    def _output(self, output: str | None, arguments: Mapping[str, Any]) -> Any:
        if output is None:
            return None
        if arguments.get("residual") is not None:  # bloom and mpt add it inside of the branch
            return arguments["residual"]
        hidden_states = arguments.get("hidden_states")
        return torch.zeros_like(arguments[self.argument_names[0]] if hidden_states is None else hidden_states)

    def extra_repr(self) -> str:
        """Show what is returned."""
        return f"outputs={self.outputs}"


def _check_cache(arguments: Mapping[str, Any]) -> None:
    """Refuse a cache that takes its length from layer 0 although layer 0 has no attention to fill it."""
    from transformers import cache_utils

    empty = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[_empty_cache_layer(cache_utils)]
    for cache in arguments.values():
        if isinstance(cache, cache_utils.Cache) and not (cache.layers and isinstance(cache.layers[0], empty)):
            raise ValueError(
                f"Layer 0 of this model has no attention, but the {type(cache).__name__} it was given expects one and "
                "would report a length of 0. Make the cache with `config=model.config`, or let the model make it."
            )


def _empty_cache_layer(cache_utils: Any) -> str:
    """The kind of cache layer that stays empty and that lengths are not read from; before transformers 5.23 "mlp"."""
    return "dummy" if "dummy" in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING else "mlp"


STAND_INS: dict[str | None, Callable[[nn.Module, Outputs, bool], nn.Module]] = {}
"""Attention implementation → what stands in for removed attention there, where that is not `ZeroBranch`."""


def skip_branches(layer: nn.Module, config: Any, layer_idx: int) -> None:
    """Replace the branches that `config.per_layer_config[layer_idx].skip` names. Modifies `layer` in place.

    `pruning_config["surgery"]["branches"]` says which module a branch is and what it returns: "zeros" (shaped as the
    hidden states), null, or a list of these (a tuple). Without that record the usual names and outputs are taken.

    Raises:
        ValueError: a branch is unknown, or the layer has no such module.
    """
    recorded = surgery_of(config).get("branches", {})
    for branch in getattr(config.per_layer_config[layer_idx], "skip", ()):
        names: Sequence[str]
        if branch in recorded:
            names, outputs = [recorded[branch]["module"]], recorded[branch]["outputs"]
        elif branch in _DEFAULT_BRANCHES:
            names, outputs = _DEFAULT_BRANCHES[branch]
        else:
            known = sorted({*_DEFAULT_BRANCHES, *recorded})
            raise refusal(f"Layer {layer_idx} skips {branch!r}; this file knows {known}.")
        path = next((name for name in names if _submodule(layer, name) is not None), None)
        if path is None:
            raise refusal(
                f"Layer {layer_idx} skips {branch!r}, but {type(layer).__name__} has no module {' or '.join(names)}. "
                f"Name it in pruning_config['surgery']['branches']."
            )
        parent, _, name = path.rpartition(".")
        replaced = layer.get_submodule(path)
        reads_cache_length = branch == "attention" and layer_idx == 0
        make = STAND_INS.get(config._attn_implementation if branch == "attention" else None, ZeroBranch)
        setattr(layer.get_submodule(parent), name, make(replaced, outputs, reads_cache_length))


def _patch_cache(cache_utils: Any) -> None:
    """Give layers without attention a cache layer that holds nothing, so that lengths are read from a real one."""
    original = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if original is None:
        return

    @functools.wraps(original)
    def get_layer_types_and_kwargs(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
        types, kwargs = original(config)
        if _is_heterogeneous(config):
            for layer_idx, one in enumerate(config.per_layer_config):
                if "attention" in one.skip:
                    types[layer_idx] = _empty_cache_layer(cache_utils)
                    if isinstance(kwargs, list):  # in transformers 5.16 it is one for all layers
                        kwargs[layer_idx] = {}
        return types, kwargs

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and vars(module).get("get_layer_types_and_kwargs") is original:
            module.get_layer_types_and_kwargs = get_layer_types_and_kwargs  # type: ignore[attr-defined]


# --- surgery: shapes that no config attribute expresses ---------------------------------------------------------------


@dataclass(frozen=True)
class SliceArgument:
    """Forward pre-hook that keeps some units of one tensor argument, e.g. the ALiBi slopes of the heads that stayed.

    Dimension `dim` of the argument is seen as the row-major product of `sizes` (one may be -1); along its factor number
    `factor` the entries `kept` stay.
    """

    argument: str
    position: int
    dim: int
    sizes: tuple[int, ...]
    factor: int
    kept: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the arguments with the selection made."""
        if isinstance(kwargs.get(self.argument), Tensor):
            kwargs = {**kwargs, self.argument: self._select(kwargs[self.argument])}
        elif self.position < len(args) and isinstance(args[self.position], Tensor):
            args = (*args[: self.position], self._select(args[self.position]), *args[self.position + 1 :])
        return args, kwargs

    def _select(self, values: Tensor) -> Tensor:
        dim = self.dim % values.dim()
        factors = values.unflatten(dim, self.sizes)  # type: ignore[no-untyped-call]
        # Slices instead of an index tensor: nothing to keep on the right device, and no copy from the host per call.
        runs = [factors.narrow(dim + self.factor, start, length) for start, length in _runs(self.kept)]
        return torch.cat(runs, dim + self.factor).flatten(dim, dim + len(self.sizes) - 1)


def _runs(kept: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive indices as (start, length)."""
    runs: list[tuple[int, int]] = []
    for index in kept:
        if runs and index == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def surgery_of(config: Any) -> dict[str, Any]:
    """The record of what no attribute of a config says; of a model of images and text that of layers is in its part."""
    pruning_config = getattr(config, "pruning_config", None)
    return (pruning_config.get("surgery") or {}) if isinstance(pruning_config, dict) else {}


def apply_surgery(model: Any) -> None:
    """Give modules the shapes and sizes in `model.config.pruning_config["surgery"]`. Modifies `model` in place.

    Paths are those of the model with a language modelling head; in a base model the `base_model_prefix` is dropped, and
    modules that a model does not have (`lm_head` in a classifier) are left out. Shapes are absolute: applying it twice
    changes nothing. A tensor whose shape changes loses its values. Nothing grows, so that no record can ask for memory.

    Raises:
        CheckpointError: the model has a base model, but that has no module of a recorded path; or a record asks for
            something else than a smaller tensor, or a smaller number that goes with one.
    """
    prefix = f"{model.base_model_prefix}."
    has_base = getattr(model, model.base_model_prefix, None) is not None
    found: dict[str, tuple[nn.Module, Mapping[str, Any]]] = {}
    for path, record in surgery_of(model.config).get("modules", {}).items():
        module = _submodule(model, path if has_base else path.removeprefix(prefix))
        if module is not None:
            found[path] = module, record
        elif has_base and path.startswith(prefix):
            raise refusal(f"pruning_config['surgery'] names {path!r}: {type(model).__name__} has no such module.")
    changes = {
        f"{path}.{name}": _resize(module, path, name, shape)
        for path, (module, record) in found.items()
        for name, shape in record.get("shapes", {}).items()
    }
    for path, (module, record) in found.items():
        for name, value in record.get("attributes", {}).items():
            around = path if any(module.children()) else path.rpartition(".")[0]
            near = [pair for tensor, pairs in changes.items() if tensor.startswith(f"{around}.") for pair in pairs]
            _set_size(module, path, name, value, near)
        for name, selection in record.get("select_inputs", {}).items():
            _select_input(module, path, name, selection)


def _set_size(module: nn.Module, path: str, name: str, value: int, changes: Iterable[tuple[int, int]]) -> None:
    """Set a number that `module` keeps, such as its head count: only if a tensor near it shrank by as much, or more."""
    found = vars(module).get(name)
    if type(found) is not int or hasattr(type(module), name):
        raise refusal(
            f"pruning_config['surgery'] sets {path}.{name}, but {type(module).__name__} keeps no whole number of that "
            "name. Save or download the checkpoint again."
        )
    shrinks = value < found and any(new < old and old * value >= new * found for old, new in changes)
    if found != value and not shrinks:
        raise refusal(
            f"pruning_config['surgery'] changes {path}.{name} from {found} to {value}, but no tensor there shrinks "
            "by as much. Save or download the checkpoint again."
        )
    setattr(module, name, value)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _resize(module: nn.Module, path: str, name: str, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Replace a parameter or buffer by an empty one of `shape`, and correct the sizes its module remembers.

    Returns:
        The (old, new) lengths of the dimensions that changed.
    """
    owner_path, _, tensor_name = name.rpartition(".")
    owner = _submodule(module, owner_path)
    tensor = None if owner is None else (owner._parameters | owner._buffers).get(tensor_name)
    if owner is None or tensor is None:
        raise refusal(f"pruning_config['surgery'] resizes {path}.{name}: the model has no such tensor.")
    old, new = tuple(tensor.shape), tuple(shape)
    if old == new:
        return []
    if len(old) != len(new) or any(after > before for before, after in zip(old, new, strict=True)):
        raise refusal(
            f"pruning_config['surgery'] gives {path}.{name} the shape {list(new)}; found {list(old)} in the model that "
            "config.json describes, expected no larger ones. Save or download the checkpoint again."
        )
    empty = torch.empty(new, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    setattr(owner, tensor_name, empty)
    owner._is_hf_initialized = False  # type: ignore[assignment]
    if tensor_name == "weight":
        _remember_sizes(owner, empty.shape)
    return [(before, after) for before, after in zip(old, new, strict=True) if before != after]


_SIZE_NAMES: tuple[tuple[str, ...], ...] = (
    ("nx", "nf"),  # Conv1D of transformers: weight [in, out]
    ("out_features", "in_features"),
    ("num_embeddings", "embedding_dim"),
    ("num_features",),
)


def _remember_sizes(module: nn.Module, shape: Sequence[int]) -> None:
    for names in _SIZE_NAMES:
        if all(hasattr(module, name) for name in names):
            for name, length in zip(names, shape, strict=False):
                setattr(module, name, length)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(shape)  # type: ignore[assignment]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.groups > 1:  # whole groups go: a depthwise convolution has one per channel
            module.groups = module.groups * shape[0] // module.out_channels
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups


def _select_input(module: nn.Module, path: str, argument: str, selection: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(type(module).forward).parameters)
    if argument not in parameters[1:]:
        raise refusal(f"pruning_config['surgery'] selects from {argument!r}, which {path} does not take.")
    hook = SliceArgument(
        argument,
        parameters.index(argument) - 1,
        selection["dim"],
        tuple(selection["sizes"]),
        selection["factor"],
        tuple(selection["kept"]),
    )
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(cast("Any", hook), with_kwargs=True)


# --- what config.json may say -----------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z]\w*(\.([A-Za-z]\w*|\d+))*", re.ASCII)
_LARGEST = 2**17
"""Length of a dimension that config.json may ask for where it says nothing of the dense length."""
_NOT_OF_A_LAYER = ("implementation", "config", "auto_map", "model_type", "architectures", "dtype", "name_or_path")


def check_config(values: Mapping[str, Any]) -> None:
    """Check `pruning_config` and `per_layer_config` of a config.json: names, types and ranges, as hf_prune writes them.

    Args:
        values: the config as JSON values.

    Raises:
        CheckpointError: something else was found.
    """
    pruning, per_layer = values.get("pruning_config"), values.get("per_layer_config")
    if pruning is None:  # layers that differ are transformers' own format: what else writes it is not ours to judge
        return
    _check_section(pruning)
    names, code = values.get("architectures") or [], values.get("auto_map", {})
    _expect(_is_list(names, lambda name: isinstance(name, str)), "architectures", names, "names of classes")
    _expect(_is_map(code, lambda _, name: isinstance(name, str)), "auto_map", code, "classes by auto class")
    for key, value in values.items():
        if "layer" in key and type(value) is int:  # classes make lists of that length
            _expect(value <= 2**14, key, value, "a number of layers")
    if per_layer is not None:
        _check_layers(per_layer, values)
    for _, part in parts_of_ours(values):
        check_config(part)


def parts_of_ours(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The configs inside of a config, such as that of the text of a model of images, in which we wrote something."""
    found = [(name, part) for name, part in values.items() if isinstance(part, dict)]
    return sorted((name, part) for name, part in found if part.get("pruning_config") is not None)


def config_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of `pruning_config` and `per_layer_config`, whatever the order and the spelling of their keys."""
    layers = {int(layer): override for layer, override in (values.get("per_layer_config") or {}).items()}
    parts = [(name, config_digest(part)) for name, part in parts_of_ours(values)]
    content = json.loads(json.dumps([values.get("pruning_config"), layers, *parts]))  # as they are in a file
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_saved(values: Mapping[str, Any]) -> None:
    """`check_config`, and whether a saved config agrees with itself: selected inputs with widths, and its SHA-256.

    Raises:
        CheckpointError: it breaks the schema, contradicts itself, or was changed after the model was saved.
    """
    check_config(values)
    section = values.get("pruning_config") or {}
    widths = sorted({n for n in section.get("widths", {}).values() if n})
    for path, record in (section.get("surgery") or {}).get("modules", {}).items():
        for name, selection in record.get("select_inputs", {}).items():
            kept = selection["kept"]
            _expect(not widths or len(kept) in widths, f"{path}.{name}.kept", kept, f"as many as a width, of {widths}")
    recorded = values.get(DIGESTS)
    if recorded is None:
        return
    _expect(_is_map(recorded, lambda name, digest: isinstance(digest, str)), DIGESTS, recorded, "SHA-256 by file name")
    found = config_digest(values)
    if recorded.get("config.json") != found:
        raise refusal(
            f"config.json: found SHA-256 {found[:12]}… for pruning_config and per_layer_config, expected "
            f"{str(recorded.get('config.json'))[:12]}…: they were changed after the model was saved. Save or download "
            "the checkpoint again."
        )


def _expect(fits: bool, where: str, found: Any, expected: str) -> None:
    if not fits:
        text = repr(found)
        raise refusal(
            f"{where}: found {text if len(text) < 60 else text[:57] + '...'}, expected {expected}. "
            "Save or download the checkpoint again."
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def _is_map(value: Any, fits: Callable[[str, Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and fits(k, v) for k, v in value.items())


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(fits(entry) for entry in value)


def _check_section(section: Any) -> None:
    name = "pruning_config"
    _expect(_is_map(section, lambda _, value: True), name, section, "an object")
    _expect(section.get("format", 1) == 1, f"{name}.format", section.get("format"), "1, all that this version reads")
    for key, kinds in (("hf_prune_version", str), ("method", str), ("settings", dict), ("achieved", dict)):
        _expect(isinstance(section.get(key, kinds()), kinds), f"{name}.{key}", section.get(key), kinds.__name__)
    base = section.get("base_model_name_or_path")
    _expect(base is None or isinstance(base, str), f"{name}.base_model_name_or_path", base, "a text or null")
    widths = section.get("widths", {})
    _expect(_is_map(widths, lambda _, n: n == 0 or _is_size(n)), f"{name}.widths", widths, "whole numbers by axis")
    surgery = section.get("surgery")
    if surgery is None:
        return
    where = f"{name}.surgery"
    parts = ("branches", "modules", "layers")
    _expect(_is_map(surgery, lambda key, _: key in parts), where, surgery, f"{parts}")
    if "layers" in surgery:
        _check_kept_layers(f"{where}.layers", surgery["layers"])
    branches, modules = surgery.get("branches", {}), surgery.get("modules", {})
    _expect(_is_map(branches, lambda key, _: key in _DEFAULT_BRANCHES), where, branches, f"{list(_DEFAULT_BRANCHES)}")
    for branch, record in branches.items():
        _check_branch(f"{where}.branches.{branch}", record)
    _expect(_is_map(modules, lambda path, _: bool(_PATH.fullmatch(path))), where, modules, "paths of modules")
    for path, record in modules.items():
        _check_module(f"{where}.modules[{path!r}]", record)


def _check_kept_layers(where: str, record: Any) -> None:
    keys = {"kept", "num_hidden_layers"}
    _expect(_is_map(record, lambda *_: True) and set(record) == keys, where, record, f"{sorted(keys)}")
    kept, depth = record["kept"], record["num_hidden_layers"]
    _expect(type(depth) is int and 0 < depth <= 2**14, f"{where}.num_hidden_layers", depth, "a number of layers")
    fits = _is_list(kept, lambda layer: type(layer) is int) and len(kept) > 0
    ascending = fits and all(left < right for left, right in itertools.pairwise([-1, *kept, depth]))
    _expect(ascending, f"{where}.kept", kept, f"ascending layers below {depth}")


def _check_branch(where: str, record: Any) -> None:
    _expect(_is_map(record, lambda _, value: True) and set(record) == {"module", "outputs"}, where, record, "a module")
    module, outputs = record["module"], record["outputs"]
    _expect(isinstance(module, str) and bool(_PATH.fullmatch(module)), f"{where}.module", module, "a module path")
    rest = outputs[1:] if isinstance(outputs, list) and outputs[:1] == ["zeros"] else None
    fits = outputs == "zeros" or (rest is not None and len(rest) < 8 and all(entry is None for entry in rest))
    _expect(fits, f"{where}.outputs", outputs, '"zeros", or a list of "zeros" and nulls')


def _check_module(where: str, record: Any) -> None:
    known = ("shapes", "attributes", "select_inputs")
    _expect(_is_map(record, lambda key, part: key in known and isinstance(part, dict)), where, record, f"{known}")
    for name, shape in record.get("shapes", {}).items():
        fits = bool(_PATH.fullmatch(name)) and _is_list(shape, _is_size) and 0 < len(shape) < 6
        _expect(fits, f"{where}.shapes[{name!r}]", shape, "the lengths of a tensor, each from 1")
    for name, value in record.get("attributes", {}).items():
        fits = bool(_NAME.fullmatch(name)) and "layer" not in name and _is_size(value)
        _expect(fits, f"{where}.attributes[{name!r}]", value, "a size, from 1")
    for name, selection in record.get("select_inputs", {}).items():
        _check_selection(f"{where}.select_inputs[{name!r}]", selection)


def _check_selection(where: str, selection: Any) -> None:
    keys = {"dim", "sizes", "factor", "kept"}
    _expect(_is_map(selection, lambda *_: True) and set(selection) == keys, where, selection, f"{sorted(keys)}")
    dim, sizes, factor, kept = (selection[key] for key in ("dim", "sizes", "factor", "kept"))
    _expect(type(dim) is int and -8 <= dim < 8, f"{where}.dim", dim, "a dimension")
    fits = _is_list(sizes, lambda n: n == -1 or _is_size(n)) and 0 < len(sizes) < 8 and list(sizes).count(-1) < 2
    _expect(fits, f"{where}.sizes", sizes, "lengths from 1, one of them -1 perhaps")
    _expect(type(factor) is int and 0 <= factor < len(sizes), f"{where}.factor", factor, f"0 to {len(sizes) - 1}")
    fits = _is_list(kept, lambda unit: type(unit) is int) and len(kept) > 0
    _expect(fits, f"{where}.kept", kept, "the units that stay")
    most = _LARGEST if sizes[factor] == -1 else sizes[factor]
    ascending = all(left < right for left, right in itertools.pairwise([-1, *kept, most]))
    _expect(ascending, f"{where}.kept", kept, f"ascending units below {most}")


def _check_layers(layers: Any, values: Mapping[str, Any]) -> None:
    name = "per_layer_config"
    fits = isinstance(layers, dict) and all(
        re.fullmatch(r"[0-9]{1,5}", str(key)) and _is_map(override, lambda *_: True) for key, override in layers.items()
    )
    _expect(fits, name, layers, "overrides by layer index")
    _expect(len({int(key) for key in layers}) == len(layers), name, list(layers), "each layer once")
    for layer, override in layers.items():
        for key, value in override.items():
            where = f"{name}[{layer}].{key}"
            if key == "skip":
                _expect(_is_list(value, lambda branch: isinstance(branch, str)), where, value, "a list of branches")
                continue
            fits = bool(_NAME.fullmatch(key)) and not any(word in key for word in _NOT_OF_A_LAYER)
            _expect(fits, where, value, "a number of one layer")
            fault = _fault_of_size(value, values.get(key))
            _expect(not fault, where, value, fault)


def _fault_of_size(value: Any, dense: Any) -> str:
    """What a layer's own value has to be, given that of the model (`None`: not known); "" if it is that."""
    if type(value) is int:
        most = max(dense, 64) if type(dense) is int else _LARGEST
        return "" if 0 < value <= most else f"a whole number from 1 to {most}"
    if value is None or (type(value) in (bool, float) and (dense is None or type(value) is type(dense))):
        return ""
    return "a number like the model's"


# --- loading ----------------------------------------------------------------------------------------------------------

_NOT_THE_CHECKPOINT = (ImportError, MemoryError, torch.OutOfMemoryError)


def _checked_config(cls: type, original: Callable[..., Any], values: dict[str, Any], **kwargs: Any) -> Any:
    """`PreTrainedConfig.from_dict`, refusing what `check_config` refuses."""
    if not isinstance(values, dict) or not {"pruning_config", "per_layer_config", DIGESTS} & values.keys():
        return original(values, **kwargs)
    if DIGESTS in values:
        check_saved(values)
    else:  # a pruned model pruned again has records of both for a moment
        check_config(values)
    try:
        config = original({key: value for key, value in values.items() if key != DIGESTS}, **kwargs)
    except _NOT_THE_CHECKPOINT:
        raise
    except Exception as error:
        raise refusal(f"config.json: {cls.__name__} does not take it: {error}") from error
    check_config((config[0] if isinstance(config, tuple) else config).to_dict())
    return config


def _checked_load(
    cls: Any, original: Callable[..., Any], *args: Any, output_loading_info: bool = False, **kwargs: Any
) -> Any:
    """`PreTrainedModel.from_pretrained`; a pruned model comes with all its tensors, or not at all."""
    config: Any = kwargs.get("config")
    try:
        if _is_pruned(config):
            check_saved(config.to_dict())
        model, info = original(*args, output_loading_info=True, **kwargs)
    except _NOT_THE_CHECKPOINT:
        raise
    except Exception as error:
        if not _is_pruned(config) or type(error).__name__ == "CheckpointError":
            raise
        raise refusal(f"{args[0] if args else cls.__name__}: the pruned model cannot be loaded: {error}") from error
    if _is_pruned(model.config):
        check_loaded(model, info)
        vars(model.config).pop(DIGESTS, None)  # of the files, not of what becomes of the model
    return (model, info) if output_loading_info else model


def check_loaded(model: Any, info: Mapping[str, Any], *, with_head: bool = False) -> None:
    """Check that a model has got all its tensors, and no others.

    Args:
        model: a model that `from_pretrained` returned.
        info: what `output_loading_info=True` gives.
        with_head: the head must not be new, even if the model is of another class than the one that was saved.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or (in a pruned model) has no place.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return  # `info` is about the adapter
    prefix = f"{model.base_model_prefix}."
    whole = type(model).__name__.removeprefix("FSDP") in (model.config.architectures or ())
    has_base = getattr(model, model.base_model_prefix, None) is not None

    def counts(name: str) -> bool:
        return with_head or whole or not has_base or name.startswith(prefix)

    problems = [
        f"{name} has shape {list(found)}, expected {list(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
        if counts(name)
    ]
    problems += [f"{name} is missing" for name in info["missing_keys"] if counts(name)]
    if whole and _is_pruned(model.config) and getattr(model, "hf_quantizer", None) is None:
        problems += [f"{name} is not part of the model" for name in info["unexpected_keys"]]
    if problems:
        source = getattr(model.config, "_name_or_path", "")
        raise refusal(
            f"{source if source not in ('', 'None') else type(model).__name__}: the weights do not fit config.json: "
            f"{'; '.join(sorted(problems)[:3])}{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "Save or download the checkpoint again."
        )
