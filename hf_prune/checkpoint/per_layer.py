"""Build transformers models whose decoder layers differ, from `per_layer_config` and `pruning_config` in config.json.

transformers reads `per_layer_config` into its configs but does not build layers from it yet; `install` adds that half.
It wraps four functions, once per process: `PreTrainedModel.__init__`, `PreTrainedModel.post_init`, the `__init__` of a
family's decoder layer class, and `get_layer_types_and_kwargs`. All of them leave models without such a config alone.

This file imports only torch and transformers: pruned repositories carry a copy of it as `modeling_hf_prune.py`, so that
they load with `trust_remote_code=True` where hf_prune is not installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Outputs = str | list[str | None] | None

_MARK = "_hf_prune_per_layer"
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
_NATIVE = "transformers.integrations.heterogeneity"
_DEFAULT_BRANCHES: dict[str, tuple[tuple[str, ...], Outputs]] = {
    "attention": (("self_attn", "self_attention", "attn", "attention"), ["zeros", None]),
    "mlp": (("mlp",), "zeros"),
}


def install() -> None:
    """Make transformers build decoder layers from `per_layer_config` and apply the surgery of `pruning_config`.

    Idempotent, also across copies of this file. Imports `transformers.modeling_utils`.
    """
    from transformers import cache_utils
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel.__init__, _MARK):
        return

    def before_build(model: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        if _builds_layers(model):
            _patch_layer_classes(model)

    def before_post_init(model: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        # Before the original, so that weights are initialised and tied at their final shapes.
        if _builds_layers(model):
            _check_layers_were_built(model)
        apply_surgery(model)
        original(model, *args, **kwargs)

    _wrap_method(PreTrainedModel, "__init__", before_build)
    _wrap_method(PreTrainedModel, "post_init", before_post_init)
    _patch_cache(cache_utils)


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


def _builds_layers(model: Any) -> bool:
    """Whether the layers of `model` are ours to build: its config is heterogeneous and transformers does not do it."""
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


def _patch_layer_classes(model: Any) -> None:
    classes = list(_layer_classes(model))
    if not classes:
        raise ValueError(
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
    modules = {cls.__module__ for cls in type(model).__mro__ if hasattr(cls, "_no_split_modules")} & set(sys.modules)
    for module in modules:
        for name, value in vars(sys.modules[module]).copy().items():
            if not isinstance(value, type) or not issubclass(value, nn.Module):
                continue
            if name in names or issubclass(value, GradientCheckpointingLayer):
                parameters = inspect.signature(value.__init__).parameters
                if "config" in parameters and any(index in parameters for index in _INDEX_NAMES):
                    yield value


def _patch_layer_class(cls: Any) -> None:
    """Wrap `cls.__init__` so that layer i of a heterogeneous model is built with the config of layer i."""
    signature = inspect.signature(cls.__init__)
    index_name = next(name for name in _INDEX_NAMES if name in signature.parameters)

    def build(layer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(layer, *args, **kwargs)
        config = bound.arguments["config"]
        if not _is_heterogeneous(config) or _transformers_builds(config.model_type):
            original(layer, *args, **kwargs)
            return
        layer_idx = bound.arguments.get(index_name)
        if layer_idx is None:
            raise ValueError(f"{cls.__name__} was built without `{index_name}`: its per_layer_config is unknown.")
        bound.arguments["config"] = layer_config(config, layer_idx)
        original(*bound.args, **bound.kwargs)
        skip_branches(layer, config, layer_idx)

    _wrap_method(cls, "__init__", build)


def _check_layers_were_built(model: Any) -> None:
    from transformers.modeling_utils import PreTrainedModel

    layers = (module for module in model.modules() if not isinstance(module, PreTrainedModel))
    if not any(hasattr(type(module).__init__, _MARK) for module in layers):
        raise ValueError(f"{type(model).__name__}: per_layer_config reached no layer; this family is not supported.")


# --- the config of one layer ------------------------------------------------------------------------------------------


def _of_the_model(name: str) -> property:
    return property(
        lambda config: getattr(config._model_config, name),
        lambda config, value: setattr(config._model_config, name, value),
    )


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
        config: heterogeneous config of the model. The result refers to it: a later change of its attention or experts
            implementation is seen by the layer.
        layer_idx: index of the layer, 0 <= `layer_idx` < `num_hidden_layers`.

    Returns:
        A copy of `config` with the layer's own values: not heterogeneous, an instance of the same class.
    """
    copy = config.per_layer_config[layer_idx]
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        copy.__dict__.pop(name, None)
    copy.__dict__["_model_config"] = config
    copy.__class__ = _layer_config_class(copy.__class__)
    return copy


# --- skipped branches -------------------------------------------------------------------------------------------------


