"""Push a pruned model to the Hub: one commit with weights, plan, code (if needed), tokenizer and model card."""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.files import CARD_NAME, CODE_NAME, CURVE_NAME, PLAN_NAME
from hf_prune.checkpoint.saving import save_pruned, write_card
from hf_prune.errors import CheckpointError, HFPruneError
from hf_prune.report.card import TAGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from huggingface_hub import HfApi
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.plan import PruningPlan

logger = logging.getLogger(__name__)

# An earlier push may have sharded the weights differently; from_pretrained would read whichever it finds first.
_REPLACED = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    PLAN_NAME,
    CODE_NAME,
    CURVE_NAME,
)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    plan: PruningPlan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    max_shard_size: int | str = "50GB",
) -> str:
    """Save a pruned model as `save_pruned` does, and upload it. Creates the repository if there is none.

    The metadata and the hand-written text of the repository's README.md are kept; the licence is copied from the base
    model's card if the repository names none.

    Args:
        model: pruned model, its config carrying `pruning_config`. Gets the model tags `hf_prune` and `pruned`.
        repo_id: `"name"` or `"namespace/name"`.
        plan: plan the model was pruned with; default: the one it carries or was loaded with.
        tokenizer: uploaded beside the model if given.
        report: measurements for the model card, see `save_pruned`.
        private: visibility of a repository that is created; `None`: the namespace's default.
        revision: branch to push to, created if there is none; not together with `create_pr`.
        create_pr: open a pull request instead of pushing to the main branch.
        token: Hub token; `None` uses the stored one.
        commit_message: first line of the commit.
        max_shard_size: largest weights file, in bytes or as in `"5GB"`.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        CheckpointError: the model cannot be saved, or the Hub refused.
    """
    if create_pr and revision is not None:
        raise CheckpointError(
            f"got revision={revision!r} and create_pr=True; pull requests are opened against the main branch. "
            "Pass one of the two."
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / repo_id.split("/")[-1]
        model.add_model_tags(list(TAGS))
        save_pruned(model, directory, plan=plan, tokenizer=tokenizer, max_shard_size=max_shard_size, report=report)
        with _refusal(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            base = model.config.pruning_config.get("base_model_name_or_path")
            write_card(
                model,
                directory,
                model_id=repo_id,
                report=report,
                existing=_remote_card(api, repo_id, revision),
                base_card=_base_card(api, base),
            )
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or "Upload pruned model",
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(_REPLACED),
            )
    return commit.pr_url or commit.commit_url


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def _base_card(api: HfApi, base: str | None) -> str | None:
    """Card of the base model; nothing depends on it but the licence, so a missing one is only logged."""
    if base is None:
        return None
    try:
        local = Path(base) / CARD_NAME
        path = local if local.is_file() else Path(api.hf_hub_download(base, CARD_NAME))
        return path.read_text(encoding="utf-8")
    except Exception as error:  # whatever the network says
        logger.info("no card of the base model %s: %s", base, error)
        return None


@contextmanager
def _refusal(repo_id: str) -> Iterator[None]:
    """Everything in this block talks to the Hub: name the repository in whatever it answers."""
    try:
        yield
    except HFPruneError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"could not push to {repo_id}: {error}. Check the name, the network, and that the token may write there."
        ) from error
