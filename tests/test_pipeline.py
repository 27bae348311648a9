"""The whole job: prune with a real tokenizer and text, save, load with and without the plugin, train further."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    logits,
    shared_model,
    shared_structure,
    tiny_model,
    tiny_tokenizer,
    token_ids,
    write_text,
)
from transformers import AutoConfig

import hf_prune
from hf_prune import (
    MagnitudeConfig,
    PrunedModelForCausalLM,
    RandomConfig,
    WandaConfig,
    allocate,
    apply_plan,
    loading,
    pipeline,
    prune,
)
from hf_prune.checkpoint.saving import install_save_hook, load_plan, verify_checkpoint
from hf_prune.format.building import needs_plugin
from hf_prune.structure import inference
from hf_prune.surgery import judging, width_attributes
from hf_prune.surgery.pruned_config import pruned_config


@dataclass(frozen=True)
class Dense:
    model: Any
    tokenizer: Any
    text: str
    directory: Path


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Dense:
    """A tiny llama in float32 with a tokenizer, as a stock checkpoint; and a text."""
    directory = tmp_path_factory.mktemp("dense")
    text = write_text(tmp_path_factory.mktemp("text") / "calibration.txt")
    tokenizer = tiny_tokenizer(text)
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Dense(model, tokenizer, text, directory)


def wanda(**changes):
    return WandaConfig(**{"pruning_ratio": 0.3, "num_samples": 4, "seq_len": 16, "allocation": "global", **changes})


# --- prune() ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_prune_with_text_leaves_the_dense_model_alone(dense, family):
    model = tiny_model(family, dtype=torch.float32)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    config_asked = wanda(round_to=4)  # mixtral: the grouped product takes rows of a multiple of 16 bytes
    result = prune(model, config_asked, tokenizer=dense.tokenizer, calibration=dense.text, batch_size=3)
    assert type(result.model) is type(model)
    assert result.structure == shared_structure(family)
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.num_parameters(result.structure)
    assert result.plan.achieved["decoder"] == pytest.approx(0.3, abs=0.1)
    assert logits(result.model).isfinite().all()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())
    assert all(after[name].data_ptr() == place for name, (place, _) in before.items())
    assert not {t.data_ptr() for t in after.values()} & {t.data_ptr() for t in result.model.state_dict().values()}
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layers_on", ["memory", "disk"])
def test_a_path_is_read_once_and_traced_once(dense, monkeypatch, layers_on):
    """Its config and its structure are handed on; the dense model is not run again for a second plan of it."""
    counts = Counter()

    def counted(owner, name, key=lambda *_: ""):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name + key(*args)] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(pipeline, "load_config")
    counted(loading, "load_config")
    counted(inference, "trace")
    counted(width_attributes, "_find_width_attributes")
    counted(judging.Judge, "_run", lambda _, config, numbers, *bypassed: " of the dense model" if bypassed else "")
    result = prune(dense.directory, RandomConfig(0.3), layers_on=layers_on, tokenizer=dense.tokenizer)
    assert counts == {
        "load_config": 1,
        "trace": 1,
        "_find_width_attributes": 1,
        "_run of the dense model": 1,
        "_run": 1,
    }
    counts.clear()
    plan = allocate(result.scores, result.structure, RandomConfig(0.5))
    pruned_config(AutoConfig.from_pretrained(dense.directory), result.structure, plan, type(result.model))
    assert counts["_run of the dense model"] == 0


def test_the_batch_size_of_calibration_does_not_matter(dense):
    plans = [
        prune(dense.model, wanda(), tokenizer=dense.tokenizer, calibration=dense.text, batch_size=size).plan
        for size in (1, 4)
    ]
    assert plans[0] == plans[1]


def test_scores_serve_for_another_ratio_and_batches_may_be_given(dense):
    batches = [{"input_ids": token_ids(2, 16, seed=seed)} for seed in range(2)]
    result = prune(dense.model, wanda(), calibration=batches)
    config = wanda(pruning_ratio=0.5)
    plan = allocate(result.scores, result.structure, config)
    assert plan == prune(dense.model, config, calibration=batches).plan
    pruned = apply_plan(dense.model, result.structure, plan)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in result.model.parameters())


# --- PrunedModelForCausalLM -------------------------------------------------------------------------------------------


def test_prune_while_loading_save_and_load_again(dense, tmp_path):
    model = PrunedModelForCausalLM.from_pretrained(dense.directory, pruning_config=wanda(), calibration=dense.text)
    expected = prune(dense.model, wanda(), tokenizer=dense.tokenizer, calibration=dense.text)
    assert model.config.pruning_config["base_model_name_or_path"] == str(dense.directory)
    assert model._pruning_plan.kept_indices == expected.plan.kept_indices
    assert isinstance(model, PrunedModelForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"

    target = tmp_path / "pruned"
    PrunedModelForCausalLM.save_pretrained(model, target, tokenizer=dense.tokenizer)
    verify_checkpoint(target)
    assert load_plan(target) == model._pruning_plan
    loaded = PrunedModelForCausalLM.from_pretrained(target)
    assert isinstance(loaded, PrunedModelForCausalLM)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert loaded.generation_config.max_new_tokens == 5
    values = json.loads((target / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert values["pruning_config"]["settings"]["pruning_ratio"] == 0.3
    assert values["pruning_config"]["method"] == "wanda"

    from transformers import AutoTokenizer, pipeline

    generate = pipeline("text-generation", model=loaded, tokenizer=AutoTokenizer.from_pretrained(target))
    (answer,) = generate("the river", do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert len(answer["generated_text"]) > len("the river")


def test_prune_in_memory_and_what_counts_as_pruned(dense):
    pruned = PrunedModelForCausalLM.prune(dense.model, MagnitudeConfig(0.2))
    assert isinstance(pruned, PrunedModelForCausalLM)
    assert not isinstance(dense.model, PrunedModelForCausalLM)
    assert not isinstance(object(), PrunedModelForCausalLM)
    with pytest.raises(TypeError, match="use from_pretrained"):
        PrunedModelForCausalLM()


def test_dtype_and_other_arguments_reach_transformers(dense):
    model = PrunedModelForCausalLM.from_pretrained(
        dense.directory, pruning_config=RandomConfig(0.3), dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


# --- with and without the plugin --------------------------------------------------------------------------------------

STOCK = """
import json, sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity(50); logging.disable_progress_bar()
found = {}
for directory in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory)
        expected = torch.load(directory + "/expected.pt", weights_only=True)
        with torch.no_grad():
            found[directory] = (model(input_ids=expected["ids"]).logits - expected["logits"]).abs().max().item()
    except Exception as error:
        found[directory] = type(error).__name__
