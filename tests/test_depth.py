"""Layers removed where what a layer computes depends on its place: equal in numbers, or refused with the cause."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from image_models import SETTINGS
from models import logits, make_plan, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

import hf_prune
from hf_prune.cli.inspection import inspect_config
from hf_prune.errors import CheckpointError, StructureError
from hf_prune.layers.masking import masked
from hf_prune.structure.forward import Forward
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.in_place import apply_plan_
from hf_prune.surgery.judging import Judge, _Expressions
from hf_prune.surgery.pruned_config import depends_on_depth, pruned_config
from hf_prune.surgery.pruning import apply_plan

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from small_configs import small_config


def small_model(model_type, **settings):
    torch.manual_seed(0)
    config = small_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def without(structure, *layers):
    stay = tuple(layer for layer in range(len(structure.layer_paths)) if layer not in layers)
    return make_plan(structure, {"layers": stay})


def check_removed(model, *layers):
    """Remove layers; compare with the model in which they are bypassed, before and after saving. Returns the config."""
    structure = infer_structure(model)
    plan = without(structure, *layers)
    pruned = apply_plan(model, structure, plan)
    with masked(model, structure, plan):
        expected = logits(model)
    assert torch.allclose(logits(pruned), expected, rtol=0, atol=1e-6 * expected.abs().max())
    assert (expected - logits(model)).abs().max() > 1e-3 * expected.abs().max()
    return pruned


def check_reloaded(pruned, directory):
    pruned.save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="batched_mm"
    ).eval()
    assert torch.allclose(logits(loaded), logits(pruned), rtol=0, atol=1e-5 * logits(pruned).abs().max())
    return loaded


FLAGS = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "scale_attn_weights")


@pytest.mark.parametrize("flags", itertools.product((False, True), repeat=3))
def test_gpt2_keeps_the_scales_of_its_layers(flags, tmp_path):
    model = small_model("gpt2", **dict(zip(FLAGS, flags, strict=True)))
    pruned = check_removed(model, 1)
    surgery = pruned.config.pruning_config.get("surgery", {})
    depends = flags[0]
    assert surgery.get("layers") == ({"kept": [0, 2, 3], "num_hidden_layers": 4} if depends else None)
    loaded = check_reloaded(pruned, tmp_path)
    tokens = loaded.generate(token_ids(1, 5), max_new_tokens=4, do_sample=False, use_cache=True)
    again = loaded.generate(token_ids(1, 5), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again), "layers have their own places in the cache"


@pytest.mark.parametrize("model_type", ["minicpm3", "beam", "modernbert-decoder"])
def test_constants_of_depth_are_kept(model_type, tmp_path):
    pruned = check_removed(small_model(model_type), 0)
    assert pruned.config.pruning_config["surgery"]["layers"] == {"kept": [1, 2, 3], "num_hidden_layers": 4}
    check_reloaded(pruned, tmp_path)


def test_layers_removed_twice_and_with_widths(tmp_path):
    once = check_removed(small_model("minicpm3"), 1)
    twice = check_removed(once, 0)
    assert twice.config.pruning_config["surgery"]["layers"] == {"kept": [2, 3], "num_hidden_layers": 4}
    structure = infer_structure(twice)
    plan = make_plan(structure, {"layers.0.mlp": (0, 3, 5), "layers.1.attention": (0, 2)})
    narrow = apply_plan(twice, structure, plan)
    with masked(twice, structure, plan):
        expected = logits(twice)
    assert torch.allclose(logits(check_reloaded(narrow, tmp_path)), expected, rtol=0, atol=1e-5)


def test_layers_removed_in_place_keep_their_constants():
    model = small_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    expected = check_removed(model, 1)
    structure = infer_structure(model)
    apply_plan_(model, structure, without(structure, 1))
    assert torch.equal(logits(model), logits(expected))
    assert [block.attn.layer_idx for block in model.transformer.h] == [0, 1, 2]


@pytest.mark.parametrize(
    ("model_type", "layer", "cause"),
    [
        ("zaya", 1, "mlp.gate computes something else"),
        ("jamba", 0, "attn_layer_period=2"),
        ("gemma4_unified_text", 3, "layer_type is 'full_attention'"),
        ("gemma3n_text", 2, "embed_tokens_per_layer"),
    ],
)
def test_what_no_config_describes_is_refused_with_its_cause(model_type, layer, cause):
    config = small_config(model_type)
    structure = infer_structure(config)
    with pytest.raises(StructureError, match=cause):
        pruned_config(config, structure, without(structure, layer))


def test_what_would_load_wrongly_without_us_is_refused():
    config = small_config("diffllama")
    structure = infer_structure(config)
    with pytest.raises(CheckpointError, match="lambda_init"):
        pruned_config(config, structure, without(structure, 0))


@pytest.mark.parametrize(
    ("model_type", "layer", "rewritten"),
    [
        ("bamba", 0, {"attn_layer_indices": [0]}),
        ("nemotron_h", 0, {}),
        ("deepseek_v3", 0, {"first_k_dense_replace": 0}),
        ("llama4_text", 0, {"moe_layers": [0, 1, 2]}),
        ("recurrent_gemma", 0, {}),
    ],
)
def test_lists_and_numbers_of_layers_go_with_the_layers(model_type, layer, rewritten):
    pruned = check_removed(small_model(model_type), layer)
    assert "surgery" not in pruned.config.pruning_config, "a plain config suffices"
    for name, value in rewritten.items():
        assert getattr(pruned.config, name) == value


def test_a_config_that_changes_a_constant_is_not_taken():
    """`head_dim` left to hidden size / heads would give half the heads twice the size, and another scale."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    structure = infer_structure(config)
    judge = Judge(config, structure, make_plan(structure, {}), None)
    assert not judge.difference(config)
    for name, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("rope_parameters", None)):
        other = type(config).from_dict(config.to_dict())
        if value is None:
            other.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        else:
            setattr(other, name, value)
        assert judge.difference(other), name


