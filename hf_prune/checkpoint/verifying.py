"""Check a checkpoint without loading its weights: are all files there and whole, and do they agree with one another?"""

from __future__ import annotations

import functools
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from hf_prune.checkpoint.files import CODE_NAME, PLAN_NAME, agrees, read_json, read_plan
from hf_prune.errors import CheckpointError, HFPruneError
from hf_prune.format.building import auto_class
from hf_prune.format.per_layer import DIGESTS, check_loaded, check_saved
from hf_prune.reading import check_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.plan import PruningPlan

_AGAIN = "Save or download the checkpoint again."
_OF_THE_HUB = ("cache_dir", "local_files_only", "token", "revision", "proxies", "subfolder")
OF_CONFIG = (*_OF_THE_HUB, "trust_remote_code", "gguf_file")
"""Arguments of `from_pretrained` that say where a config is."""


def verify_checkpoint(directory: str | Path) -> None:
    """Check that `directory` holds a complete checkpoint whose files agree. Reads JSON and safetensors headers only.

    Every JSON file must parse, every safetensors file named must be there and have its full length, the tensors' names
    and shapes must be those that transformers expects for config.json, the plan must give the widths that config.json
    records, code that config.json points to must be there, and the files must be those that were saved together.

    Args:
        directory: local checkpoint, pruned or not.

    Raises:
        CheckpointError: something is missing, damaged or contradictory; the message names the file and what to do.
    """
    directory = Path(directory)
    values = _read_config(directory)
    for path in sorted(directory.glob("*.json")):
        if path.name not in ("config.json", PLAN_NAME, "vocab.json", "added_tokens.json"):
            read_json(path)
    _verify_model(directory, values)


