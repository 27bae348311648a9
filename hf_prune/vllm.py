"""Plugin of vLLM (entry point `vllm.general_plugins`): its Transformers backend builds layers that differ.

That backend reads `per_layer_config` itself. What is added: the builder of such layers, in every process; the choice of
that backend, since vLLM's own classes build equal layers; and for removed attention a stand-in, since the backend makes
an attention object, and a cache, for every layer. Layers with other numbers of experts are refused.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_MARK = "_hf_prune"


def register() -> None:
    """Called by vLLM in each of its processes, often twice. Idempotent."""
    from hf_prune.format import per_layer

    per_layer.install()
    per_layer.STAND_INS["vllm"] = idle_attention
    registry = import_module("vllm.model_executor.models.registry")._ModelRegistry
    import_module("vllm.config")  # before the next: they import one another
    convertor = import_module("vllm.transformers_utils.model_arch_config_convertor").ModelArchConfigConvertorBase
    for owner, name, wrapper in (
        (registry, "inspect_model_cls", _by_transformers),
        (registry, "resolve_model_cls", _by_transformers),
        (convertor, "get_per_layer_hf_configs", _with_small_caches),
    ):
        original = getattr(owner, name)
        if not hasattr(original, _MARK):
            wrapped = functools.wraps(original)(wrapper(original))
            setattr(wrapped, _MARK, True)
            setattr(owner, name, wrapped)


def idle_attention(replaced: nn.Module, outputs: Any, reads_cache_length: bool) -> nn.Module:
    """A stand-in for removed attention that vLLM takes for the class that it replaces; computes nothing.

    vLLM looks for the call of the attention interface in the source of `forward`, and finds that of the class.
    """
    from hf_prune.format.per_layer import ZeroBranch

    class IdleAttention(ZeroBranch):
        @functools.wraps(type(replaced).forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return ZeroBranch.forward(self, *args, **kwargs)

    module: Any = IdleAttention(replaced, outputs, reads_cache_length)
    module.layer_idx, module.config = replaced.layer_idx, replaced.config
    return module  # type: ignore[no-any-return]


def _by_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(self: Any, architectures: Any, model_config: Any) -> Any:
        from hf_prune.format.building import needs_plugin

        if needs_plugin(model_config.hf_config):
            if model_config.model_impl not in ("auto", "transformers"):
                raise CheckpointError(
                    f"the layers of this pruned {architectures} differ, and model_impl={model_config.model_impl!r} "
                    "builds equal ones: leave it at 'auto', or take 'transformers'."
                )
            model_config.model_impl = "transformers"
            widths = (getattr(model_config.hf_config, "pruning_config", None) or {}).get("widths", {})
            numbers = {n for name, n in widths.items() if n and name.split(".")[2:] == ["experts"]}
            if len(numbers) > 1:
                raise CheckpointError(
                    f"the layers of this {architectures} have {sorted(numbers)} experts, and vLLM makes equally many "
                    "in each. Prune with the target 'vllm'."
                )
        return original(self, architectures, model_config)

    return chosen


def _with_small_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    def configs(self: Any) -> Any:
        """Layers without attention get a cache of one head, the smallest that vLLM makes."""
        found = original(self)
        for _, text_config in found or ():
            if "attention" in (getattr(text_config, "skip", None) or ()) and hasattr(
                text_config, "num_key_value_heads"
            ):
                text_config.num_key_value_heads = 1
        return found

    return configs