assert "hf_prune" not in sys.modules
print(json.dumps(found))
"""
UNIFORM = {
    "llama": RandomConfig(0.5, budget="units", round_to=8),
    "mistral": RandomConfig(0.4, axes=("mlp", "attention", "hidden"), budget="units"),
    "gemma3_text": RandomConfig(0.3, axes=("layer",), budget="units"),
    "gpt2": RandomConfig(0.5, axes=("mlp",), budget="units"),
    "bloom": RandomConfig(0.3, axes=("layer",), budget="units"),
    "mixtral": RandomConfig(0.5, axes=("mlp", "layer"), budget="units", round_to=4),
}
HETEROGENEOUS = {
    "llama": RandomConfig(0.3, allocation="global"),
    "mistral": RandomConfig(0.5, axes=("layer_attention",), budget="units"),
    "gemma3_text": RandomConfig(0.3, axes=("layer_mlp",), budget="units"),
    "gpt2": RandomConfig(0.4, axes=("attention",), budget="units"),
    "bloom": RandomConfig(0.3, axes=("mlp",)),
    "opt": RandomConfig(0.3, axes=("layer_attention",), budget="units"),
}


def test_uniform_results_load_in_stock_transformers_and_others_fail_loudly(tmp_path):
    for kind, configs in (("uniform", UNIFORM), ("heterogeneous", HETEROGENEOUS)):
        for family, config in configs.items():
            pruned = prune(tiny_model(family, dtype=torch.float32), config).model
            assert needs_plugin(pruned.config) == (kind == "heterogeneous"), family
            directory = tmp_path / f"{kind}-{family}"
            pruned.save_pretrained(directory)
            torch.save({"ids": token_ids(), "logits": logits(pruned)}, directory / "expected.pt")
    directories = sorted(str(path) for path in tmp_path.iterdir())
    result = subprocess.run([sys.executable, "-c", STOCK, *directories], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for directory, found in json.loads(result.stdout).items():
        name = Path(directory).name
        if name.startswith("uniform"):
            assert isinstance(found, float), f"{name}: {found}"
            assert found <= 1e-5, name
        else:
            assert isinstance(found, str), f"{name} loaded without the plugin"


# --- lower precision, training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_bfloat16(family, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16)
    result = prune(model, MagnitudeConfig(0.3))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    result.model.save_pretrained(tmp_path)
    loaded = PrunedModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.allclose(logits(loaded), logits(result.model), atol=0.05)


def heterogeneous(family):
    model = tiny_model(family, dtype=torch.float32)
    pruned = prune(model, RandomConfig(0.3, allocation="global", seed=3)).model
    assert needs_plugin(pruned.config)
    return pruned


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_and_merges(family, tmp_path):
    from peft import LoraConfig, get_peft_model

    pruned = heterogeneous(family)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = get_peft_model(pruned, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids, losses = token_ids(), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    adapted = logits(model.eval())
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), adapted, atol=1e-4)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert len(changed) < len(before)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(PrunedModelForCausalLM.from_pretrained(tmp_path)), adapted, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_trainer_goes_on_from_its_checkpoint(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    install_save_hook()
    model = heterogeneous(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in token_ids(4, 8)]

    def train(model, steps, **resume):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, args, train_dataset=data).train(**resume)

    train(model, 2)
    assert not torch.equal(before["lm_head.weight"], model.state_dict()["lm_head.weight"])
    checkpoint = tmp_path / "checkpoint-2"
    verify_checkpoint(checkpoint)
    assert load_plan(checkpoint) == model._pruning_plan
    loaded = PrunedModelForCausalLM.from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    train(loaded, 3, resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(loaded.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_frozen_weights_stay_frozen_and_small_models_are_smaller_on_disk(dense, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight.requires_grad_(False)
    result = prune(model, RandomConfig(0.5))
    assert {n for n, p in result.model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}
    result.model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    saved = 4 * sum(p.numel() for p in result.model.parameters())
    assert saved <= size < saved + 10_000
    assert size < (dense.directory / "model.safetensors").stat().st_size


def test_equal_seeds_give_equal_bits_through_the_public_names():
    model = shared_model("qwen3")
    first, second = (hf_prune.prune(model, hf_prune.RandomConfig(0.4, seed=9)).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_experts_run_in_the_default_grouped_product(dtype):
    """Its rows must be whole 16 bytes: an arbitrary width would crash."""
    model = tiny_model("mixtral", dtype=dtype)
    result = prune(model, MagnitudeConfig(0.3, axes=("mlp",)))
    widths = {result.plan.widths[f"layers.{layer}.mlp"] for layer in range(len(result.structure.layer_paths))}
    assert all(width % 8 == 0 for width in widths)
    result.model.set_experts_implementation("grouped_mm")
    assert result.model(input_ids=token_ids()).logits.isfinite().all()
