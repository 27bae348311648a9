"""The whole job on one page: structure, scores, plan, surgery. The file to read first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from hf_prune.allocation.planning import allocate, check_ratio
from hf_prune.allocation.search import split_windows
from hf_prune.allocation.spectral import hill_exponents
from hf_prune.allocation.steps import Stage, for_pruned, in_dense_numbering, next_plan
from hf_prune.calibration import (
    GENERAL,
    Sources,
    asks_model,
    calibration_batches,
    calibration_names,
    is_text,
    parts_of,
)
from hf_prune.config import LLMPrunerConfig, PolicyGradientConfig, selected_axes
from hf_prune.errors import CalibrationError, ConfigError, StructureError
from hf_prune.evaluation.generation import samples
from hf_prune.evaluation.latency import measure_latency
from hf_prune.evaluation.perplexity import perplexity_of
from hf_prune.format.building import build_empty
from hf_prune.gate import check_config, check_model, check_room, check_windows, unwrapped
from hf_prune.layers.price import announce, price_of
from hf_prune.layers.processes import of_main_process
from hf_prune.layers.walk import LayerProtocol, Walk, images_of
from hf_prune.layers.weights import fingerprint, is_on_disk
from hf_prune.layers.work import WorkDir
from hf_prune.loading import load_config, load_tokenizer, open_model
from hf_prune.plan import bare_plan, make_plan, with_tokens
from hf_prune.repair import check_batches, repair_, select_repairable
from hf_prune.repair.preview import RepairPreview
from hf_prune.report.card import Origin
from hf_prune.scores import METHODS, check_scores, score
from hf_prune.scores.learned import LearnedScores
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruned_config import unresizable
from hf_prune.surgery.pruning import PrunedLayers, empty_pruned
from hf_prune.surgery.slicing import renumber
from hf_prune.surgery.width_attributes import family
from hf_prune.vocabulary import kept_tokens, prune_tokenizer, spelled

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.config import PruningConfig
    from hf_prune.latency import LatencyTable
    from hf_prune.loading import LayersOn
    from hf_prune.plan import PruningPlan
    from hf_prune.scores.learned import Step
    from hf_prune.structure.axes import Structure
    from hf_prune.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_WITH_RATIO = (
    "pruning_ratio",
    "budget",
    "allocation",
    "min_units",
    "round_to",
    "targets",
    "context",
    "batch",
    "bits",
)
_AFTER_SCORES = (
    *_WITH_RATIO,
    "standardise",
    "num_steps",
    "selection",
    "repair",
    "repair_target",
    "spectral_epsilon",
    "search_evaluations",
    "search_samples",
    "state_dir",
    "state_steps",
    "save_policy",
)
"""Settings that scores do not depend on, unless the method learns for a ratio."""

HELD_OUT = 8
"""Windows of the calibration text that perplexity is measured on: never those that were calibrated with."""
EXPLODED = 3.0
"""A perplexity that grows by more than this factor is warned of."""

Calibration = Sources | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PruningResult:
    """A pruned model and how it came about."""

    model: PreTrainedModel
    """The pruned model: the same class as the dense one."""
    plan: PruningPlan
    """Which units stay, and the achieved ratios."""
    structure: Structure
    """Structure of the dense model."""
    scores: dict[str, Tensor]
    """Score of every unit of the dense model, higher = keep: a plan at another ratio needs no new scoring."""
    perplexity_before: float | None = None
    """Of the dense model, on up to `HELD_OUT` windows of the calibration text that were not calibrated with; `None`
    where no text was given (batches are all calibrated with), or none of it is left."""
    perplexity_after: float | None = None
    """Of the pruned model, on the same windows; for each token of the dense model where its vocabulary is smaller."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """That of the pruned model: the one that was given or read, but where the vocabulary is smaller a new one."""

    @property
    def history(self) -> list[Step]:
        """How the scores were learned, step by step (see `LearnedScores`); empty where nothing was learned."""
        return history_of(self.scores)


def prune(
    source: PreTrainedModel | str | Path,
    config: PruningConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    batch_size: int = 8,
    latency: LatencyTable | None = None,
    scores: Mapping[str, Tensor] | None = None,
    vocabulary: Vocabulary | None = None,
    coverage: float = 1.0,
    layers_on: LayersOn = "auto",
    work_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
) -> PruningResult:
    """Prune a causal LM, or that inside of a model of images, in memory or with its decoder layers on disk.

    What is given is not changed.

    Of a model on disk one layer is in memory at a time, in all methods, repair and allocations; scores and plan are
    those of the model in memory, bit for bit (float32 on a CPU). The pruned model is then on disk too, in temporary
    files or in `work_dir`; `save_pruned` writes it as a checkpoint.

    Args:
        source: any causal LM of transformers, or model that reads images and text (its decoder is pruned, what reads
            images stays as it is); or the directory or Hub id of one.
        config: what to remove, and how.
        tokenizer: needed if `calibration` is text; default: that of `source` where it is a directory or id.
        calibration: for methods that need data: texts (files, Hub datasets, weighted mixtures of them, `self`: see
            `calibration_batches`), or batches with `input_ids` `[B, T]`, and with images where the model reads them:
            one sample each, as its processor gives it. Default: the bundled mixture `general`. Of texts some windows
            are left out, to measure both models on.
        batch_size: windows per forward pass while scoring; does not change the result beyond rounding.
        latency: table of `measure_latency`, for the budget `latency` (default: measured where the model is).
        scores: scores of this model, if they are known (`PruningResult.scores` of a run at another ratio).
        vocabulary: texts (as for `calibration`) or ids of tokens: the tokens that these do not need go from embedding,
            head and tokenizer, on top of what `config` asks for (see `kept_tokens`). Default: all stay.
        coverage: share of the tokens of these texts that are to stay, the most frequent first.
        layers_on: where the layers of a directory or id are: see `open_model`.
        work_dir: keeps hidden states, scores and pruned layers: the same call resumes an interrupted run and ends with
            the same bits, and a call with another ratio or allocation needs no new scores.
        device: where layers run, for a directory or id; default: the CPU.
        dtype: of the weights in memory, likewise; default: the checkpoint's own.
        output: where the pruned model will be saved: that it has room is checked now, and both models write a few
            lines for its report.
        trust_remote_code: whether code that comes with the checkpoint of a directory or id may run.
        dequantise: make plain weights of the quantised ones of a directory, id or GGUF file.

    Returns:
        The pruned model with its plan, structure and scores, and the perplexity of both models.

    Raises:
        HFPruneError: bad input, with what was found, what was expected and what to do; before anything is changed.
    """
    PartialState()  # of several processes each has its own "cuda" from here on
    work = None if work_dir is None else WorkDir(Path(work_dir))
    opens = isinstance(source, (str, Path))
    if config.pruning_ratio == 0 and vocabulary is None:
        raise ConfigError("pruning_ratio: found 0, which removes nothing, expected one above 0, or a vocabulary.")
    if opens:
        described = load_config(str(source), trust_remote_code=trust_remote_code, dequantise=dequantise)
        check_config(described)
        model = build_empty(described)  # tells what text it can read, before weights are loaded
        if tokenizer is None and (calibration is None or is_text(calibration) or vocabulary is not None):
            needed = vocabulary is not None or calibration is not None
            tokenizer = load_tokenizer(str(source), required=needed, trust_remote_code=trust_remote_code)
    else:
        model = unwrapped(source)
        if layers_on == "disk" and not is_on_disk(model):
            raise ConfigError("layers_on='disk' found a model in memory; pass the directory or Hub id of the model.")
    if vocabulary is not None and tokenizer is None:
        raise ConfigError("vocabulary: found no tokenizer, from which tokens are to go; pass the model's own.")

    structure = infer_structure(model, cache=config.budget == "memory")

    def opened() -> PreTrainedModel:
        folder = None if work is None else work.stage("converted").path
        where = {"layers_on": layers_on, "device": device, "dtype": dtype, "folder": folder}
        return unwrapped(open_model(str(source), structure=structure, config=described, **where))  # type: ignore[arg-type]

    if writes := is_text(calibration) and asks_model(calibration):  # type: ignore[arg-type]
        model = opened() if opens else model
    batches, held_out = _data(config, tokenizer, calibration, batch_size, HELD_OUT, model if writes else None)
    check_windows(model, [*(batches or ()), *held_out])
    if batches and config.repairs_with_data:  # of none the method says so
        check_batches(len(batches), train=config.repairs_by_training, end_to_end=config.repairs_end_to_end)
    if opens and not writes:
        model = opened()
    smaller, tokens = tokenizer, None
    if vocabulary is not None:
        assert tokenizer is not None  # checked
        tokens = kept_tokens(model, tokenizer, vocabulary, coverage=coverage)
        only = with_tokens(bare_plan(structure, {}), structure, tokens)
        empty_pruned(model, structure, only)  # what cannot go is refused here
        smaller = prune_tokenizer(tokenizer, tokens)
    measures = config.budget == "latency" and latency is None
    if measures and is_on_disk(model):
        raise ConfigError(
            "budget 'latency' found a model on disk, whose time cannot be measured; pass a latency table that was "
            "measured where the model fits."
        )
    if work is not None:
        work.claim(identity(model, config, batches))
    num_tokens = sum(batch["input_ids"].numel() for batch in held_out)
    price = price_of(structure, config, batches, model, num_tokens)
    check_room(price, model, config, work, None if output is None else Path(output))
    protocol = check_model(model, structure, config, batches)
    if measures:
        latency = of_main_process(measure_latency(model, structure))
    if is_on_disk(model) or work is not None:
        announce(price)
    check_ratio(structure, config, latency)
    _check_resizable(model, structure, config)
    plan, found = decide(
        model, structure, config, batches, latency=latency, scores=scores, work=work, protocol=protocol
    )
    if tokens is not None:
        plan = with_tokens(plan, structure, tokens)
    pruned = apply_and_repair(model, structure, plan, config, batches, work, protocol)
    texts: dict[str, dict[str, str]] = {}
    if output is not None and tokenizer is not None and smaller is not None and not is_on_disk(model):
        before, after = samples(model, tokenizer), samples(pruned, smaller)
        texts = {prompt: {"dense": before[prompt], "pruned": after[prompt]} for prompt in before if prompt in after}
    pruned._origin = Origin(plan, found, history_of(found), texts)  # type: ignore[assignment]  # for the report
    if is_text(calibration):
        pruned.config.pruning_config["calibration"] = calibration_names(calibration)
    logger.info("pruned %s: %.2f %% of the decoder removed", type(model).__name__, 100 * plan.achieved["decoder"])
    walk = Walk(model, structure.layer_paths, held_out, protocol=protocol)
    windows = walk.all_ids
    if tokens is not None:
        assert tokenizer is not None
        assert smaller is not None
        windows = [spelled(tokenizer, smaller, row)[None] for ids in windows for row in ids]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.seq_len
    if any(ids.shape[1] > max(longest, config.seq_len) for ids in windows):
        logger.warning("perplexity is not measured: in the smaller vocabulary windows do not fit into the model")
        windows = []
    if not windows:
        return PruningResult(pruned, plan, structure, found, tokenizer=smaller)
    return PruningResult(pruned, plan, structure, found, *_measured(walk, pruned, structure, plan, windows), smaller)


def _check_resizable(model: PreTrainedModel, structure: Structure, config: PruningConfig) -> None:
    """Refuse axes that are asked for and that the model's code does not let go, before anything is scored."""
    asked = {family(axis): axis.kind for axis in selected_axes(structure, config) if axis.layer is not None}
    tried = asked and config.pruning_ratio > 0
    reasons = unresizable(model.config, structure, type(model), held=False) if tried else {}
    for name, reason in reasons.items():
        if name in asked:
            raise StructureError(
                f"the axes 'layers.*.{name}' cannot be pruned: {reason} Leave out the axes {asked[name]!r}, or protect "
                f"these (protect=('layers.*.{name}',))."
            )