def test_inspect_says_what_depends_on_depth():
    rows = {}
    for flag in (False, True):
        config = small_config("gpt2")
        config.scale_attn_by_inverse_layer_idx = flag
        rows[flag] = next(row for row in inspect_config(config).families if row.name == "layers")
    assert rows[False].reason == ""
    assert "attn.scaling" in rows[True].reason
    assert rows[True].prunable


@pytest.mark.parametrize(
    "record",
    [
        {"kept": [0, 2, 9], "num_hidden_layers": 4},
        {"kept": [2, 0, 3], "num_hidden_layers": 4},
        {"kept": [0, 2], "num_hidden_layers": 4},
        {"kept": [], "num_hidden_layers": 4},
        {"kept": [0, 2, 3], "num_hidden_layers": 10**9},
        {"kept": [0, 2, 3], "num_hidden_layers": 4, "forward": 1},
        {"kept": [0, 2, 3.0], "num_hidden_layers": 4},
        [0, 2, 3],
    ],
)
def test_a_damaged_record_of_layers_is_refused(record):
    config = small_config("minicpm3")
    structure = infer_structure(config)
    good = pruned_config(config, structure, without(structure, 1))
    values = good.to_dict()
    values["pruning_config"]["surgery"]["layers"] = record
    with pytest.raises(CheckpointError, match="layers"):
        AutoModelForCausalLM.from_config(type(config).from_dict(values))


def test_prune_removes_layers_of_a_model_that_scales_by_depth():
    model = small_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    config = hf_prune.PruningConfig(1 / 4, axes=("layer",), budget="units")
    pruned = hf_prune.prune(model, config, scores={"layers": torch.tensor([1.0, 0.0, 1.0, 1.0])}).model
    structure = infer_structure(model)
    with masked(model, structure, without(structure, 1)):
        assert torch.equal(logits(pruned), logits(model))


def test_a_write_through_a_view_changes_what_is_computed():
    run = _Expressions({}, Forward(), True)
    with run:
        tensor = torch.ones(4, device="meta")
        view = tensor.view(2, 2)
        before = run.number(view)
        tensor.mul_(2)
        assert run.number(view) != before


def test_a_difference_is_looked_for_in_the_module_around_too():
    config = small_config("llama")
    structure = infer_structure(config)
    judge = Judge(config, structure, make_plan(structure, {}), None)
    dense, model = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    dense.model.layers[1].mlp.factor, model.model.layers[1].mlp.factor = 1.0, 2.0
    said = judge._constants(dense, model, "model.layers.1.mlp.down_proj")
    assert said == "model.layers.1.mlp.factor is 2.0, 1.0 in the dense model"


def test_layers_of_the_text_in_a_model_of_images_with_tables_of_labels():
    """Configs of models of images carry `id2label`, whose keys are numbers and whose values are no longer than n."""
    text = {**SETTINGS["gemma3"]["text_config"], "num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
    config = AutoConfig.for_model("gemma3", **{**SETTINGS["gemma3"], "text_config": text})
    assert next(row for row in inspect_config(config).families if row.name == "layers").reason == ""


def test_a_single_layer_depends_on_nothing():
    config = small_config("gpt2")
    config.num_hidden_layers, config.scale_attn_by_inverse_layer_idx = 1, True
    assert depends_on_depth(config, infer_structure(config)) == ""
