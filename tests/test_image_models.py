"""The decoder inside of models that read images and text: pruned by the same laws, what reads images untouched."""

from __future__ import annotations

import json
import random

import pytest
import torch
from image_models import SETTINGS, image_batch, image_model
from models import random_kept

from hf_prune import MagnitudeConfig, PolicyGradientConfig, WandaConfig, infer_structure, prune
from hf_prune.errors import CalibrationError, StructureError
from hf_prune.format.remote_code import auto_map, remote_code
from hf_prune.layers.masking import masked
from hf_prune.plan import bare_plan
from hf_prune.repair import repair_
from hf_prune.surgery.pruning import apply_plan


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", SETTINGS)
def test_masked_is_sliced_and_reloaded_with_an_image(kind, tmp_path):
    from transformers import AutoModelForImageTextToText

    model, batch = image_model(kind), image_batch(kind)
    structure = infer_structure(model)
    kept = random_kept(structure, random.Random(0)) | {"layers.attention": (0, 2)}
    kept.pop("layers.1.attention", None)
    plan = bare_plan(structure, kept)
    pruned = apply_plan(model, structure, plan)
    with masked(model, structure, plan):
        expected = logits(model, batch)
    sliced = logits(pruned, batch)
    assert (expected - sliced).abs().max() < 1e-9 < 1e-3 < (logits(model, batch) - sliced).abs().max()
    assert sum(p.numel() for p in pruned.parameters()) == plan.num_parameters(structure)

    pruned.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(model)
    assert (logits(again, batch) - sliced).abs().max() < 1e-5  # gemma computes its angles in float32
    tokens = [m.generate(**batch, max_new_tokens=3, do_sample=False) for m in (pruned, again)]
    assert torch.equal(*tokens)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" not in values
    assert len(values["text_config"]["per_layer_config"]) == 3


@pytest.mark.parametrize("kind", ["llava", "gemma4"])
def test_layers_go_from_the_text_alone(kind):
    model, batch = image_model(kind), image_batch(kind)
    structure = infer_structure(model)
    plan = bare_plan(structure, {"layers": (1, 2)})
    pruned = apply_plan(model, structure, plan)
    with masked(model, structure, plan):
        assert (logits(model, batch) - logits(pruned, batch)).abs().max() < 1e-9
    assert pruned.config.text_config.num_hidden_layers == 2
    assert pruned.config.vision_config.num_hidden_layers == model.config.vision_config.num_hidden_layers


def test_one_width_in_all_layers_is_a_plain_config():
    pruned = prune(image_model("llava"), MagnitudeConfig(0.3)).model
    assert pruned.config.text_config.intermediate_size < 40
    assert not pruned.config.text_config.is_heterogeneous
    assert "surgery" not in pruned.config.pruning_config


def test_what_images_write_into_is_not_pruned():
    model = image_model("llava")
    blocker = infer_structure(model).axes["hidden"].blocker
    assert "multi_modal_projector" in blocker
    with pytest.raises(StructureError, match="no text passes"):
        prune(model, MagnitudeConfig(0.3, axes=("hidden",)))


def test_layers_after_which_images_enter_stay():
    model, batch = image_model("qwen3_vl"), image_batch("qwen3_vl")
    structure = infer_structure(model)
    with pytest.raises(StructureError, match="images enter after each of the first 1 decoder layers"):
        apply_plan(model, structure, bare_plan(structure, {"layers": (1, 2)}))
    plan = bare_plan(structure, {"layers": (0, 2)})
    with masked(model, structure, plan):
        expected = logits(model, batch)
    assert (expected - logits(apply_plan(model, structure, plan), batch)).abs().max() < 1e-9


def test_calibration_with_images(tmp_path):
    model, batch = image_model("llava"), image_batch("llava")
    text = {"input_ids": batch["input_ids"]}
    config = WandaConfig(0.3)
    with_image, without = prune(model, config, calibration=[batch] * 2), prune(model, config, calibration=[text] * 2)
    assert any(not torch.equal(with_image.scores[name], without.scores[name]) for name in without.scores)
    by_layers = prune(model, config, calibration=[batch] * 2, work_dir=tmp_path)
    assert all(torch.allclose(by_layers.scores[name], with_image.scores[name]) for name in with_image.scores)

    other = {**batch, "pixel_values": -batch["pixel_values"]}  # the same tensor of tokens
    mixed = prune(model, config, calibration=[batch, other])
    apart = prune(model, config, calibration=[batch, {**other, "input_ids": batch["input_ids"].clone()}])
    assert all(torch.equal(mixed.scores[name], apart.scores[name]) for name in apart.scores)
    assert any(not torch.equal(mixed.scores[name], with_image.scores[name]) for name in with_image.scores)

    both = {name: torch.cat([value, value]) for name, value in batch.items()}
    with pytest.raises(CalibrationError, match="2 samples with pixel_values, expected one"):
        prune(model, config, calibration=[both])
    with pytest.raises(CalibrationError, match="found samples with images"):
        prune(model, PolicyGradientConfig(0.3, policy_steps=2, windows_per_step=2), calibration=[batch] * 2)
    deep, images = image_model("qwen3_vl"), [image_batch("qwen3_vl")]
    with pytest.raises(StructureError, match="images change the hidden states between the decoder layers"):
        prune(deep, config, calibration=images, work_dir=tmp_path / "deep")


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "qwen3_vl"])  # images enter between its layers
@pytest.mark.parametrize("target", ["own", "residual"])
def test_repair_sees_the_images_in_both_models(kind, target):
    model, batch = image_model(kind), image_batch(kind)
    structure = infer_structure(model)
    plan = bare_plan(structure, {"layers.0.mlp": tuple(range(0, structure.axes["layers.0.mlp"].num_units, 2))})
    pruned, expected = apply_plan(model, structure, plan), logits(model, batch)
    before = (logits(pruned, batch) - expected).abs().max()
    repair_(pruned, model, structure, plan, [batch] * 2, target=target, ridge=1e-6)
    assert (logits(pruned, batch) - expected).abs().max() < 0.3 * before  # few tokens: nearly all can be made up for


def test_remote_code_of_a_model_of_images():
    config = image_model("llava").config
    config.architectures = ["LlavaForConditionalGeneration"]
    references = auto_map(config)
    assert references["AutoModelForImageTextToText"] == "modeling_hf_prune.LlavaForConditionalGeneration"
    text = remote_code(config.architectures, "llava", "source")
    assert "def is_custom_code(cls):\n        return False" in text  # else tensors would be looked for by other names