def _measured(
    dense: Walk, pruned: PreTrainedModel, structure: Structure, plan: PruningPlan, windows: Sequence[Tensor]
) -> tuple[float, float]:
    """Perplexity of the dense and, on the same text in its own tokens, of the pruned model. On disk each is read once.

    Both are for each token of the dense model.
    """
    stay = [layer for layer in range(dense.num_layers) if layer not in plan.removed_layers]
    paths = [renumber(dense.layer_paths[layer], layer, structure, plan) for layer in stay]
    known = dense.protocol
    alike = LayerProtocol(tuple(known.outputs[layer] for layer in stay), known.layered, known.reason)
    before = perplexity_of(dense)
    after = perplexity_of(Walk(pruned, paths, windows, protocol=alike))
    predicted = [sum(ids[:, 1:].numel() for ids in own) for own in (windows, dense.all_ids)]
    after **= predicted[0] / predicted[1]
    if not after <= EXPLODED * before:
        logger.warning(
            "perplexity on windows that were not calibrated with went from %.4g to %.4g: the model is badly damaged. "
            "Remove less, or from everywhere alike (allocation 'uniform'); take method 'llm_pruner' or 'obs', or "
            "repair 'least_squares'; train what is left (`recover`)",
            before,
            after,
        )
    return before, after


