"""Where the weights of a model are: all in memory, or on disk and one decoder layer at a time in memory.

A model on disk is one that `from_pretrained` offloaded: its layers have meta parameters and accelerate's hooks. So
every family that transformers loads works, whatever its tensors are called in the files.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SAMPLE = 256
"""Places of a tensor or file that a fingerprint looks at."""


def is_on_disk(model: nn.Module) -> bool:
    """Whether weights of `model` are offloaded (accelerate) and have to be loaded before a layer can run."""
    return any(parameter.is_meta for parameter in model.parameters())


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are loaded when it runs."""
    return bool(_offload_hooks(module))


def input_device(module: nn.Module) -> torch.device:
    """Where a model or layer expects its input: where its first weight in memory is, else where its hooks put it."""
    found = next((weight.device for weight in module.parameters() if not weight.is_meta), None)
    if found is not None:
        return found
    hooks = (hook for inner in module.modules() for hook in _offload_hooks(inner))
    return torch.device(next((hook.execution_device for hook in hooks), None) or "cpu")


def read_weight(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name, without gradient; read from disk if that is where it is.

    Args:
        model: in memory or on disk.
        name: as in `named_parameters(remove_duplicate=False)`.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor = getattr(module, leaf)
    if not found.is_meta:
        return found.detach()
    from transformers.integrations.accelerate import load_offloaded_parameter

    loaded: Tensor = load_offloaded_parameter(model, name)
    return loaded.detach()


@contextlib.contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Within, all weights of `module` are in memory, on its device: loaded once, however often it runs."""
    hooked = [(inner, hook) for inner in module.modules() for hook in _offload_hooks(inner)]
    done: list[tuple[nn.Module, AlignDevicesHook, Any]] = []
    try:
        for inner, hook in hooked:
            hook.pre_forward(inner)
            # accelerate's own forward would load the weights again, and unload them
            done.append((inner, hook, inner.__dict__.get("forward")))
            inner.forward = inner._old_forward  # type: ignore[assignment]
            inner._hf_hook = None  # type: ignore[assignment]
        yield
    finally:
        for inner, hook, forward in done:
            inner.forward = forward
            inner._hf_hook = hook  # type: ignore[assignment]
            for parameter in inner.parameters(recurse=False):
                parameter.grad = None
            hook.post_forward(inner, None)


def _offload_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "hooks", [hook])
    return [one for one in found if isinstance(one, AlignDevicesHook) and one.offload]


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Temporary evaluation mode; each module gets its own flag back."""
    flags = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Temporary evaluation mode without gradients."""
    with evaluating(*models), torch.no_grad():
        yield


@contextlib.contextmanager
def eager_experts(*models: nn.Module) -> Iterator[None]:
    """Temporarily use the eager expert loop: the fused ones gather copies of the weights."""
    with contextlib.ExitStack() as stack:
        for model in models:
            before = getattr(getattr(model, "config", None), "_experts_implementation", None)
            change: Any = getattr(model, "set_experts_implementation", None)
            if before is not None and change is not None:
                change("eager")
                stack.callback(change, before)
        yield


def device_map_of(model: nn.Module, layer_paths: Sequence[str], device: str) -> dict[str, str]:
    """A `device_map` that leaves decoder layers on disk and puts all other modules on `device`."""
    found = dict.fromkeys(layer_paths, "disk")
    for path, module in model.named_modules():
        inside = any(path == layer or path.startswith(f"{layer}.") for layer in layer_paths)
        around = any(layer.startswith(f"{path}.") for layer in layer_paths) or not path
        if inside:
            continue
        if around:
            own = [*module._parameters, *module._buffers]
            found |= {f"{path}.{name}" if path else name: device for name in own}
        elif not any(path.startswith(f"{known}.") for known in found):
            found[path] = device
    return found


def free_memory(device: str | None) -> int:
    """Bytes that are free where layers run."""
    if device is not None and torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def to_bytes(size: int | str) -> int:
    """A number of bytes, or a text such as `"5GB"`, as a number."""
    from accelerate.utils import convert_file_size_to_int

    return size if isinstance(size, int) else int(convert_file_size_to_int(size))


def fingerprint(model: nn.Module) -> str:
    """A digest that tells models apart: names, shapes, and a sample of the values in memory and in the files."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLE)].cpu().float()
        found.update(sample.numpy().tobytes())
    files: dict[str, None] = {}
    for module in model.modules():
        for hook in _offload_hooks(module):
            index = getattr(getattr(hook.weights_map, "dataset", hook.weights_map), "index", {})
            files |= {entry["safetensors_file"]: None for entry in index.values() if "safetensors_file" in entry}
    for file in sorted(files):
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            found.update(f"{Path(file).name} {size}".encode())
            for place in range(0, size, max(1, size // SAMPLE)):
                opened.seek(place)
                found.update(opened.read(64))
    return found.hexdigest()