class ZeroBranch(nn.Module):
    """Stands in for a removed attention or MLP module: no parameters, adds nothing to the residual stream."""

    def __init__(self, replaced: nn.Module, outputs: Outputs, reads_cache_length: bool) -> None:
        super().__init__()
        self.argument_names = tuple(inspect.signature(type(replaced).forward).parameters)[1:]
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
    from transformers.cache_utils import Cache, DummyLayer

    for cache in arguments.values():
        if isinstance(cache, Cache) and not (cache.layers and isinstance(cache.layers[0], DummyLayer)):
            raise ValueError(
                f"Layer 0 of this model has no attention, but the {type(cache).__name__} it was given expects one and "
                "would report a length of 0. Make the cache with `config=model.config`, or let the model make it."
            )


def skip_branches(layer: nn.Module, config: Any, layer_idx: int) -> None:
    """Replace the branches that `config.per_layer_config[layer_idx].skip` names. Modifies `layer` in place.

    `pruning_config["surgery"]["branches"]` says which module a branch is and what it returns: "zeros" (shaped as the
    hidden states), null, or a list of these (a tuple). Without that record the usual names and outputs are taken.

    Raises:
        ValueError: a branch is unknown, or the layer has no such module.
    """
    recorded = _surgery(config).get("branches", {})
    for branch in config.per_layer_config[layer_idx].skip:
        names: Sequence[str]
        if branch in recorded:
            names, outputs = [recorded[branch]["module"]], recorded[branch]["outputs"]
        elif branch in _DEFAULT_BRANCHES:
            names, outputs = _DEFAULT_BRANCHES[branch]
        else:
            known = sorted({*_DEFAULT_BRANCHES, *recorded})
            raise ValueError(f"Layer {layer_idx} skips {branch!r}; this file knows {known}.")
        path = next((name for name in names if _submodule(layer, name) is not None), None)
        if path is None:
            raise ValueError(
                f"Layer {layer_idx} skips {branch!r}, but {type(layer).__name__} has no module {' or '.join(names)}. "
                f"Name it in pruning_config['surgery']['branches']."
            )
        parent, _, name = path.rpartition(".")
        replaced = layer.get_submodule(path)
        reads_cache_length = branch == "attention" and layer_idx == 0
        setattr(layer.get_submodule(parent), name, ZeroBranch(replaced, outputs, reads_cache_length))


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
                    types[layer_idx], kwargs[layer_idx] = "dummy", {}
        return types, kwargs

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and vars(module).get("get_layer_types_and_kwargs") is original:
            module.get_layer_types_and_kwargs = get_layer_types_and_kwargs  # type: ignore[attr-defined]


# --- surgery: shapes that no config attribute expresses ---------------------------------------------------------------


@dataclass(frozen=True)
class SelectInput:
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


def _surgery(config: Any) -> dict[str, Any]:
    pruning_config = getattr(config, "pruning_config", None)
    return (pruning_config.get("surgery") or {}) if isinstance(pruning_config, dict) else {}


def apply_surgery(model: Any) -> None:
    """Give modules the shapes and attributes in `model.config.pruning_config["surgery"]`. Modifies `model` in place.

    Paths are those of the model with a language modelling head; in a base model the `base_model_prefix` is dropped, and
    modules that a model does not have (`lm_head` in a classifier) are left out. Shapes are absolute: applying it twice
    changes nothing. A tensor whose shape changes loses its values.

    Raises:
        ValueError: the model has a base model, but that has no module of a recorded path.
    """
    prefix = f"{model.base_model_prefix}."
    has_base = getattr(model, model.base_model_prefix, None) is not None
    for path, record in _surgery(model.config).get("modules", {}).items():
        module = _submodule(model, path if has_base else path.removeprefix(prefix))
        if module is None:
            if has_base and path.startswith(prefix):
                raise ValueError(
                    f"pruning_config['surgery'] names {path!r}: {type(model).__name__} has no such module."
                )
            continue
        for name, shape in record.get("shapes", {}).items():
            _resize(module, name, shape)
        for name, value in record.get("attributes", {}).items():
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, value)
        for name, selection in record.get("select_inputs", {}).items():
            _select_input(module, name, selection)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _resize(module: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Replace a parameter or buffer by an empty one of `shape`, and correct the sizes its module remembers."""
    owner_path, _, tensor_name = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    tensor = getattr(owner, tensor_name)
    if tuple(tensor.shape) == tuple(shape):
        return
    empty = torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    setattr(owner, tensor_name, empty)
    owner._is_hf_initialized = False  # type: ignore[assignment]
    if tensor_name == "weight":
        _remember_sizes(owner, empty.shape)


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


def _select_input(module: nn.Module, argument: str, selection: Mapping[str, Any]) -> None:
    position = list(inspect.signature(type(module).forward).parameters).index(argument) - 1
    hook = SelectInput(
        argument,
        position,
        selection["dim"],
        tuple(selection["sizes"]),
        selection["factor"],
        tuple(selection["kept"]),
    )
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(cast("Any", hook), with_kwargs=True)
