"""The model card (README.md) of a pruned checkpoint: metadata, what was removed and how, and how to load it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.format.building import auto_class, needs_plugin

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from torch import Tensor
    from transformers import PreTrainedConfig

    from hf_prune.plan import PruningPlan


@dataclass(frozen=True)
class Origin:
    """What a run knows of how its model came about: it travels with the model (`_origin`) to the report."""

    plan: PruningPlan
    """The model's; of another plan nothing is shown."""
    scores: Mapping[str, Tensor]
    """Of every unit of the dense model; may be empty."""
    history: Sequence[Mapping[str, float | int | str]] = ()
    """How scores were learned."""
    samples: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What models wrote, `{prompt: {model: text}}`."""
    then: Sequence[str] = ()
    """Words of the command that came after pruning."""


TAGS = ("hf_prune", "pruned")
INSTALL = "pip install hf_prune-0.1.0-py3-none-any.whl (`make wheel`; it is on no package index yet)"
"""How a reader of a card gets hf_prune. With a public address: pip install 'hf_prune @ git+ADDRESS'."""

_METHODS = {
    "llm_pruner": "LLM-Pruner ([arXiv 2305.11627](https://arxiv.org/abs/2305.11627))",
    "prunenet": "PruneNet ([arXiv 2501.15296](https://arxiv.org/abs/2501.15296))",
    "policy_gradient": "policy-gradient masks ([arXiv 2406.10576](https://arxiv.org/abs/2406.10576))",
    "obs": "optimal brain surgeon by structures (after [arXiv 2302.04089](https://arxiv.org/abs/2302.04089))",
    "reap": "REAP ([arXiv 2510.13999](https://arxiv.org/abs/2510.13999))",
    "wanda": "Wanda scores summed over whole units ([arXiv 2306.11695](https://arxiv.org/abs/2306.11695))",
}
_BUDGETS = {
    "decoder": "attention and MLP parameters of the decoder layers",
    "model": "all parameters",
    "active": "attention and MLP parameters that each token meets",
    "units": "units of the pruned axes",
    "memory": "bytes of weights and cache",
}
_PART = re.compile(r"<!-- hf_prune: .*?<!-- /hf_prune -->\n?", re.DOTALL)
_AUTOMATIC = re.compile(
    r"(generated automatically|automatically generated)", re.IGNORECASE
)  # stock cards: no one's words


def model_card(
    config: PreTrainedConfig,
    *,
    num_parameters: int,
    plan: PruningPlan | None = None,
    model_id: str = "this model",
    report: Mapping[str, Any] | None = None,
    base_card: str | None = None,
    existing: str | None = None,
    origin: Origin | None = None,
    picture: str | None = None,
    scores: str | None = None,
    curve: str | None = None,
) -> ModelCard:
    """Build the model card of a pruned model.

    Args:
        config: config of the model, carrying `pruning_config`.
        num_parameters: parameters of the pruned model, tied ones counted once.
        plan: adds the dense widths and the names of removed layers.
        model_id: title, and what the loading example loads.
        report: measurements, `{what: value}` or `{what: {column: value}}`.
        base_card: text of the base model's card: licence and language are taken from it.
        existing: text of a card to merge into: its metadata and hand-written text are kept.
        origin: adds samples of text, and what was done after pruning.
        picture: file name of the widths picture.
        scores: file name of the picture of scores.
        curve: file name of the picture of the learning curve.

    Returns:
        The card; `str(card)` is the text of README.md.
    """
    from huggingface_hub import ModelCard

    pruning: dict[str, Any] = config.pruning_config
    base = pruning.get("base_model_name_or_path")
    card: ModelCard = ModelCard.from_template(
        _metadata(base, base_card, existing, "image-text-to-text" if _reads_images(config) else "text-generation"),
        template_str=Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8"),
        model_id=model_id,
        summary=_summary(config, base),
        ratios=_ratios(pruning),
        parameters=_parameters(pruning, num_parameters),
        widths=_widths(pruning.get("widths", {}), plan),
        picture=picture,
        scores=scores,
        curve=curve,
        settings=_settings(pruning, plan, origin),
        samples=samples_table(origin.samples) if origin is not None and origin.samples else "",
        evaluation=_evaluation(report or {}),
        loading=_loading(config, model_id),
        plugin=needs_plugin(config),
        rest=_hand_written(existing),
    )
    return card


def _reads_images(config: PreTrainedConfig) -> bool:
    return str(auto_class(config).__name__) == "AutoModelForImageTextToText"


def _metadata(base: str | None, base_card: str | None, existing: str | None, task: str) -> Any:
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {}
    if base_card is not None:
        of_base = _card_data(base_card)
        inherited = ("license", "license_name", "license_link", "language")
        data = {key: of_base[key] for key in inherited if key in of_base}
    if existing is not None:
        data |= _card_data(existing)
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS]))
    data["library_name"] = "transformers"
    data.setdefault("pipeline_tag", task)
    if _is_repo_id(base):
        data |= {"base_model": base, "base_model_relation": "finetune"}  # the Hub knows no relation "pruned"
    return ModelCardData(**data, ignore_metadata_errors=True)


def _card_data(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    return data


def _is_repo_id(base: str | None) -> bool:
    """Whether `base` can name a repository on the Hub, which refuses cards with other base models."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if base is None or Path(base).exists():
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def _hand_written(existing: str | None) -> str:
    """The text of `existing` that was not written by a program."""
    if existing is None:
        return ""
    from huggingface_hub import ModelCard

    text = ModelCard(existing, ignore_metadata_errors=True).text
    if _PART.search(text) is None and _AUTOMATIC.search(text):
        return ""
    return _PART.sub("", text).strip()


