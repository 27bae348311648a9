"""Prune a checkpoint into a new one, layer by layer: the model is never in memory as a whole.

For methods that need weights only (`magnitude`, `random`, `prunenet`). The result is that of pruning in memory and
saving, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.allocation import allocate
from hf_prune.config import PruneNetConfig, PruningConfig, selected_axes
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.methods import check_scores
from hf_prune.methods.baselines import magnitude_scores, random_scores
from hf_prune.methods.prunenet import prunenet_scores
from hf_prune.pipeline import base_model_of
from hf_prune.structure.building import build_empty, fresh_config
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.configuring import pruned_config
from hf_prune.surgery.slicing import missing_names, pruned_name, slice_tensor

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

METHODS = ("random", "magnitude", "prunenet")
MAX_SHARD_BYTES = 250_000_000
INDEX_NAME = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a safetensors checkpoint, read one at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype | None) -> None:
        """Read the names and shapes in the files' headers.

        Args:
            directory: holds `model.safetensors`, or shards and their index.
            dtype: what floating point tensors become, as when a model is loaded; `None`: the first one's own.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtype = dtype
        for path in _weight_files(directory):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        self.files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}. Download or save it again.") from error
        if self.dtype is None:
            found = (self.read(name).dtype for name in self.files)
            self.dtype = next((dtype for dtype in found if dtype.is_floating_point), torch.float32)

    def read(self, name: str) -> Tensor:
        """One tensor. The file is opened for it alone, so that what was read before need not stay in memory."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if self.dtype is not None and tensor.is_floating_point() and tensor.dtype != self.dtype:
            return tensor.to(self.dtype)
        return tensor

    def check(self, structure: Structure) -> None:
        """Raise `CheckpointError` unless the tensors are those of `structure`."""
        unknown = sorted(set(self.files) - set(structure.layouts))
        missing = missing_names(self.files, structure)
        wrong = [name for name in self.files if name not in unknown and self.shapes[name] != structure.shape(name)]
        if unknown or missing or wrong:
            raise CheckpointError(
                f"the tensors of this checkpoint are not those of a {structure.model_type} model: unknown "
                f"{unknown[:2]}, missing {missing[:2]}, of another shape {wrong[:2]}. Some models are saved under "
                "other names than they have in memory; prune those without streaming."
            )


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / INDEX_NAME, directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}. Download or save the checkpoint again.") from error
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    raise CheckpointError(
        f"no safetensors checkpoint was found in {directory}: expected a local directory with model.safetensors, or "
        f"shards and {INDEX_NAME}. Streaming reads no other format; download the model first."
    )


def stream_prune(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    config: PruningConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[PruningPlan, Structure]:
    """Prune the checkpoint in `source` into `output`, holding about one layer and one shard in memory.

    Args:
        source: local directory with `config.json` and safetensors weights.
        output: directory of the pruned checkpoint, replaced in one step or not at all; `None`: only plan.
        config: method `random`, `magnitude` or `prunenet`, in one step, without repair.
        tokenizer: saved beside the model if given.
        max_shard_bytes: size of the files written, 1 or more; a larger tensor gets a file of its own.

    Returns:
        The plan and the structure of the dense model.

    Raises:
        ConfigError: the configuration asks for what needs the whole model.
        CheckpointError: the checkpoint is missing, damaged, or has tensors of other names than the model.
        HFPruneError: what `prune` and `save_pruned` refuse; nothing is written then.
    """
    from hf_prune.checkpoint.saving import save_pruned
    from hf_prune.loading import load_config

    directory = Path(source)
    _check_config(config)
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes: found {max_shard_bytes}, expected 1 or more.")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; streaming reads local checkpoints: download it first.")
    dense_config: Any = load_config(str(directory))
    structure = infer_structure(dense_config)
    checkpoint = Checkpoint(directory, _dtype_of(dense_config))
    checkpoint.check(structure)
    model = _shell(dense_config)
    scores = _scores(model, structure, config, checkpoint)
    plan = allocate(scores, structure, config, base_model_name_or_path=base_model_of(model))
    if output is not None:
        pruned = _pruned_shell(model, structure, plan, directory, checkpoint)
        write = partial(_write, pruned, structure, plan, checkpoint, max_shard_bytes)
        pruned.save_pretrained = write  # type: ignore[method-assign]  # save_pruned writes weights through it
        save_pruned(pruned, Path(output), plan=plan, tokenizer=tokenizer)
    return plan, structure


def _check_config(config: PruningConfig) -> None:
    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{what} needs the whole model; prune without streaming.")

    if config.method not in METHODS:
        raise ConfigError(
            f"method {config.method!r} cannot stream; expected one of {METHODS}, which need weights only."
        )
    if config.num_steps > 1:
        raise refuse(f"num_steps={config.num_steps}")
    if config.budget == "latency" or config.repair != "none":
        raise refuse("the budget 'latency'" if config.budget == "latency" else f"repair={config.repair!r}")
    if config.allocation_name not in ("uniform", "global", "mapping"):
        raise refuse(f"allocation={config.allocation!r}")
    if config.method == "magnitude" and not set(config.axes) <= {"mlp", "attention"}:
        raise refuse(f"magnitude of the axes {config.axes}")


def _dtype_of(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _shell(config: Any) -> PreTrainedModel:
    """The model with buffers but without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from hf_prune.checkpoint import per_layer

    per_layer.install()
    own = fresh_config(config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(own)
    model.config._name_or_path = config._name_or_path
    return model.eval()


def _scores(
    model: PreTrainedModel, structure: Structure, config: PruningConfig, checkpoint: Checkpoint
) -> dict[str, Tensor]:
    if config.method == "random":
        return check_scores(random_scores(model, structure, config), structure, config)
    if isinstance(config, PruneNetConfig):
        with _weights_on_demand(model, structure, config, checkpoint):
            return check_scores(prunenet_scores(model, structure, config, read=checkpoint.read), structure, config)
    found: dict[str, Tensor] = {}
    layers = sorted({axis.layer for axis in selected_axes(structure, config) if axis.layer is not None})
    for layer in tqdm(layers, desc="scoring", unit="layer", leave=False):
        module = model.get_submodule(structure.layer_paths[layer])
        with _loaded(module, structure.layer_paths[layer], checkpoint):
            found |= magnitude_scores(model, structure, dataclasses.replace(config, layers=(layer,)))
    return check_scores(found, structure, config)


@contextlib.contextmanager
def _loaded(module: nn.Module, path: str, checkpoint: Checkpoint) -> Iterator[None]:
    """The weights of a module, for a while."""
    _load(module, path, checkpoint)
    try:
        yield
    finally:
        _unload(module)


def _load(module: nn.Module, path: str, checkpoint: Checkpoint) -> None:
    for inner, owner in module.named_modules():
        prefix = ".".join(part for part in (path, inner) if part)
        for name, old in list(owner._parameters.items()):
            if old is not None and f"{prefix}.{name}" in checkpoint.files:
                owner._parameters[name] = nn.Parameter(checkpoint.read(f"{prefix}.{name}"), requires_grad=False)
        for name in list(owner._buffers):
            if f"{prefix}.{name}" in checkpoint.files:
                owner._buffers[name] = checkpoint.read(f"{prefix}.{name}")


def _unload(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextlib.contextmanager
def _weights_on_demand(
    model: PreTrainedModel, structure: Structure, config: PruneNetConfig, checkpoint: Checkpoint
) -> Iterator[None]:
    """Let the model run: a layer gets its weights before its forward pass and loses them after it."""
    if config.layer_weight != "update":
        yield
        return
    layers = {path: model.get_submodule(path) for path in structure.layer_paths}
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    outside = [(path, m) for path, m in model.named_modules() if id(m) not in inside and not list(m.children())]
    head = model.get_output_embeddings()  # type: ignore[operator]
    with contextlib.ExitStack() as stack:
        for path, module in outside:
            if module is not head:  # the updates of layers do not need it
                stack.enter_context(_loaded(module, path, checkpoint))
        for path, layer in layers.items():

            def load(module: nn.Module, args: Any, path: str = path) -> None:
                _load(module, path, checkpoint)

            def unload(module: nn.Module, args: Any, output: Any) -> None:
                _unload(module)

            stack.callback(layer.register_forward_pre_hook(load).remove)
            stack.callback(layer.register_forward_hook(unload, always_call=True).remove)
        yield


def _pruned_shell(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, directory: Path, checkpoint: Checkpoint
) -> PreTrainedModel:
    """The pruned model without weights, with the config and generation config that `apply_plan` would give it."""
    from transformers import GenerationConfig

    config = pruned_config(model.config, structure, plan, type(model))
    pruned = build_empty(fresh_config(config), type(model)).to(checkpoint.dtype)
    if (directory / "generation_config.json").is_file():
        pruned.generation_config = GenerationConfig.from_pretrained(directory)
    pruned.config._name_or_path = model.config._name_or_path
    pruned.config.dtype = checkpoint.dtype
    pruned._pruning_plan = plan  # type: ignore[assignment]
    return pruned


def _write(
    pruned: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    checkpoint: Checkpoint,
    max_shard_bytes: int,
    directory: Path,
    **_: Any,
) -> None:
    """Configs and companion files as `save_pretrained` writes them, then the weights, shard by shard."""
    type(pruned).save_pretrained(pruned, directory, state_dict={})
    for path in directory.glob("*.safetensors"):
        path.unlink()
    shards = _shards(structure, plan, checkpoint, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = count = 0
    for number, names in enumerate(tqdm(shards, desc="writing", unit="shard", leave=False), start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            new: slice_tensor(name, checkpoint.read(name), structure, plan).contiguous() for name, new in names.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.numel() for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_parameters": count, "total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(
    structure: Structure, plan: PruningPlan, checkpoint: Checkpoint, max_shard_bytes: int
) -> list[dict[str, str]]:
    """Dense name → pruned name of each file to write, in the order of the model; a tied tensor goes once."""
    widths = {name: len(kept) for name, kept in plan.kept_indices.items()}
    shards: list[dict[str, str]] = [{}]
    size = 0
    for name in structure.layouts:
        new = pruned_name(name, structure, plan)
        twin = structure.aliases.get(name)
        if new is None or name not in checkpoint.files or twin in checkpoint.files:
            continue
        assert checkpoint.dtype is not None
        own = structure.numel(name, widths) * checkpoint.dtype.itemsize
        if shards[-1] and size + own > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = new
        size += own
    return shards


__all__ = ["Checkpoint", "stream_prune"]
