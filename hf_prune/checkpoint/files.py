"""The files of a pruned checkpoint: their names, which of them a config calls for, and how to read the JSON ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError, HFPruneError
from hf_prune.reading import parse_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_prune.plan import PruningPlan

PLAN_NAME = "pruning_plan.json"
CODE_NAME = "modeling_hf_prune.py"
PICTURE_NAME = "widths.png"
CURVE_NAME = "learning_curve.png"
SCORES_NAME = "scores.png"
CARD_NAME = "README.md"
REPORT_NAME = "report.html"


def agrees(plan: PruningPlan, config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Whether `plan` gives the widths that `config.pruning_config` (or that section itself) records."""
    section = config if isinstance(config, Mapping) else getattr(config, "pruning_config", None) or {}
    recorded: dict[str, int] = section.get("widths", {})
    widths = plan.widths
    return set(plan.kept_indices) <= set(recorded) and all(widths.get(axis) == n for axis, n in recorded.items())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}). Save or download the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}, expected an object. Save or download the checkpoint again."
        )
    return value


def read_plan(path: Path) -> PruningPlan:
    """Read a plan file.

    Raises:
        CheckpointError: the file is damaged, or was written by a version with other fields.
    """
    from hf_prune.plan import PruningPlan

    content = read_json(path)
    try:
        return PruningPlan.from_dict(content)
    except (HFPruneError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a valid pruning plan: {str(error).rstrip('.')}. Save or download the checkpoint again, or "
            "read it with the hf_prune version named in config.json."
        ) from error


def load_plan(
    directory_or_repo_id: str | Path, *, revision: str | None = None, token: str | None = None
) -> PruningPlan | None:
    """Load the plan that a checkpoint was pruned with.

    Args:
        directory_or_repo_id: local directory, or repository on the Hub (only the plan file is downloaded, and cached).
        revision: branch, tag or commit on the Hub.
        token: Hub token; `None` uses the stored one.

    Returns:
        The plan, or `None` if the checkpoint carries none.

    Raises:
        CheckpointError: the plan is damaged, or there is no such directory or repository.
    """
    directory = Path(directory_or_repo_id)
    if directory.is_dir():
        path = directory / PLAN_NAME
        return read_plan(path) if path.exists() else None

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_plan(Path(hf_hub_download(str(directory_or_repo_id), PLAN_NAME, revision=revision, token=token)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, the file is not
        raise CheckpointError(
            f"no plan could be loaded from {str(directory_or_repo_id)!r}: it is not a local directory, and as a "
            f"repository on the Hub it gave: {error}. Check the name, the revision, the network and the token."
        ) from error