def _summary(config: PreTrainedConfig, base: str | None) -> str:
    of = ""
    if base is not None:
        of = f" of [{base}](https://huggingface.co/{base})" if _is_repo_id(base) else f" of `{Path(base).name}`"
    return (
        f"A structurally pruned version{of}: whole attention heads, MLP channels, experts or layers were removed with "
        f"`hf_prune`, the rest is an ordinary `{config.model_type}` model."
    )


def _ratios(pruning: Mapping[str, Any]) -> str:
    settings, achieved = pruning.get("settings", {}), pruning.get("achieved", {})
    rows = []
    for budget, meaning in _BUDGETS.items():
        if budget == "memory" and settings.get("budget") != "memory":
            continue
        asked = settings.get("pruning_ratio") if settings.get("budget") == budget else None
        if asked is None and budget not in achieved:
            continue
        rows.append([meaning, _percent(asked), _percent(achieved.get(budget))])
    return _table(["removed part of", "asked", "achieved"], rows)


def _parameters(pruning: Mapping[str, Any], after: int) -> str:
    removed = pruning.get("achieved", {}).get("model")
    if not isinstance(removed, (int, float)) or not 0 <= removed < 1:
        return ""
    return _table(["", "dense", "pruned"], [["parameters", f"{round(after / (1 - removed)):,}", f"{after:,}"]])


def _widths(widths: Mapping[str, int], plan: PruningPlan | None) -> str:
    """One row per kind of axis: dense width, and the pruned widths with equal neighbours joined."""
    gone = plan.removed_layers if plan is not None else frozenset()
    dense = plan.num_units if plan is not None else {}
    rows, per_layer = [], dict[str, dict[int, str]]()
    for axis, width in widths.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", axis)
        if match is None:
            rows.append([axis, str(dense.get(axis, "")), f"{width:,}"])
        elif int(match[1]) not in gone:
            per_layer.setdefault(match[2], {})[int(match[1])] = axis
    for kind, axes in per_layer.items():
        before = sorted({dense[axis] for axis in axes.values() if axis in dense})
        runs = []
        for width, run in groupby(sorted(axes), key=lambda layer: widths[axes[layer]]):
            layers = list(run)
            span = f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])
            runs.append(f"{span}: **{width:,}**")
        rows.append([kind, "–".join(f"{n:,}" for n in {before[0], before[-1]}) if before else "", ", ".join(runs)])
    if gone:
        rows.append(["layers removed", "", ", ".join(map(str, sorted(gone)))])
    return _table(["axis", "dense", "layer: width"], rows)


