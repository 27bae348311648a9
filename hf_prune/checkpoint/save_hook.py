"""Make transformers' own `save_pretrained` write complete pruned checkpoints."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.files import CODE_NAME, PLAN_NAME, agrees, read_json, read_plan
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.format.building import needs_plugin
from hf_prune.format.per_layer import DIGESTS, config_digest
from hf_prune.layers.processes import main_writes
from hf_prune.layers.weights import is_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_prune.plan import PruningPlan

logger = logging.getLogger(__name__)


def install_save_hook() -> None:
    """Make `save_pretrained` (also as called by `Trainer` and `push_to_hub`) write complete pruned checkpoints.

    Wraps `PreTrainedModel.save_pretrained` once. For a model whose config has a `pruning_config` the plan is written
    beside config.json, and the remote-code file if, and only if, config.json points to it. Other models, and adapters,
    are saved as before. Imports `transformers.modeling_utils`.
    """
    from transformers.modeling_utils import PreTrainedModel

    if getattr(PreTrainedModel.save_pretrained, "_hf_prune", False):
        return
    PreTrainedModel.save_pretrained = _with_companions(PreTrainedModel.save_pretrained)
    PreTrainedModel._get_files_timestamps = _without_companions(PreTrainedModel._get_files_timestamps)


def plan_of(model: PreTrainedModel, directory: Path | None = None) -> PruningPlan | None:
    """The plan that belongs to `model`: the one it carries, else one found where it was loaded from or in `directory`.

    A plan file that does not give the widths in the model's config is passed over.
    """
    carried: PruningPlan | None = getattr(model, "_pruning_plan", None)
    if carried is not None and agrees(carried, model.config):
        return carried
    for path in [*source_plans(model.config), *([directory / PLAN_NAME] if directory else [])]:
        if not path.is_file():
            continue
        try:
            plan = read_plan(path)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if agrees(plan, model.config):
            return plan
    return None


def check_source(model: PreTrainedModel, directory: Path) -> None:
    """Refuse to save over the checkpoint that `model` was pruned from, or over one that its layers are read from.

    Raises:
        CheckpointError: `directory` is where it came from, and what lies there is another model.
    """
    config = model.config
    for source in {config._name_or_path, (config.pruning_config or {}).get("base_model_name_or_path")} - {None, ""}:
        with suppress(OSError):  # a Hub id, or gone
            if not os.path.samefile(source, directory) or not (directory / "config.json").exists():
                continue
            there = read_json(directory / "config.json").get("pruning_config") or {}
            if is_on_disk(model) or there.get("widths") != config.pruning_config.get("widths"):
                raise CheckpointError(
                    f"{directory} holds the model that this one was pruned from or is read from; it would be lost. "
                    "Choose another directory."
                )


def tokens_in_dense(model: PreTrainedModel, dense: PreTrainedModel) -> Tensor | None:
    """The dense model's id of each token of a pruned one, int64 `[V]`, where some are gone; `None`: all stay.

    Raises:
        ConfigError: they have other vocabularies, and no plan says which tokens stayed.
    """
    import torch

    own, theirs = (one.get_input_embeddings().weight.shape[0] for one in (model, dense))  # a head need not be named
    if own == theirs:
        return None
    plan = plan_of(model.get_base_model() if hasattr(model, "peft_config") else model)
    kept = plan.kept_indices.get("vocab", ()) if plan is not None else ()
    if len(kept) != own or kept[-1] >= theirs:
        raise ConfigError(
            f"the dense model predicts {theirs} tokens, the pruned one {own}, and no plan says which of them stayed: "
            "pass the dense model it was pruned from."
        )
    return torch.tensor(kept)


def source_plans(config: PreTrainedConfig) -> Iterator[Path]:
    """Plan files where the model came from: a directory, or the Hub's cache (never the network)."""
    source = getattr(config, "_name_or_path", "")
    if source and os.path.isdir(source):
        yield Path(source) / PLAN_NAME
    elif source:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(source, PLAN_NAME, revision=getattr(config, "_commit_hash", None))
        except HFValidationError:
            return
        if isinstance(found, str):
            yield Path(found)