def load_verified(source: str, **arguments: Any) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """`from_pretrained` of the model's auto class, dense or pruned, with all its tensors or not at all.

    Args:
        source: directory or Hub id.
        **arguments: as `from_pretrained` takes them; the code of a checkpoint runs only with `trust_remote_code`, and
            nobody is asked.

    Raises:
        CheckpointError: there is no such model, it is damaged, or a tensor is missing.
    """
    from transformers import AutoConfig

    check_source(source, arguments)
    with_info = arguments.pop("output_loading_info", False)
    arguments.setdefault("trust_remote_code", False)
    where = {name: arguments[name] for name in OF_CONFIG if name in arguments}
    try:
        config = arguments.get("config") or AutoConfig.from_pretrained(source, **where)
        model, info = auto_class(config).from_pretrained(source, output_loading_info=True, **arguments)
        check_loaded(model, info, with_head=True)
    except (HFPruneError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and safetensors refuse in any way they like
        raise not_loaded(source, "model", error) from error
    return (model, info) if with_info else model


def not_loaded(name: str, what: str, error: Exception) -> CheckpointError:
    """The error that says that `what` could not be loaded from `name`."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        return CheckpointError(f"no directory at {name!r} to load the {what} from: check the path.")
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    help_ = "Pass the directory of a causal LM, or its id on the Hub; check the spelling and the connection."
    if "trust_remote_code" in str(error):
        first = "its classes are in files that come with it, which run as any program does."
        help_ = "Read them, and if you trust them pass trust_remote_code=True (--trust-remote-code)."
    return CheckpointError(f"no {what} could be loaded from {name!r}: {first} {help_}")


def check_source(source: str | Path, arguments: Mapping[str, Any]) -> None:
    """Check the files that `from_pretrained(source, **arguments)` would read, if that is a directory.

    Raises:
        CheckpointError: one of them is a pipe or a device, or config.json is no JSON.
    """
    directory = Path(source, arguments.get("subfolder") or "")
    check_files(directory)
    if (directory / "config.json").exists():
        read_json(directory / "config.json")


def install_verification() -> None:
    """Have `from_pretrained` of every model check a pruned checkpoint before it is loaded: see `verify_checkpoint`.

    Idempotent. Imports `transformers.modeling_utils`.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = vars(PreTrainedModel)["from_pretrained"].__func__
    if hasattr(original, "_hf_prune_verified"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        if source is not None and kwargs.get("gguf_file") is None:
            _verify_source(str(source), kwargs)
        return original(cls, source, *args, **kwargs)

    from_pretrained._hf_prune_verified = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _verify_source(source: str, arguments: Mapping[str, Any]) -> None:
    """Check what can be checked before loading: all files of a local directory; config.json and the plan on the Hub."""
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    config = arguments.get("config")
    if isinstance(config, PreTrainedConfig) and getattr(config, "pruning_config", None) is None:
        return
    directory = Path(source, arguments.get("subfolder") or "")
    if directory.is_dir():
        if (directory / "config.json").is_file() and "pruning_config" in (values := _read_config(directory)):
            _verify_model(directory, values, shapes=arguments.get("variant") is None)
        return
    given = {key: arguments[key] for key in _OF_THE_HUB if arguments.get(key) is not None}
    given.setdefault("revision", getattr(config, "_commit_hash", None))

    def cached(name: str) -> Path | None:
        found = cached_file(
            source,
            name,
            **given,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    path = cached("config.json")
    if path is not None and "pruning_config" in (values := read_json(path)):
        plan = cached(PLAN_NAME)
        _check_together(values, path, [] if plan is None else [plan])
        if DIGESTS not in values and isinstance(config, PreTrainedConfig):
            _check_that_it_runs(source, config)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} holds no config.json. Pass the directory of a checkpoint.")
    check_files(directory)
    return read_json(directory / "config.json")


def _verify_model(directory: Path, values: Mapping[str, Any], *, shapes: bool = True) -> None:
    """Everything but the tokenizer; the shapes only where transformers has the class and stores tensors as they are."""
    path = directory / "config.json"
    references = values.get("auto_map")
    local = [r for r in (references.values() if isinstance(references, dict) else ()) if "--" not in str(r)]
    for name in sorted({f"{str(reference).split('.')[0]}.py" for reference in local}):
        if not (directory / name).is_file():
            hint = "Save the model again with hf_prune imported." if name == CODE_NAME else _AGAIN
            raise CheckpointError(f"{path} points to {name}, which is missing. {hint}")
    _check_together(values, path, [p for p in (directory / PLAN_NAME, directory / CODE_NAME) if p.exists()])
    own_code = any(str(reference).split(".")[0] != Path(CODE_NAME).stem for reference in local)
    if shapes and not own_code and values.get("quantization_config") is None:
        found, config = _all_shapes(directory), _config(directory)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if num_layers > len(found):  # each has a tensor at least; found out before so many are built
            raise CheckpointError(f"{path} asks for {num_layers} layers, found {len(found)} tensors. {_AGAIN}")
        _check_shapes(directory, config, found)
        if DIGESTS not in values:
            _check_that_it_runs(directory, config)


def _config(directory: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except HFPruneError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is not a config that transformers can read: {error}. {_AGAIN}"
        ) from error


def _check_that_it_runs(source: str | Path, config: PreTrainedConfig) -> None:
    """Run the model without memory: what a branch returns and how inputs are cut shows only then.

    For checkpoints from before there were digests: nothing else says that these records are as they were written.
    """
    from hf_prune.format.building import build_empty
    from hf_prune.structure.forward import TraceError
    from hf_prune.structure.inference import traceable_config
    from hf_prune.structure.tracing import trace

    if not (getattr(config, "pruning_config", None) or {}).get("surgery"):
        return
    try:
        trace(build_empty(traceable_config(config)))
    except (HFPruneError, TraceError) as error:
        raise CheckpointError(f"{source}: the model of config.json does not run: {error}. {_AGAIN}") from error


def _check_together(values: Mapping[str, Any], config_path: Path, companions: list[Path]) -> None:
    """Check that config.json keeps to its schema, and that plan and code are those that were saved with it."""
    check_saved(values)
    for path in companions:
        expected = (values.get(DIGESTS) or {}).get(path.name)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name == PLAN_NAME:
            _check_plan(path, read_plan(path), values)
        if expected is not None and found != expected:
            raise CheckpointError(
                f"{path}: its SHA-256 is not the one that {config_path.name} records: it was changed after the model "
                f"was saved. {_AGAIN}"
            )


def _check_plan(path: Path, plan: PruningPlan, values: Mapping[str, Any]) -> None:
    section: Mapping[str, Any] = values.get("pruning_config") or {}
    if not agrees(plan, section):
        raise CheckpointError(
            f"{path} does not give the widths recorded in config.json (pruning_config): the two are from different "
            "models. Delete the plan if the model is the right one, else save or download the checkpoint again."
        )
    stay = plan.kept_indices.get("layers", range(plan.num_units.get("layers", 0)))
    for module, record in ((section.get("surgery") or {}).get("modules") or {}).items():
        index = next((int(part) for part in module.split(".") if part.isdecimal()), len(stay))
        for name, selection in record.get("select_inputs", {}).items():
            if index < len(stay) and not _is_of_the_plan(selection, f"layers.{stay[index]}.", plan):
                raise CheckpointError(
                    f"{path} does not keep the units that config.json selects for {module}.{name}: found "
                    f"{selection['kept']} there. {_AGAIN}"
                )


def _is_of_the_plan(selection: Mapping[str, Any], prefix: str, plan: PruningPlan) -> bool:
    """Whether an input is cut to the units of one axis of the layer; of a model pruned twice, to as many."""
    widths = plan.widths
    for axis, num_units in plan.num_units.items():
        if axis.startswith(prefix):
            once = selection["sizes"][selection["factor"]] == num_units
            kept = list(plan.kept_indices.get(axis, range(num_units)))
            if list(selection["kept"]) == kept or (not once and len(selection["kept"]) == widths[axis]):
                return True
    return False


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
    if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise CheckpointError(f"{index} names files that are not in {directory}. {_AGAIN}")
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
    """Shapes in one safetensors file, which must have the length that its header says."""
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}), or it was cut off. {_AGAIN}"
        ) from error


def _check_shapes(directory: Path, config: PreTrainedConfig, shapes: dict[str, list[int]]) -> None:
    """Let transformers' own loader match names and shapes, with tensors on the meta device, which have no data."""
    import transformers

    from hf_prune.format import per_layer
    from hf_prune.format.building import unsharded

    per_layer.install()
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        raise CheckpointError(
            f"{directory / 'config.json'} names the class {name!r}, which transformers {transformers.__version__} does "
            "not have. Install the version named in config.json."
        )
    try:
        tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
        with _quiet(), unsharded():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        check_loaded(model, info)
    except HFPruneError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{directory}: the model of config.json cannot be built: {error}. {_AGAIN}") from error


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