def _settings(pruning: Mapping[str, Any], plan: PruningPlan | None, origin: Origin | None) -> str:
    method = pruning.get("method", "")
    lines = [f"Method: {_METHODS.get(method, f'`{method}`')}."]
    if pruning.get("calibration"):
        lines.append(f"Calibration: {', '.join(f'`{word}`' for word in pruning['calibration'])}.")
    if plan is not None and plan.config.targets:
        lines.append(f"Pruned for {plan.config.target.text}.")
    lines.append(f"Written by hf_prune {pruning.get('hf_prune_version', '')}.".replace(" .", "."))
    if plan is not None:
        lines.append("The indices of all kept units are in `pruning_plan.json`.")
        if plan.config.method != "custom":
            commands = [_command(plan, pruning.get("calibration"))]
            commands += [command_block(origin.then)] if origin is not None and origin.then else []
            lines.append("\n\n".join(["To do it again:", *commands, "All settings:"]))
    settings = json.dumps(pruning.get("settings", {}), indent=2)
    return " ".join(lines) + f"\n\n```json\n{settings}\n```"


def _command(plan: PruningPlan, calibration: Any) -> str:
    """The command that makes this plan of the base model, on the same text."""
    config = plan.config
    asked = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    asked = {name: value for name, value in asked.items() if value != config.__dataclass_fields__[name].default}
    words = ["prune", plan.base_model_name_or_path or "MODEL", "OUTPUT", "--method", config.method]
    words += ["--pruning-ratio", str(asked.pop("pruning_ratio"))]
    return command_block([*words, *calibration_words(calibration), *setting_words(asked)])


def calibration_words(names: Sequence[str] | None) -> list[str]:
    """Words of a command for these texts."""
    return [word for name in names or () for word in ("--calibration", name)]


def setting_words(settings: Mapping[str, Any]) -> list[str]:
    """Words of a command that give fields of a configuration these values."""
    words = []
    for name, value in settings.items():
        weights = name == "allocation" and not isinstance(value, str)
        text = json.dumps(dict(value)) if weights else ",".join(map(str, value)) if isinstance(value, tuple) else value
        words += ["--set", f"{name}={'none' if value is None else text}"]
    return words


def command_block(words: Sequence[str]) -> str:
    """An `hf-prune` command as a block of Markdown, ready for a shell."""
    return f"```bash\n{shlex.join(['hf-prune', *words])}\n```"


def samples_table(samples: Mapping[str, Mapping[str, str]]) -> str:
    """What each model writes after each prompt, `{prompt: {model: text}}`: a table for each."""
    found = []
    for prompt, texts in samples.items():
        rows = [[model, _plain(text)] for model, text in texts.items()]
        found += [f"After **{_plain(prompt)}**", _table(["model", "writes"], rows)]
    return "\n\n".join(found)


def _plain(text: str) -> str:
    """On one line, without the signs that Markdown reads."""
    return re.sub(r"([\\`*_{}\[\]<>#~$])", r"\\\1", " ".join(text.split()))


def _evaluation(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    nested = {what: value if isinstance(value, Mapping) else {"value": value} for what, value in report.items()}
    columns = list(dict.fromkeys(column for values in nested.values() for column in values))
    rows = [[what, *(_number(values.get(column)) for column in columns)] for what, values in nested.items()]
    return _table(["", *map(str, columns)], rows)


def _loading(config: PreTrainedConfig, model_id: str) -> str:
    plugin = needs_plugin(config)
    why = (
        "Layers have different widths, which transformers cannot build by itself: import `hf_prune` first, or pass "
        "`trust_remote_code=True` to run the small file `modeling_hf_prune.py` of this repository instead."
        if plugin
        else "An ordinary checkpoint: no plugin and no remote code needed."
    )
    first = f"import hf_prune  # {INSTALL}\n" if plugin else ""
    model = auto_class(config).__name__
    reader, name = ("AutoProcessor", "processor") if _reads_images(config) else ("AutoTokenizer", "tokenizer")
    return (
        f"{why}\n\n```python\n{first}from transformers import {model}, {reader}\n\n"
        f'model = {model}.from_pretrained("{model_id}")\n'
        f'{name} = {reader}.from_pretrained("{model_id}")\n```'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