def _with_companions(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        pruned = bool(getattr(self.config, "pruning_config", None)) and not getattr(
            self, "_hf_peft_config_loaded", False
        )
        if not pruned or os.path.isfile(save_directory):
            return original(self, save_directory, is_main_process, *args, **kwargs)
        check_source(self, Path(save_directory))
        self.config.architectures = [type(self).__name__.removeprefix("FSDP")]  # as the original will do
        references, code = _remote_code(self)
        writes = main_writes(f"save_pretrained {os.path.realpath(save_directory)}")
        with _saved_auto_map(self, references), writes if is_main_process else nullcontext(False) as mine:
            # before the original: it may push the directory to the Hub before it returns
            if mine:
                digests = _write_companions(self, Path(save_directory), code)
                setattr(self.config, DIGESTS, digests | {"config.json": config_digest(self.config.to_dict())})
            try:
                return original(self, save_directory, mine, *args, **kwargs)
            finally:
                vars(self.config).pop(DIGESTS, None)

    save_pretrained._hf_prune = True  # type: ignore[attr-defined]
    return save_pretrained


def _without_companions(original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """`save_pretrained(push_to_hub=True)` uploads files changed since this snapshot: ours, just written, must count."""

    @functools.wraps(original)
    def timestamps(self: Any, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        return {name: t for name, t in original(self, working_dir).items() if name not in (PLAN_NAME, CODE_NAME)}

    return timestamps


def _remote_code(model: PreTrainedModel) -> tuple[dict[str, str], str]:
    """References for `auto_map`, and the text of the file they point to; both empty where there is nothing to write."""
    from hf_prune.format import per_layer, remote_code

    config, own = model.config, remote_code.own_class(type(model))
    foreign = own is None and any(not _is_ours(value) for value in (getattr(config, "auto_map", None) or {}).values())
    if foreign or not needs_plugin(config):
        return {}, ""
    source = Path(per_layer.__file__).read_text(encoding="utf-8")
    if own is not None:
        reference = f"{remote_code.MODULE_NAME}.{own.__name__}"
        return {type(model)._auto_class or "AutoModelForCausalLM": reference}, remote_code.beside_own_code(own, source)
    try:
        text = remote_code.remote_code(config.architectures, config.model_type, source)
        return remote_code.auto_map(config), text
    except CheckpointError as error:
        logger.warning("saved without remote code, to be loaded with hf_prune imported: %s", error)
        return {}, ""


def _is_ours(reference: Any) -> bool:
    return isinstance(reference, str) and reference.split("--")[-1].startswith(Path(CODE_NAME).stem + ".")


@contextmanager
def _saved_auto_map(model: PreTrainedModel, references: dict[str, str]) -> Iterator[None]:
    """Save the config with `references` in place of ours that an older checkpoint left; foreign ones stay."""
    config, cls = model.config, type(model)
    before, auto_class = getattr(config, "auto_map", None), cls._auto_class
    if references:
        cls._auto_class = None  # else transformers would point to the model's own file
    config.auto_map = {key: value for key, value in (before or {}).items() if not _is_ours(value)} | references
    if not config.auto_map:
        del config.auto_map
    try:
        yield
    finally:
        if references and auto_class is not None:
            cls._auto_class = auto_class
        if before is not None:
            config.auto_map = before
        elif hasattr(config, "auto_map"):
            del config.auto_map


def _write_companions(model: PreTrainedModel, directory: Path, code: str) -> dict[str, str]:
    """Write the plan of `model`, and `code` if any, into `directory`; remove those of another model.

    Returns:
        SHA-256 of what was written, by file name.
    """
    from transformers.dynamic_module_utils import custom_object_save

    from hf_prune.format.remote_code import own_class

    directory.mkdir(parents=True, exist_ok=True)
    plan = plan_of(model, directory)
    if plan is None:
        (directory / PLAN_NAME).unlink(missing_ok=True)
        logger.warning("no %s in %s: the plan that the model was pruned with is not known", PLAN_NAME, directory)
    else:
        plan.save(directory / PLAN_NAME)
    if code:
        if own_class(type(model)) is not None:
            custom_object_save(model, directory)
        (directory / CODE_NAME).write_text(code, encoding="utf-8")
    else:
        (directory / CODE_NAME).unlink(missing_ok=True)
    written = [path for path in (directory / PLAN_NAME, directory / CODE_NAME) if path.exists()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
