"""Check a checkpoint without loading its weights: are all files there and whole, and do they agree with one another?"""

from __future__ import annotations

import json
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.checkpoint.files import CODE_NAME, PLAN_NAME, agrees, read_json, read_plan
from hf_prune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

_AGAIN = "Save or download the checkpoint again."
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format allows no more


def verify_checkpoint(directory: str | Path) -> None:
    """Check that `directory` holds a complete checkpoint whose files agree. Reads JSON and safetensors headers only.

    Every JSON file must parse, every safetensors file named must be there and have its full length, the tensors' names
    and shapes must be those that transformers expects for config.json, the plan must give the widths that config.json
    records, and code that config.json points to must be there.

    Args:
        directory: local checkpoint, pruned or not.

    Raises:
        CheckpointError: something is missing, damaged or contradictory; the message names the file and what to do.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json. Pass the directory of a checkpoint.")
    for path in sorted(directory.glob("*.json")):
        if path.name not in ("config.json", PLAN_NAME, "vocab.json", "added_tokens.json"):
            read_json(path)
    config = _config(directory)
    shapes = _all_shapes(directory)
    _check_plan(directory, config)
    _check_shapes(directory, config, shapes)


def _config(directory: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    path = directory / "config.json"
    references = read_json(path).get("auto_map") or {}
    local = [r for r in references.values() if isinstance(r, str) and "--" not in r]
    for name in sorted({f"{reference.split('.')[0]}.py" for reference in local}):
        if not (directory / name).is_file():
            hint = "Save the model again with hf_prune imported." if name == CODE_NAME else _AGAIN
            raise CheckpointError(f"{path} points to {name}, which is missing. {hint}")
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a config that transformers can read: {error}. {_AGAIN}") from error


def _check_plan(directory: Path, config: PreTrainedConfig) -> None:
    path = directory / PLAN_NAME
    if path.exists() and not agrees(read_plan(path), config):
        raise CheckpointError(
            f"{path} does not give the widths recorded in config.json (pruning_config): the two are from different "
            "models. Delete the plan if the model is the right one, else save or download the checkpoint again."
        )


def _all_shapes(directory: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in the files that transformers would load."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return _shapes(single)
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {single.name} nor {index.name}. {_AGAIN}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. {_AGAIN}")
    found: dict[str, list[int]] = {}
    for name in sorted(set(weight_map.values())):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{index.name} names {name}, which is missing from {directory}. {_AGAIN}")
        shapes = _shapes(path)
        for tensor in (tensor for tensor, file in weight_map.items() if file == name):
            if tensor not in shapes:
                raise CheckpointError(f"{index.name} places {tensor} in {path}, which does not hold it. {_AGAIN}")
            found[tensor] = shapes[tensor]
    return found


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes in one safetensors file: 8 bytes header length, JSON header, data (https://github.com/huggingface/safetensors)."""
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > min(_HEADER_LIMIT, length):
                raise ValueError(f"header of {header_length:,} bytes")
            header: dict[str, Any] = json.loads(file.read(header_length))
        header.pop("__metadata__", None)
        end = 8 + header_length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}). {_AGAIN}") from error
    if end != length:
        raise CheckpointError(f"{path} has {length:,} bytes, its header says {end:,}: it was cut off. {_AGAIN}")
    return shapes


def _check_shapes(directory: Path, config: PreTrainedConfig, shapes: dict[str, list[int]]) -> None:
    """Let transformers' own loader match names and shapes, with tensors on the meta device, which have no data."""
    import transformers

    from hf_prune.checkpoint import per_layer

    per_layer.install()
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise CheckpointError(
            f"{directory / 'config.json'} names the class {name!r}, which transformers {transformers.__version__} does "
            "not have. Install the version named in config.json."
        )
    tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
    try:
        with _quiet():
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: the model of config.json cannot be built: {error}") from error
    problems = [f"{n} has shape {list(found)}, expected {list(wanted)}" for n, found, wanted in info["mismatched_keys"]]
    problems += [f"{n} is missing" for n in info["missing_keys"]]
    problems += [f"{n} is not part of the model" for n in info["unexpected_keys"]]
    if problems:
        raise CheckpointError(
            f"{directory}: the weights do not fit config.json: {'; '.join(sorted(problems)[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "config.json and the weights are from different models: save or download both again."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading report of transformers, which the error here replaces."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