def decide(
    model: PreTrainedModel,
    structure: Structure,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    *,
    latency: LatencyTable | None = None,
    scores: Mapping[str, Tensor] | None = None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """The first half of `prune`: which units stay, and the scores of the dense model. See there.

    A `protocol` (of `check_model`) saves the walks over the dense model their probes.

    Step k of `config.num_steps` removes k/n of the ratio (LLM-Pruner's linear schedule); each is scored on the model
    that the one before leaves, repaired where `config` says so.
    """
    if config.pruning_ratio == 0:  # tokens go, and nothing that is scored
        return make_plan(structure, {}, config, base_model_of(model)), {}
    known: dict[str, Tensor] = {} if scores is None else check_scores(scores, structure, config)

    def scores_of(done: PruningPlan | None, ratio: float) -> dict[str, Tensor]:
        nonlocal known
        if done is None:
            if not known:
                own = dataclasses.replace(config, pruning_ratio=ratio, num_steps=1)
                stage = None if work is None else work.stage("scores")
                known = _scored(model, structure, own, batches, stage, protocol)  # as it is: it may carry a history
            return known
        current = apply_and_repair(model, structure, done, config, batches, work, protocol)
        task = for_pruned(structure, infer_structure(current), config, done, ratio)
        if task is None:
            return {}
        (smaller, own), step = task, f"scores-{_digest(done.to_json())}"
        if isinstance(own, PolicyGradientConfig) and own.state_dir is not None:
            own = dataclasses.replace(own, state_dir=str(Path(own.state_dir) / step))
        stage = None if work is None else work.stage(step)
        return in_dense_numbering(_scored(current, smaller, own, batches, stage), structure, done)

    preview, exponents = None, None
    if config.allocation in ("spectral", "search"):
        exponents = of_main_process(hill_exponents(model, structure))
    if config.compares_outputs and config.repairs_with_data:  # judge plans as repair will leave them
        judged, others = split_windows(batches or (), config.search_samples)  # not by the text that repair is fitted to
        preview = RepairPreview(model, structure, others or judged, config.repair_ridge, protocol).applied
    planned = partial(
        allocate,
        structure=structure,
        model=model,
        batches=batches,
        latency=latency,
        exponents=exponents,
        preview=preview,
        work=work,
        protocol=protocol,
        base_model_name_or_path=base_model_of(model),
    )
    stage: Stage | None = None
    for step in range(1, config.num_steps + 1):
        ratio = config.pruning_ratio * (step / config.num_steps)
        stage = next_plan(planned, config, partial(scores_of, ratio=ratio), stage, ratio)
    assert stage is not None  # the last step reaches the ratio, or raises
    plan = stage.plan
    if config.selection == "obs":
        assert batches is not None
        own = None if work is None else work.stage(f"selection-{_digest(plan.to_json())}")
        ridge = config.repair_ridge
        plan = select_repairable(model, structure, plan, batches, ridge=ridge, work=own, protocol=protocol)
    return plan, known


def _scored(
    model: PreTrainedModel,
    structure: Structure,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    work: WorkDir | None,
    protocol: LayerProtocol | None = None,
) -> dict[str, Tensor]:
    """`score`, or what `work` keeps of it: for the same units, and where they depend on it for the same ratio."""
    if work is None:
        return score(model, structure, config, batches=batches, protocol=protocol)
    key = f"{config.method}-{_digest(json.dumps(scoring_settings(config), sort_keys=True))}"
    if (found := of_main_process(work.load(key))) is not None:
        tensors, note = found
        return LearnedScores(tensors, note["history"]) if note["history"] else tensors
    own = work.stage(key)
    if isinstance(config, PolicyGradientConfig) and config.state_dir is None:
        config = dataclasses.replace(config, state_dir=of_main_process(str(own.path)))
    scores = score(model, structure, config, batches=batches, work=own, protocol=protocol)
    work.save(key, scores, {"history": history_of(scores)})
    shutil.rmtree(own.path)  # hidden states: no longer needed
    return scores


def apply_and_repair(
    model: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> PreTrainedModel:
    """The second half of `prune`: a new model without the units that `plan` removes, repaired as `config` says."""
    own = None if work is None else work.stage(f"pruned-{_digest(plan.to_json())}")
    layers = PrunedLayers(model, structure, plan, None if own is None else own.path)
    if config.repair == "none" or config.pruning_ratio == 0:
        for layer in range(len(structure.layer_paths)) if is_on_disk(model) else ():
            if not layers.known(layer):
                with layers.layer(layer):
                    pass
    else:
        data = batches if config.repairs_with_data else None
        target, ridge = config.repair_target, config.repair_ridge
        repair_(
            layers.model,
            model,
            structure,
            plan,
            data,
            target=target,
            ridge=ridge,
            train=config.repairs_by_training,
            end_to_end=config.repairs_end_to_end,
            seed=config.seed,
            layers=layers,
            work=own,
            protocol=protocol,
        )
    return layers.finish()


def scoring_settings(config: PruningConfig) -> dict[str, Any]:
    """The settings that scores depend on: those of allocation, repair and surgery aside."""
    found = config.to_dict()
    ratio = METHODS[config.method].uses_ratio if config.method in METHODS else False
    learned = _WITH_RATIO if ratio else ()
    return {name: value for name, value in found.items() if name in learned or name not in _AFTER_SCORES}


def identity(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What a work directory belongs to: model, text, and method."""
    text = hashlib.sha256()
    for batch in batches or ():
        ids = batch["input_ids"]
        text.update(f"{tuple(ids.shape)}".encode() + ids.to("cpu", torch.int64).numpy().tobytes())
        others = images_of(batch) | {name: batch[name] for name in ("labels",) if name in batch}
        for name, value in others.items():
            text.update(f"{name} {value.tolist() if isinstance(value, torch.Tensor) else value}".encode())
    settings = {name: value for name, value in scoring_settings(config).items() if name not in _WITH_RATIO}
    return {"model": fingerprint(model), "text": text.hexdigest(), **settings}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def history_of(scores: Mapping[str, Tensor]) -> list[Step]:
    """The learning curve that `scores` carry; empty where nothing was learned."""
    return scores.history if isinstance(scores, LearnedScores) else []


def base_model_of(model: PreTrainedModel) -> str | None:
    """Where the dense model came from: a directory or Hub id; `None` for a model made in memory."""
    pruned = getattr(model.config, "pruning_config", None) or {}
    return pruned.get("base_model_name_or_path") or model.config._name_or_path or None


def calibration_data(
    config: PruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | None,
    batch_size: int,
    model: PreTrainedModel | None = None,
) -> Sequence[Mapping[str, Any]] | None:
    """Batches for what needs data: windows of a text, or the caller's own; `None` if nothing that was asked for does.

    Raises:
        CalibrationError: data is needed and none was given, or text was given without a tokenizer.
    """
    return _data(config, tokenizer, calibration, batch_size, 0, model)[0]


def _data(
    config: PruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | None,
    batch_size: int,
    num_held_out: int,
    model: PreTrainedModel | None,
) -> tuple[Sequence[Mapping[str, Any]] | None, Sequence[Mapping[str, Any]]]:
    """`calibration_data`, and up to so many windows that are left of the texts."""
    if is_text(calibration):
        parts_of(calibration)  # type: ignore[arg-type]  # wrong ones are named whether they are needed or not
    scored = config.method in METHODS and METHODS[config.method].needs_calibration  # `score` refuses unknown ones
    searched = config.compares_outputs
    selected, repaired = config.selection != "scores", config.repairs_with_data
    needed = config.pruning_ratio > 0 and (scored or searched or selected or repaired)
    if not needed and (not is_text(calibration) or tokenizer is None or not num_held_out):
        return None, ()
    if calibration is None and tokenizer is not None:
        logger.warning("no calibration text was given: calibrating with the bundled mixture, %r", GENERAL)
        calibration = GENERAL
    if calibration is None:
        what = f"selection {config.selection!r}" if selected else f"repair {config.repair!r}"
        what = f"allocation {config.allocation!r}" if searched else what
        what = f"method {config.method!r}" if scored else what
        raise CalibrationError(
            f"{what} needs calibration text; pass a file, a dataset or batches, or a tokenizer, for the bundled text."
        )
    if not is_text(calibration):
        return calibration, ()  # type: ignore[return-value]
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer; pass the model's own.")
    num_samples = config.num_samples if needed else 0
    batches = calibration_batches(
        tokenizer,
        calibration,  # type: ignore[arg-type]
        num_samples=num_samples,
        seq_len=config.seq_len,
        batch_size=batch_size,
        seed=config.seed,
        num_held_out=num_held_out if config.seq_len > 1 else 0,
        model=model,
        assistant_only_loss=isinstance(config, LLMPrunerConfig) and config.assistant_only_loss,
    )
    first = -(-num_samples // batch_size)
    return batches[:first] if needed else None, batches[first:]
